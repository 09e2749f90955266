# SPDX-License-Identifier: Apache-2.0
"""Token trees from a draft model.

Miao et al., "SpecInfer: Accelerating Large Language Model Serving with Tree-based Speculative Inference and Verification",
arXiv 2305.09781, section 3: an expansion vector <k1..km> gives every node at depth i k_{i+1} children. Without one the tree
is grown for a budget from the draft's own chances. Children are the draft's best tokens with the noise that the target will
draw with ("coupled children"), so the walk finds a sampled request's draw among them; the paper's rule needs the draft's
probabilities and gives another text than plain decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import mul

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_spec_plugins.compiled import kernels_for, loops_for
from vllm_spec_plugins.proposers.base import DraftModel, Likeliest, StepContext, least_chance
from vllm_spec_plugins.tree.tree import TokenTree

# Candidates of a row that share its chance; those behind them are taken to have none.
CONSIDERED = 8

# A level is run if the chance that one of its rows is reached exceeds its cost in target passes times this: speculation makes
# some 1.3 tokens in the time of a pass, and .8 of the rows that are reached have a child that comes true.
LEVEL = 1.6


class SpecInferProposer:
    """Grows a tree level by level, one forward pass of the draft model over each level.

    The chance of a child given its parent is the softmax of the scores, logit + temperature * noise, of the row's best
    candidates: the noise is known, so what is left uncertain is how far the draft's logits lie from the target's.

    Args:
        draft: None: only the shape of the trees is asked for.
        widths: children per node at each depth; every tree is this shape. None: grown for `nodes`.
        nodes: N without `widths`: at most this many nodes.
        depth: without `widths`: at most this many levels.
        ranks: without `widths`: candidates per node.
        min_chance: without `widths`, as for LookaheadProposer.
    """

    name = "specinfer"
    reads_draws = reads_hidden = remembers = False
    tells_confidence = True  # where StepContext.deferring asks

    def __init__(
        self,
        draft: DraftModel | None,
        *,
        widths: Sequence[int] | None = None,
        nodes: int = 24,
        depth: int = 6,
        ranks: int = 4,
        min_chance: float = 0.06,
    ) -> None:
        self.draft, self.fixed, self.min_chance = draft, widths is not None, min_chance
        if widths is not None:
            self.children = list(widths)
            # Every node but those of the last level is expanded.
            self.expanded = [1]
            for width in widths[:-1]:
                self.expanded.append(self.expanded[-1] * width)
            self.num_nodes = sum(rows * width for rows, width in zip(self.expanded, widths, strict=True))
        else:
            depth = min(depth, nodes)
            self.children = [min(ranks, nodes)] * depth
            # The draft's rows must fit in the slots that the nodes will have: the root's is one more.
            beam = max(1, (nodes - 1) // max(1, depth - 1))
            self.expanded = [1] + [min(ranks**level, beam) for level in range(1, depth)]
            self.num_nodes = nodes
        self.max_depth = len(self.children)

    def add_request(self, slot: int, prompt_len: int) -> None:
        """Nothing is remembered here: the draft model's K/V is the engine's."""

    def propose(self, ctx: StepContext) -> TokenTree:
        """The best tree among what the draft finds likely."""
        assert self.draft is not None and ctx.likeliest is not None
        budget = self.num_nodes if ctx.budget is None else min(ctx.budget, self.num_nodes)
        least = 0.0 if self.fixed else least_chance(self.min_chance, len(ctx.slots))
        grow = self._grow
        if loops_for(ctx.slots):
            grow = self._grow_looped
        elif kernels_for(ctx.slots):
            grow = self._grow_in_kernels
        return grow(ctx, self.draft, ctx.likeliest, budget, least)

    def _weighs(self, draft: DraftModel) -> bool:
        """Whether a level that is hardly ever reached is left out: a draft that costs nothing runs them all."""
        return not self.fixed and draft.cost > 0.0

    def _grow(self, ctx: StepContext, draft: DraftModel, likeliest: Likeliest, budget: int, least: float) -> TokenTree:
        """In tensors, level by level. Every level runs as many rows as it may have, whether there is a candidate for each or
        not: how many there are is known to the device alone.
        """
        batch, device = len(ctx.slots), ctx.slots.device
        every = torch.arange(batch, device=device)
        found = _children(ctx, likeliest, draft, draft.begin(ctx), every, torch.zeros_like(every), self.children[0])

        # Candidates, all levels: [B, C]. Their parents are candidates (1-based; 0 = root).
        tokens, chances, sure = found
        sure = sure.unsqueeze(1).expand(tokens.shape)
        parents = torch.zeros_like(tokens)
        # Those of the last level: the first one's number, and their parents' rows in the draft's tree.
        start, owner = 0, parents
        drafted = TokenTree(tokens[:, :0], parents[:, :0])
        for level in range(1, self.max_depth):
            best, index = chances[:, start:].topk(min(self.expanded[level], chances.shape[1] - start), 1)
            wanted = (best >= least) & (best > 0)
            if self._weighs(draft):
                wanted &= (best * wanted).sum() >= LEVEL * draft.cost * batch
            width = best.shape[1]
            row = drafted.tokens.shape[1] + 1 + torch.arange(width, device=device)
            token = tokens[:, start:].gather(1, index).masked_fill(~wanted, -1)
            drafted = TokenTree(
                torch.cat((drafted.tokens, token), 1),
                torch.cat((drafted.parents, owner.gather(1, index).masked_fill(~wanted, 0)), 1),
                level,
            )
            request, count = every.repeat_interleave(width), self.children[level]
            logits = draft.extend(drafted, request, row.repeat(batch))
            found = _children(ctx, likeliest, draft, logits, request, torch.full_like(request, level), count)
            absent = ~wanted.unsqueeze(2)
            more = found[0].view(batch, width, count).masked_fill(absent, -1)
            path = (found[1].view(batch, width, count) * best.unsqueeze(2)).masked_fill(absent, 0.0)
            parent = (start + index + 1).repeat_interleave(count, 1)
            start, owner = tokens.shape[1], row.expand(batch, -1).repeat_interleave(count, 1)
            tokens, parents = torch.cat((tokens, more.flatten(1)), 1), torch.cat((parents, parent), 1)
            chances = torch.cat((chances, path.flatten(1)), 1)
            behind = found[2].view(batch, width).masked_fill(~wanted, 0.0)
            sure = torch.cat((sure, behind.repeat_interleave(count, 1)), 1)
        asked = None if ctx.deferring is None else sure
        return _best(tokens, parents, chances, asked, self.num_nodes, budget, least, self.max_depth)

    def _grow_in_kernels(
        self, ctx: StepContext, draft: DraftModel, likeliest: Likeliest, budget: int, least: float
    ) -> TokenTree:
        """The same with a kernel for either half of a level. The rows of the draft's trees stand without gaps: a level's are the
        first that were free, of which the last ones may be absent.
        """
        from vllm_spec_plugins.kernels import growth

        batch, device = len(ctx.slots), ctx.slots.device
        most, width = sum(map(mul, self.expanded, self.children)), max(sum(self.expanded[1:]), 1)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(batch, *shape, dtype=dtype, device=device)

        # As in the loops. Each in memory of its own: where it begins must not depend on the batch (kernels are compiled for it).
        tokens, links, owners, chances = zeros(most), zeros(most), zeros(most), zeros(most, dtype=torch.float32)
        start, count, rows = zeros(), zeros(), zeros()
        drafted, parents, candidate = zeros(width) - 1, zeros(width), zeros(width)
        sure = zeros(width + 1, dtype=torch.float32)

        every, row, at = torch.arange(batch, device=device), zeros(1), zeros(1)
        request, logits = every, draft.begin(ctx)
        for level, children in enumerate(self.children):
            if level:
                expanded, reach = self.expanded[level], sum(self.expanded[1 : level + 1])
                at = (rows + 1).unsqueeze(1) + torch.arange(expanded, device=device)
                row = growth.expand(
                    chances,
                    owners,
                    tokens,
                    start,
                    count,
                    expanded,
                    least,
                    drafted,
                    parents,
                    candidate,
                    rows,
                )
                if self._weighs(draft):
                    reached = chances.gather(1, candidate.gather(1, at - 1)).where(row > 0, 0.0).sum()
                    worth = reached >= LEVEL * draft.cost * batch
                    row = row.where(worth, -1)
                    drafted.scatter_(1, at - 1, drafted.gather(1, at - 1).where(worth, -1))
                tree = TokenTree(drafted[:, :reach], parents[:, :reach], level)
                request = every.repeat_interleave(expanded)
                logits = draft.extend(tree, request, at.flatten())
            if draft.kept is not None:
                row = row.where(draft.kept.view(row.shape), -1)
            confidence = _confidence(ctx, draft, logits, request)
            considered = min(max(children, CONSIDERED), logits.shape[1])
            found, scores = likeliest(logits, request, torch.full_like(request, level), considered)
            if ctx.deferring is not None and confidence is not None:
                sure.scatter_(1, at, confidence.view(row.shape).where(row >= 0, 0.0))
                scores = _trusted(scores, ctx.deferring.stands(confidence, request))
            growth.adopt(row, found, scores, children, candidate, chances, owners, tokens, links, count)
        best = growth.likeliest_nodes(tokens, links, chances, count, self.num_nodes, budget, least)
        token, parent, chance, chosen = best
        behind = None if ctx.deferring is None else sure.gather(1, owners.gather(1, chosen)) * (token >= 0)
        return TokenTree(token, parent, min(self.max_depth, self.num_nodes), chance=chance, confidence=behind)

    def _grow_looped(
        self, ctx: StepContext, draft: DraftModel, likeliest: Likeliest, budget: int, least: float
    ) -> TokenTree:
        """The same in compiled loops, which run the draft for candidates that exist, and stop where there are none."""
        from vllm_spec_plugins.proposers import loops

        batch = len(ctx.slots)
        most = sum(rows * width for rows, width in zip(self.expanded, self.children, strict=True))
        tokens, links, owners = (np.zeros((batch, most), dtype=np.int64) for _ in range(3))
        chances, count = np.zeros((batch, most), dtype=np.float32), np.zeros(batch, dtype=np.int64)
        drafted = np.full((batch, max(self.num_nodes - 1, 1)), -1, dtype=np.int64)
        parents, candidate = np.zeros_like(drafted), np.empty_like(drafted)
        rows, start, worth = np.zeros(batch, dtype=np.int64), np.zeros(batch, dtype=np.int64), np.float32(least)
        sure = np.zeros((batch, drafted.shape[1] + 1), dtype=np.float32)  # behind the rows of the draft's trees

        logits = draft.begin(ctx)
        request, row = np.arange(batch), np.zeros(batch, dtype=np.int64)
        for level, children in enumerate(self.children):
            if level:
                request, row = loops.expand(
                    chances,
                    owners,
                    tokens,
                    start,
                    count,
                    self.expanded[level],
                    worth,
                    drafted,
                    parents,
                    candidate,
                    rows,
                )
                if not len(request):
                    break
                if self._weighs(draft):
                    reached = chances[request, candidate[request, row - 1]].sum()
                    if reached < LEVEL * draft.cost * batch:
                        break
                width = int(rows.max())
                tree = TokenTree(
                    torch.from_numpy(drafted[:, :width].copy()), torch.from_numpy(parents[:, :width].copy())
                )
                logits = draft.extend(tree, torch.from_numpy(request), torch.from_numpy(row))
            if draft.kept is not None:
                keep = draft.kept.numpy()
                request, row, logits = request[keep], row[keep], logits[draft.kept]
            considered = min(max(children, CONSIDERED), logits.shape[1])
            place = torch.full((len(request),), level, dtype=torch.int64)
            index = torch.from_numpy(request)
            confidence = _confidence(ctx, draft, logits, index)
            found, scores = likeliest(logits, index, place, considered)
            if ctx.deferring is not None and confidence is not None:
                sure[request, row] = confidence.numpy()
                scores = _trusted(scores, ctx.deferring.stands(confidence, index))
            loops.adopt(
                request, row, found.numpy(), scores.numpy(), children, candidate, chances, owners, tokens, links, count
            )
        best = loops.likeliest_nodes(tokens, links, chances, count, self.num_nodes, budget, worth)
        token, parent, chance, chosen = map(torch.from_numpy, best)
        behind = None
        if ctx.deferring is not None:
            above = np.take_along_axis(owners, chosen.numpy(), 1)
            behind = torch.from_numpy(np.take_along_axis(sure, above, 1))
        return TokenTree(token, parent, min(self.max_depth, self.num_nodes), chance=chance, confidence=behind)


def _confidence(ctx: StepContext, draft: DraftModel, logits: Tensor, request: Tensor) -> Tensor | None:
    """[M] float32: how sure the draft is behind each row, if that is asked; a policy knows better than the logits."""
    if ctx.deferring is None:
        return None
    return ctx.deferring.confidence(logits, request) if draft.score is None else draft.score


def _trusted(scores: Tensor, stands: Tensor) -> Tensor:
    """Scores [M, K] whose softmax adds to the first candidate's chance that it `stands` [M] where it is not drawn."""
    first, others = scores.softmax(1).split((1, scores.shape[1] - 1), 1)
    left = 1.0 - stands.unsqueeze(1)
    return torch.cat((1.0 - (1.0 - first) * left, others * left), 1).log()


