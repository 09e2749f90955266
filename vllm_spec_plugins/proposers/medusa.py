# SPDX-License-Identifier: Apache-2.0
"""Medusa heads as token trees.

Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads", arXiv 2401.10774. Head k
predicts the token k + 1 places behind the last one from the hidden state that the last one was drawn from. A sampled
request's candidates are ranked with the noise that the target will draw with at their place ("coupled children"), so the
walk finds its draw among them as often as any published rule accepts, and the output stays plain decoding's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from vllm_spec_plugins.proposers.base import Likeliest, StepContext, least_chance
from vllm_spec_plugins.tree.builders import chosen, ranked
from vllm_spec_plugins.tree.ranks import Ranks
from vllm_spec_plugins.tree.topology import from_choices
from vllm_spec_plugins.tree.tree import TokenTree

# Share of the newest step in what is usual, and the largest chance that a candidate is given.
FADING, MOST = 0.05, 0.98


class HeadsError(ValueError):
    """A checkpoint that does not hold Medusa heads for this model; the message says what it holds."""


@dataclass(frozen=True)
class HeadShapes:
    """What a checkpoint of heads holds, told from the shapes of its tensors alone: configs misstate it.

    Attributes:
        heads: heads that have a residual block and a matrix to the vocabulary (own, or the one that all share).
        layers: residual layers per head.
        hidden: width of the hidden state.
        vocab: rows of the matrices to the vocabulary; padding included.
    """

    heads: int
    layers: int
    hidden: int
    vocab: int

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]]) -> HeadShapes:
        """From tensor names (of either public layout) and shapes. Raises HeadsError."""
        named = {place: tuple(shape) for name, shape in shapes.items() if (place := _place(name)) is not None}
        blocks = {(head, layer): shape for (kind, head, layer), shape in named.items() if kind == "weight"}
        outs = {head: shape for (kind, head, _), shape in named.items() if kind == "out"}
        heads = len({head for head, _ in blocks})
        if not blocks or {head for head, _ in blocks} != set(range(heads)):
            raise HeadsError(f"no Medusa heads among its tensors ({', '.join(sorted(shapes)[:4])} ...)")
        layers = len(blocks) // heads
        if {layer for _, layer in blocks} != set(range(layers)) or len(blocks) != heads * layers:
            raise HeadsError("heads with different numbers of layers")
        hidden = blocks[0, 0][0]
        if any(shape != (hidden, hidden) for shape in blocks.values()):
            raise HeadsError("residual blocks of different widths")
        if not outs or (len(outs) > 1 and set(outs) != set(range(heads))):
            raise HeadsError(f"{len(outs)} matrices to the vocabulary for {heads} heads")
        vocab = next(iter(outs.values()))[0]
        if any(shape != (vocab, hidden) for shape in outs.values()):
            raise HeadsError("matrices to the vocabulary of different shapes")
        return cls(heads, layers, hidden, vocab)


def _place(name: str) -> tuple[str, int, int] | None:
    """("weight" or "bias" of a residual layer, "out" of a head; head; layer) of a tensor name; None for others.

    vLLM's layout: blocks.0.layers.0.weight, lm_heads.0.weight (lm_head.weight when shared). The original repository's:
    0.0.linear.weight (residual), 0.1.weight (to the vocabulary), behind medusa_head. or medusa_heads. in some files.
    """
    parts = name.removeprefix("medusa_heads.").removeprefix("medusa_head.").split(".")
    if parts[0] == "blocks" and len(parts) == 5 and parts[2] == "layers":
        return parts[4], int(parts[1]), int(parts[3])
    if parts[0] == "lm_heads" and parts[-1] == "weight":
        return "out", int(parts[1]), 0
    if parts == ["lm_head", "weight"]:
        return "out", 0, 0
    if len(parts) >= 3 and parts[0].isdigit() and parts[1].isdigit():
        if parts[2] == "linear":
            return parts[3], int(parts[0]), int(parts[1])
        return "out", int(parts[0]), 0
    return None


class MedusaHeads:
    """The first `count` heads, ready to run.

    Args:
        weights: names and tensors of a checkpoint, either public layout.
        count: heads to keep.
        vocab: tokens of the target; what a padded matrix has beyond them is dropped.
        device, dtype: of the target's hidden states.
    """

    def __init__(
        self, weights: Iterable[tuple[str, Tensor]], count: int, vocab: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        tensors = {place: tensor for name, tensor in weights if (place := _place(name)) is not None}
        shapes = HeadShapes.of({_name(place): tuple(tensor.shape) for place, tensor in tensors.items()})
        if shapes.heads < count:
            raise HeadsError(f"{shapes.heads} heads, {count} are asked for")
        self.count = count

        def stacked(kind: str, layer: int) -> Tensor:
            return torch.stack([tensors[kind, head, layer] for head in range(count)]).to(device, dtype)

        # [K, H, H] and [K, 1, H] per layer: all heads in one batched product.
        self.layers = [stacked("weight", layer).transpose(1, 2).contiguous() for layer in range(shapes.layers)]
        with_bias = ("bias", 0, 0) in tensors
        self.biases = [stacked("bias", layer).unsqueeze(1) if with_bias else None for layer in range(shapes.layers)]
        # [V, H] per head, or one for all of them.
        own = [tensors["out", head, 0] for head in range(count) if ("out", head, 0) in tensors]
        self.outs = [out[:vocab].to(device, dtype).contiguous() for out in own]
        self._logits = self.outs[0].new_empty(0)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[B, H] hidden states -> [B, K, V] float32 logits, in memory that the next call writes again."""
        batch, vocab = len(hidden), len(self.outs[0])
        if len(self._logits) < batch:
            self._logits = hidden.new_empty(batch, self.count, vocab)
        logits = self._logits[:batch]
        x = hidden.expand(self.count, -1, -1)  # [K, B, H]
        for weight, bias in zip(self.layers, self.biases, strict=True):
            out = torch.bmm(x, weight)
            x = x + silu(out if bias is None else out + bias)
        if len(self.outs) == 1:
            rows = x.transpose(0, 1).reshape(batch * self.count, -1)
            torch.mm(rows, self.outs[0].T, out=logits.view(batch * self.count, vocab))
        else:
            for k, out in enumerate(self.outs):
                torch.mm(x[k], out.T, out=logits[:, k])
        return logits.float()


