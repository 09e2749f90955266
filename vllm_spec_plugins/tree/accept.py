# SPDX-License-Identifier: Apache-2.0
"""Acceptance rules: which nodes of a verified tree may be kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vllm_spec_plugins.compiled import kernels_for, loops_for
from vllm_spec_plugins.tree.tree import TokenTree


@dataclass(frozen=True, eq=False)
class Acceptance:
    """What one verification step keeps. D = tree.max_depth.

    Attributes:
        path: [B, D] int64, rows of the accepted nodes from the root down, padded with 0.
        num_accepted: [B] int64, accepted nodes.
        emitted: [B, D + 1] int64, the tokens that the step emits: the accepted nodes' tokens and the target's own
            token below the last of them; padded with -1.
        num_emitted: [B] int64: num_accepted + 1, or 0 where row 0 was not drawn (drawn[:, 0] == -1).
    """

    path: Tensor
    num_accepted: Tensor
    emitted: Tensor
    num_emitted: Tensor


@dataclass(frozen=True, eq=False)
class TargetRows:
    """What the target model computed at the rows of the trees, for rules that need more than the draws.

    Attributes:
        logits: [M, V], processed (temperature, filters, penalties), one line per row computed in this step.
        index: [B, N + 1] int64, the line of each tree row; -1 = row not present.
        greedy: [B] bool, requests at temperature 0, which their logits do not show; None = no request is.
        hidden: [M, H] last hidden states, or None.
        threshold: [B] float32, of a rule whose strength is each request's own; None = the rule's.
    """

    logits: Tensor
    index: Tensor
    greedy: Tensor | None = None
    hidden: Tensor | None = None
    threshold: Tensor | None = None


class AcceptRule(Protocol):
    """A rule chooses, per request, the row where the accepted path ends (0 = nothing accepted).

    Attributes:
        name: as written in settings and metrics.
        lossless: the output is plain decoding's, token for token.
        needs_target: `target` must be given (costs keeping the processed logits of every row).
        coupled: drafts are to be ranked with the noise that the target draws with.
        caveat: what a lossy rule changes, in a clause; empty if lossless.
    """

    name: str
    lossless: bool
    needs_target: bool
    coupled: bool
    caveat: str

    def __call__(self, tree: TokenTree, drawn: Tensor, target: TargetRows | None = None) -> Acceptance:
        """`drawn` [B, N + 1] int64: the target's draw at every row, -1 where the row was not present."""
        ...


def deepest_reachable(tree: TokenTree, wrong: Tensor) -> Tensor:
    """[B] int64: the deepest row, the first of several, with no `wrong` [B, N] node on its path; 0 = the root alone."""
    if loops_for(wrong):
        from vllm_spec_plugins.tree import loops

        return torch.from_numpy(loops.deepest_reachable(tree.parents.numpy(), tree.depth.numpy(), wrong.numpy()))
    blocked = (tree.ancestors()[:, :, 1:] & wrong.unsqueeze(1)).any(-1)  # [B, N + 1]: never the root
    return tree.depth.masked_fill(blocked, -1).argmax(1)


def accept_down_to(tree: TokenTree, row: Tensor, drawn: Tensor) -> Acceptance:
    """Accept the path from the root to `row` [B] and emit the target's draw at `row` behind it."""
    if loops_for(row):
        from vllm_spec_plugins.tree import loops

        tokens, parents, depth = tree.tokens.numpy(), tree.parents.numpy(), tree.depth.numpy()
        found = loops.accept_down_to(tokens, parents, depth, row.numpy(), drawn.numpy(), tree.max_depth)
        return Acceptance(*map(torch.from_numpy, found))
    path = tree.path(row)  # [B, D]
    num_accepted = tree.depth.gather(1, row.unsqueeze(1))  # [B, 1]
    # The token *at* each row; the root's is not emitted, and padding (row 0) reads as -1.
    at_row = torch.nn.functional.pad(tree.tokens, (1, 0), value=-1)
    emitted = torch.nn.functional.pad(at_row.gather(1, path), (0, 1), value=-1)
    last = drawn.gather(1, row.unsqueeze(1))
    emitted.scatter_(1, num_accepted, last)
    num_emitted = (num_accepted + 1) * (last >= 0)
    return Acceptance(path, num_accepted.squeeze(1), emitted, num_emitted.squeeze(1))