def _children(
    ctx: StepContext,
    likeliest: Likeliest,
    draft: DraftModel,
    logits: Tensor,
    request: Tensor,
    place: Tensor,
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [M, K] int64 and their chances [M, K] float32, best first; no chance where the draft's answer is not good.
    And how sure the draft was, [M] float32; 0 where nobody asks.
    """
    confidence = _confidence(ctx, draft, logits, request)
    tokens, scores = likeliest(logits, request, place, min(max(count, CONSIDERED), logits.shape[1]))
    if ctx.deferring is not None and confidence is not None:
        scores = _trusted(scores, ctx.deferring.stands(confidence, request))
    chances = scores.softmax(1)[:, :count]
    if draft.kept is not None:
        chances = chances * draft.kept.unsqueeze(1)
    return tokens[:, :count], chances, chances.new_zeros(len(tokens)) if confidence is None else confidence


def _best(
    tokens: Tensor,
    parents: Tensor,
    chances: Tensor,
    sure: Tensor | None,
    nodes: int,
    limit: int,
    least: float,
    max_depth: int,
) -> TokenTree:
    """The `limit` candidates with the largest chances, none below `least`, as a tree; [B, C] each, parents 1-based.

    A child's chance is at most its parent's, and parents stand before their children, so the largest ones, of equals the
    first, are a tree, in this order too.
    """
    batch, count = tokens.shape
    taken = min(nodes, count)
    chance, order = chances.sort(dim=1, descending=True, stable=True)
    chance, order = chance[:, :taken], order[:, :taken]
    place = torch.arange(taken, device=tokens.device)
    kept = (chance >= least) & (chance > 0) & (place < limit)
    row = torch.zeros(batch, count + 1, dtype=torch.int64, device=tokens.device)
    row.scatter_(1, order + 1, (place + 1).expand(batch, -1))
    token = tokens.gather(1, order).masked_fill(~kept, -1)
    parent = row.gather(1, parents.gather(1, order)).masked_fill(~kept, 0)
    rest = (0, nodes - taken)
    return TokenTree(
        pad(token, rest, value=-1),
        pad(parent, rest),
        min(max_depth, nodes),
        chance=pad(chance * kept, rest),
        confidence=None if sure is None else pad(sure.gather(1, order), rest),
    )
