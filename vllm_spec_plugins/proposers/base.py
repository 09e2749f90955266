# SPDX-License-Identifier: Apache-2.0
"""What every proposer is given and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from vllm_spec_plugins.tree.tree import TokenTree

# (guesses of the target's logits [M, V] float32, their requests [M], places behind the root [M], K) -> tokens [M, K] int64
# and scores [M, K] float32, best first.
Likeliest = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Deferring:
    """What a cascade asks of its cheap stage (cascade/).

    Attributes:
        confidence: (guesses of the target's logits [M, V], their requests [M]) -> [M] float32, the largest probability
            after temperature and filters. The guesses stay as they are.
        stands: (confidence [M], requests [M]) -> [M] float32: the chance, known or measured, that a rule keeps the first
            candidate there though the target does not draw it.
    """

    confidence: Callable[[Tensor, Tensor], Tensor]
    stands: Callable[[Tensor, Tensor], Tensor]

    def take(self, index: Tensor) -> Deferring:
        """The same of requests `index` [n] int64 of the batch."""
        return Deferring(
            lambda logits, request: self.confidence(logits, index[request]),
            lambda confidence, request: self.stands(confidence, index[request]),
        )


@dataclass(eq=False)
class StepContext:
    """What is known after a step: B requests in the batch, R request rows, N nodes per tree. All on the device.

    Attributes:
        slots: [B] int64, each request's row in the per-request state.
        token_ids: [R, max_len] int32; token_ids[slot, :length] are the request's known tokens.
        lengths: [B] int64, known tokens; the next root is token_ids[slot, length - 1].
        max_length: host-side upper bound of `lengths` (spares a synchronisation).
        num_emitted: [B] int64, tokens that this step emitted; 0 = still inside the prompt, its tree is not used.
        drawn: [B, N + 1] int64, the target's draw at each row of `tree`; -1 where no row was computed. None unless the
            proposer `reads_draws`.
        tree: the tree that was verified in this step, after any cut by the scheduler; None with `drawn`.
        hidden: [B, H], the target's last hidden state at the row that drew the new root. None unless the proposer
            `reads_hidden`.
        likeliest: the tokens that the target's sampler would prefer where a draft guesses its logits: after temperature and
            filters, with the noise that it will draw with ("coupled children"). Requests are indices into the batch; place 0
            is the row of the root, which draws the token behind it. Scores are logit + temperature * noise. The guesses may
            be overwritten.
        budget: at most this many nodes may be proposed; None = N.
        deferring: trees must say how sure their draft was (`TokenTree.confidence`); None = nobody asks.
    """

    slots: Tensor
    token_ids: Tensor
    lengths: Tensor
    max_length: int
    num_emitted: Tensor
    drawn: Tensor | None = None
    tree: TokenTree | None = None
    hidden: Tensor | None = None
    likeliest: Likeliest | None = None
    budget: int | None = None
    deferring: Deferring | None = None

    def take(self, index: Tensor) -> StepContext:
        """What is known of requests `index` [n] int64 of the batch."""
        tree, likeliest = self.tree, self.likeliest
        return replace(
            self,
            slots=self.slots[index],
            lengths=self.lengths[index],
            num_emitted=self.num_emitted[index],
            drawn=None if self.drawn is None else self.drawn[index],
            tree=None if tree is None else TokenTree(tree.tokens[index], tree.parents[index], tree.max_depth),
            hidden=None if self.hidden is None else self.hidden[index],
            likeliest=likeliest and (lambda logits, request, *rest: likeliest(logits, index[request], *rest)),
            deferring=self.deferring and self.deferring.take(index),
        )


class DraftModel(Protocol):
    """What guesses the target's logits: a small language model beside it, or part of the target itself.

    Attributes:
        cost: of a forward pass, in those of the target; 0.0 where it is small or not known.
        kept: [M] bool, of the rows of the last call: an exit policy finds the answer good, so that its children may be drafted.
            None: no policy is asked.
        score: [M] float32, of the rows of the last call: an exit policy's, for a cascade. None: no policy is asked.
    """

    cost: float
    kept: Tensor | None
    score: Tensor | None

    def begin(self, ctx: StepContext) -> Tensor:
        """Read what each request has got since the last call: [B, V] float32, the logits behind the roots.

        K/V of the nodes that `extend` was given, and whose tokens have come, is kept.
        """
        ...

    def extend(self, tree: TokenTree, request: Tensor, row: Tensor) -> Tensor:
        """[M, V] float32: the logits behind rows `row` [M] of the trees of `request` [M], grown below the roots of `begin`.

        Each row is given once, after its parents; a tree has at most as many nodes as the proposer's, less one. Where the host
        does not know which rows there are, as many of every request are given, request by request; absent ones (token -1) are
        among them, and nothing is made of their logits.
        """
        ...


class Proposer(Protocol):
    """Proposes a tree of likely continuations per request.

    Every tensor-parallel rank runs the proposer and must come to the same tree: no rank-local randomness, nothing
    that depends on timing.

    Attributes:
        name: as written in settings and metrics.
        num_nodes: N, the fixed number of nodes of every tree it returns.
        max_depth: no node lies deeper.
        reads_draws: it looks at the draws of rows that were not accepted (a CPU draws only what the walk needs, if not).
        reads_hidden: it looks at the target's hidden states.
        remembers: it must be asked after every step, also when no tree can be used, or it loses the thread.
    """

    name: str
    num_nodes: int
    max_depth: int
    reads_draws: bool
    reads_hidden: bool
    remembers: bool

    def add_request(self, slot: int, prompt_len: int) -> None:
        """Forget whatever is known of row `slot`: a new request has moved in."""
        ...

    def propose(self, ctx: StepContext) -> TokenTree:
        """Trees of shape [B, num_nodes] below each request's last token."""
        ...


class Count(NamedTuple):
    """Something that is counted beside acceptance.

    Attributes:
        name: of the metric (behind "vllm:spec_plugin_") and in the log.
        doc: one line on what is counted.
        per: the name of another count; the log shows this one per that one.
    """

    name: str
    doc: str
    per: str = ""


@runtime_checkable
class Counting(Protocol):
    """A proposer that counts something of its own; `counts` is part of its class."""

    counts: tuple[Count, ...]

    def take_counts(self) -> Tensor:
        """[len(counts)] int64 on the device: what was counted since last asked."""
        ...


def least_chance(min_chance: float, batch: int) -> float:
    """Chance of acceptance at which a node pays for its row when `batch` requests share the step.

    A step costs 1 + r * rows, so a row more is worth its chance of a token if that exceeds the tokens per cost of
    plain decoding: r * B / (1 + r * B). `min_chance` is that for one request, and tells r: min_chance of .12 is
    .52 for eight requests, and goes to 1 under load, where rows are all that a step costs.
    """
    share = batch * min_chance
    return share / (1.0 - min_chance + share) if share else 0.0