def _name(place: tuple[str, int, int]) -> str:
    """vLLM's name of a place."""
    kind, head, layer = place
    return f"lm_heads.{head}.weight" if kind == "out" else f"blocks.{head}.layers.{layer}.{kind}"


class MedusaProposer:
    """The best tree of the heads' candidates under a node budget, by measured chance of acceptance; or a fixed tree.

    Args:
        heads: None: only the shape of the trees is asked for.
        max_requests: R, rows of the per-request state.
        nodes: N, nodes per tree.
        depth: D, heads in use and depth of the tree.
        ranks: K, candidates per head.
        min_chance: as for LookaheadProposer.
        choices: a fixed tree in place of the grown one, as paths of ranks (section 2.1.2); `nodes`, `depth`, `ranks` and
            `min_chance` do not count then.
    """

    name = "medusa"
    reads_draws = remembers = False
    reads_hidden = True

    def __init__(
        self,
        heads: MedusaHeads | None,
        *,
        max_requests: int,
        device: torch.device | str = "cpu",
        nodes: int = 16,
        depth: int = 4,
        ranks: int = 8,
        min_chance: float = 0.03,
        choices: Iterable[Sequence[int]] = (),
    ) -> None:
        self.heads, self.min_chance = heads, min_chance
        self.num_nodes, self.max_depth, per_depth = nodes, min(depth, nodes), min(ranks, nodes)
        self.topology = from_choices(choices)
        if self.topology.num_nodes:
            self.num_nodes, self.max_depth = self.topology.num_nodes, self.topology.max_depth
            per_depth = max(self.topology.ranks) + 1
        self.ranks = Ranks(max_requests, self.max_depth, per_depth, torch.device(device))
        # [D, K], the softmax of each rank's score, averaged over requests and recent steps.
        self.usual = torch.full((self.ranks.depth, self.ranks.per_depth), 1.0 / self.ranks.per_depth, device=device)

    def add_request(self, slot: int, prompt_len: int) -> None:
        """A new request in row `slot`: what was proposed to the last one is not counted."""
        self.ranks.clear(slot)

    def propose(self, ctx: StepContext) -> TokenTree:
        """Count what became of the last candidates, then the next tree."""
        self.ranks.observe(ctx)
        assert self.heads is not None and ctx.hidden is not None and ctx.likeliest is not None
        candidates, confidence = self._candidates(self.heads(ctx.hidden), ctx.likeliest)
        self.ranks.offer(ctx.slots, ctx.lengths, candidates)
        budget = self.num_nodes if ctx.budget is None else min(ctx.budget, self.num_nodes)
        # The measured chance of a rank, more where the head is surer than it usually is there.
        chance = (self.ranks.chance(ctx.slots) * confidence / self.usual).clamp_(max=MOST)
        self.usual += FADING * (confidence.mean(0) - self.usual)
        if self.topology.num_nodes:
            return chosen(self.topology, candidates, chance, budget)
        return ranked(candidates, chance, self.num_nodes, budget, least_chance(self.min_chance, len(ctx.slots)))

    def _candidates(self, guesses: Tensor, likeliest: Likeliest) -> tuple[Tensor, Tensor]:
        """From the heads' logits [B, D, V]: tokens [B, D, K] int64, and the softmax [B, D, K] of their scores."""
        batch, depth = guesses.shape[:2]
        request = torch.arange(batch, device=guesses.device).repeat_interleave(depth)
        place = torch.arange(depth, device=guesses.device).repeat(batch)
        tokens, scores = likeliest(guesses.flatten(0, 1), request, place, self.ranks.per_depth)
        return tokens.view(batch, depth, -1), scores.view(batch, depth, -1).softmax(2)
