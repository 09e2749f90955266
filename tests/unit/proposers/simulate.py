# SPDX-License-Identifier: Apache-2.0
"""An engine in 100 lines: propose, verify by the walk, commit, against any next-token function.

It batches, chunks prompts, cuts trees, hands freed slots to new requests and leaves garbage behind every text, as a
real engine does; every row is verified by asking the target for the token after the row's own path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_spec_plugins.proposers import Proposer, StepContext
from vllm_spec_plugins.tree import TokenTree, Walk

# (request, text so far, node tokens, node parents) -> the target's draw at the root and at every node
Target = Callable[[int, list[int], list[int], list[int]], list[int]]


def from_next_token(next_token: Callable[[int, list[int]], int]) -> Target:
    """A target from a function (request, text) -> next token: each row is recomputed from its whole path."""

    def target(request: int, text: list[int], tokens: list[int], parents: list[int]) -> list[int]:
        texts = [text]
        for token, parent in zip(tokens, parents, strict=True):
            texts.append([*texts[parent], token])
        return [next_token(request, row) for row in texts]

    return target


def plain(
    next_token: Callable[[int, list[int]], int], request: int, prompt: list[int], max_new: int, eos: int
) -> list[int]:
    """Plain decoding."""
    text = list(prompt)
    while len(text) < len(prompt) + max_new and (len(text) == len(prompt) or text[-1] != eos):
        text.append(next_token(request, text))
    return text[len(prompt) :]


@dataclass
class Outcome:
    """What a simulation did. `steps` counts verification steps of each request, its prefill left out."""

    outputs: list[list[int]]
    proposed: list[list[list[tuple[int, int]]]]
    steps: int = 0
    emitted: int = 0
    nodes: int = 0

    @property
    def tokens_per_step(self) -> float:
        return self.emitted / max(self.steps, 1)

    @property
    def nodes_per_step(self) -> float:
        return self.nodes / max(self.steps, 1)


@dataclass
class Running:
    """A request in a slot."""

    request: int
    text: list[int]
    prompt_len: int
    chunks_left: int
    tree: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))


@torch.inference_mode()
def simulate(
    proposer: Proposer,
    target: Target,
    prompts: Sequence[list[int]],
    *,
    max_new: int,
    slots: int,
    rng: torch.Generator,
    eos: int = -1,
    chunks: int = 1,
    skip: float = 0.0,
    cut: float = 0.0,
    budget: Callable[[], int | None] = lambda: None,
    vocab: int = 50,
) -> Outcome:
    """Decode all prompts.

    Args:
        slots: requests that run at once.
        chunks: steps that a prompt takes.
        skip: chance that a request sits out a step.
        cut: chance that a request's tree is cut to a random length before it is verified.
        budget: what to pass as StepContext.budget, asked every step.
        vocab: garbage behind the texts is drawn from this many tokens.
    """
    max_len = max(map(len, prompts)) + max_new + 1
    token_ids = torch.randint(vocab, (slots, max_len), generator=rng, dtype=torch.int32)
    outcome = Outcome([[] for _ in prompts], [[] for _ in prompts])
    waiting, rows = list(range(len(prompts))), [None] * slots  # type: list[int], list[Running | None]
    walk, nodes = Walk(), proposer.num_nodes
    while waiting or any(rows):
        for slot in range(slots):
            if rows[slot] is None and waiting:
                prompt = prompts[waiting[0]]
                rows[slot] = Running(waiting.pop(0), list(prompt), len(prompt), chunks)
                token_ids[slot] = torch.randint(vocab, (max_len,), generator=rng, dtype=torch.int32)
                token_ids[slot, : len(prompt)] = torch.tensor(prompt)
                proposer.add_request(slot, len(prompt))
        batch = [s for s in range(slots) if rows[s] and torch.rand(1, generator=rng) >= skip]
        if not batch:
            continue
        order = torch.randperm(len(batch), generator=rng).tolist()
        batch = [batch[k] for k in order]
        tokens = torch.full((len(batch), nodes), -1)
        parents = torch.zeros(len(batch), nodes, dtype=torch.int64)
        drawn = torch.full((len(batch), nodes + 1), -1)
        for b, slot in enumerate(batch):
            row = rows[slot]
            row.chunks_left -= row.chunks_left > 0
            if row.chunks_left:
                continue
            kept = len(row.tree[0])
            if torch.rand(1, generator=rng) < cut:
                kept = int(torch.randint(kept + 1, (1,), generator=rng))
            row.tree = (row.tree[0][:kept], row.tree[1][:kept])
            tokens[b, :kept], parents[b, :kept] = torch.tensor(row.tree[0]), torch.tensor(row.tree[1])
            draws = target(row.request, row.text, *row.tree)
            drawn[b, : len(draws)] = torch.tensor(draws)
        tree = TokenTree(tokens, parents, proposer.max_depth)
        tree.validate()
        kept = walk(tree, drawn)
        num_emitted = kept.num_emitted.clone()
        for b, slot in enumerate(batch):
            row = rows[slot]
            new = kept.emitted[b, : int(num_emitted[b])].tolist()
            new = new[: max_new - (len(row.text) - row.prompt_len)]
            if eos in new:
                new = new[: new.index(eos) + 1]
            if new and len(row.text) > row.prompt_len:
                outcome.steps, outcome.emitted = outcome.steps + 1, outcome.emitted + len(new)
                outcome.nodes += len(row.tree[0])
            token_ids[slot, len(row.text) : len(row.text) + len(new)] = torch.tensor(new, dtype=torch.int32)
            row.text += new
            num_emitted[b] = len(new)
        ctx = StepContext(
            slots=torch.tensor(batch),
            token_ids=token_ids,
            lengths=torch.tensor([len(rows[slot].text) for slot in batch]),
            max_length=max(len(rows[slot].text) for slot in batch) + int(torch.randint(3, (1,), generator=rng)),
            num_emitted=num_emitted.to(torch.int32),
            drawn=drawn,
            tree=tree,
            budget=budget(),
        )
        proposed = proposer.propose(ctx)
        proposed.validate()
        assert proposed.tokens.shape == (len(batch), nodes)
        assert proposed.max_depth <= proposer.max_depth
        if ctx.budget is not None:
            assert int(proposed.num_nodes.max()) <= ctx.budget
        for b, slot in enumerate(batch):
            row = rows[slot]
            size = int(proposed.num_nodes[b])
            row.tree = (proposed.tokens[b, :size].tolist(), proposed.parents[b, :size].tolist())
            if int(num_emitted[b]):
                outcome.proposed[row.request].append(list(zip(*row.tree, strict=True)))
            done = len(row.text) - row.prompt_len
            if done >= max_new or (done and row.text[-1] == eos):
                outcome.outputs[row.request] = row.text[row.prompt_len :]
                rows[slot] = None
    return outcome


class MarkovTarget:
    """A target whose next-token scores depend on the last `order` tokens.

    Greedy at temperature 0, else drawn with noise keyed by (request, position), as a seeded request's is.
    """

    def __init__(self, vocab: int, order: int, temperature: float, seed: int, scale: float = 2.0) -> None:
        self.vocab, self.order, self.temperature, self.seed = vocab, order, temperature, seed
        self.scores = scale * torch.randn(1009, vocab, generator=torch.Generator().manual_seed(seed))
        self._noise: dict[tuple[int, int], Tensor] = {}

    def _noise_at(self, request: int, position: int) -> Tensor:
        key = (request, position)
        if key not in self._noise:
            own = torch.Generator().manual_seed(self.seed * 7919 + request * 104729 + position)
            self._noise[key] = -torch.log(-torch.log(torch.rand(self.vocab, generator=own)))
        return self._noise[key]

    def __call__(self, request: int, text: list[int]) -> int:
        state = 0
        for token in text[-self.order :]:
            state = (state * 131 + token + 1) % 1009
        scores = self.scores[state]
        if self.temperature:
            scores = scores / self.temperature + self._noise_at(request, len(text))
        return int(scores.argmax())