def accept_without(tree: TokenTree, wrong: Tensor, drawn: Tensor) -> Acceptance:
    """Accept the path to the deepest row that no `wrong` [B, N] node leads to; what lies behind it is the target's draw."""
    if kernels_for(drawn):
        from vllm_spec_plugins.kernels.tree_walk import tree_walk

        return Acceptance(*tree_walk(tree.tokens, tree.parents, drawn, tree.max_depth, wrong))
    return accept_down_to(tree, deepest_reachable(tree, wrong), drawn)


class Walk:
    """The exact rule: from the root, go to the child that equals the target's draw, stop where there is none.

    Every row's draw is what plain decoding would draw at that position, so what the walk emits is plain decoding's
    output, whatever the tree. Among nodes that spell the same path (duplicates) the draws agree, so taking the
    deepest reachable row is the walk.
    """

    name = "walk"
    lossless = True
    needs_target = False
    coupled = True
    caveat = ""

    def __call__(self, tree: TokenTree, drawn: Tensor, target: TargetRows | None = None) -> Acceptance:
        if loops_for(drawn):
            from vllm_spec_plugins.tree import loops

            arrays = (each.numpy() for each in (tree.tokens, tree.parents, tree.depth, drawn))
            return accept_down_to(tree, torch.from_numpy(loops.walk_end(*arrays)), drawn)
        if kernels_for(drawn):
            from vllm_spec_plugins.kernels.tree_walk import tree_walk

            return Acceptance(*tree_walk(tree.tokens, tree.parents, drawn, tree.max_depth))
        absent = (tree.tokens | drawn[:, 1:]) < 0  # no node, or a node whose row was cut before verification
        wrong = (tree.tokens != drawn.gather(1, tree.parents)) | absent  # [B, N]
        return accept_down_to(tree, deepest_reachable(tree, wrong), drawn)


class Typical:
    """Typical acceptance of Medusa (arXiv 2401.10774, section 2.3.1): lossy, for text that is likely rather than drawn.

    A node is kept where the target gives its token more than min(eps, delta * exp(-H)), H the entropy in nats of the
    target's distribution there, after temperature and filters; of the paths of kept nodes the longest wins, of equally
    long ones the first. Behind it stands the target's own draw. (The paper takes the likeliest token there. A draw keeps
    the first token after a rejection the request's temperature.)

    At temperature 0 the distribution is all on one token, so the rule is the walk, and lossless.
    """

    name = "typical"
    lossless = False
    needs_target = True
    coupled = False
    caveat = "accept=typical is lossy: sampled text is not plain decoding's (greedy text is)"

    def __init__(self, eps: float = 0.09, delta: float = 0.3) -> None:
        self.eps, self.delta = eps, delta

    def __call__(self, tree: TokenTree, drawn: Tensor, target: TargetRows | None = None) -> Acceptance:
        assert target is not None
        p = target.logits.softmax(-1, dtype=torch.float32)  # [M, V]
        least = (self.delta * torch.exp(-torch.special.entr(p).sum(-1))).clamp(max=self.eps)  # [M]
        above = target.index.gather(1, tree.parents).clamp(min=0)  # [B, N], the line of each node's parent
        kept = p[above, tree.tokens.clamp(min=0)] > least[above]
        if target.greedy is not None:
            kept = (tree.tokens == drawn.gather(1, tree.parents)).where(target.greedy.unsqueeze(1), kept)
        absent = (tree.tokens | drawn[:, 1:]) < 0
        return accept_without(tree, ~kept | absent, drawn)
