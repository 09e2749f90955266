# SPDX-License-Identifier: Apache-2.0
"""How far a tree is followed, by how its children are chosen and accepted. The tables of docs/acceptance.md.

    python -m tests.models.acceptance              # the tiny target and draft on held-out prompts
    python -m tests.models.acceptance --random     # random distributions

All four ways leave the target's distribution as it is, so all are measured on the same text, drawn from the target with
the engine's noise. At each of its tokens x each way has a chance that x stood among the children and was accepted. For
the walk that is 0 or 1. For the published rules it is the chance given that x was emitted: (chance that x is accepted) /
p(x). A tree has `width` children below every node; the acceptance length from a token on is 1 + the sum over depths of
the product of the chances down to it, averaged over all tokens that have `depth` more behind them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from tests.models.evaluate import prompts
from tests.models.train import HERE
from tests.unit.tree.rules import rrsw_accepts, specinfer_accepts
from vllm_spec_plugins.cpu.kernels.noise import gumbel_argmax, gumbel_topk
from vllm_spec_plugins.tools.acceptance import CHILDREN, LINES, PAIRS, Chances, measure, pair

WAYS = ("coupled children, walk", "RRSw", "MSS", "likeliest children, walk")
WIDTHS = 4
DEPTH = 4


def prompt_ids(count: int, length: int) -> Tensor:
    """[count, length] int64: the beginnings of the first held-out prompts that are long enough."""
    long_enough = [ids[0, :length] for ids in prompts(1 << 30) if ids.shape[1] >= length]
    if len(long_enough) < count:
        raise ValueError(f"{len(long_enough)} prompts have {length} tokens, {count} were asked for")
    return torch.stack(long_enough[:count])


class Model:
    """One checkpoint with a K/V cache: logits [B, V] behind the last of the tokens given, float32."""

    def __init__(self, directory: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.cache = DynamicCache()

    def __call__(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, past_key_values=self.cache, use_cache=True).logits[:, -1]


@torch.inference_mode()
def chances(prompt: Tensor, tokens: int, temperature: float, seed: int, directory: Path = HERE) -> Tensor:
    """[len(WAYS), WIDTHS, B, tokens]: the chance of each drawn token to be accepted, for prompts [B, P]."""
    target, draft = Model(directory / "target"), Model(directory / "draft")
    rng = torch.Generator().manual_seed(seed)
    batch, length = prompt.shape
    heat = np.full(batch, temperature, np.float32)
    seeds = seed + np.arange(batch)
    out = torch.zeros(len(WAYS), WIDTHS, batch, tokens)
    ids = prompt
    for step in range(tokens):
        logits, guess = target(ids) / temperature, draft(ids) / temperature
        position = np.full(batch, length + step - 1)  # of the row that draws, as in the engine
        drawn = torch.from_numpy(gumbel_argmax(logits.numpy(), None, seeds, position, drafting=False, fp64=False)[0])
        ids = drawn.unsqueeze(1)
        coupled = torch.from_numpy(gumbel_topk(guess.numpy(), heat, seeds, position, WIDTHS)[0])
        likeliest = guess.topk(WIDTHS).indices
        p, q = logits.softmax(-1), guess.softmax(-1)
        published = rrsw_accepts(p, q, WIDTHS, rng), specinfer_accepts(p, q, WIDTHS)
        for way, children in ((0, coupled), (3, likeliest)):
            out[way, :, :, step] = (children == ids).cummax(1).values.T.float()
        for way, accepted in zip((1, 2), published, strict=True):
            out[way, :, :, step] = torch.cat([each.gather(1, ids) for each in accepted], 1).T / p.gather(1, ids).T
    return out


def acceptance_lengths(chance: Tensor, depth: int = DEPTH) -> Tensor:
    """[..., B]: the mean acceptance length of trees of `depth` levels, from chances [..., B, tokens]."""
    down = chance.unfold(-1, depth, 1).cumprod(-1)  # [..., B, starts, depth]
    return 1 + down.sum(-1).mean(-1)


def random_pairs(line: tuple[int, float], samples: int, seed: int) -> tuple[Chances, Tensor, Tensor]:
    """One line of `vllm-spec bench acceptance`, and RRSw and MSS [len(CHILDREN)] on the same pairs."""
    (found,) = measure(samples, seed, [line])
    rng, same = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    published = torch.zeros(2, max(CHILDREN))
    for _ in range(PAIRS):
        p, q = pair(*line, same)
        many = rrsw_accepts(p.expand(samples, -1), q.expand(samples, -1), max(CHILDREN), rng)
        for row, accepted in enumerate((many, specinfer_accepts(p[None], q[None], max(CHILDREN)))):
            published[row] += torch.stack([mass.sum(1).mean() for mass in accepted]) / PAIRS
    rrsw, specinfer = published[:, [k - 1 for k in CHILDREN]]
    return found, rrsw, specinfer


def random_table(samples: int, seed: int) -> Iterator[str]:
    """Lines of Markdown."""
    yield "| vocabulary, similarity | coupled + walk | RRSw | MSS | likeliest of q + walk | 1 - TV(p, q) |"
    yield "|---|---|---|---|---|---|"
    for line in LINES:
        found, rrsw, specinfer = random_pairs(line, samples, seed)
        columns = (found.coupled, rrsw.tolist(), specinfer.tolist(), found.likeliest, (found.overlap,))
        cells = (" / ".join(f"{value:.3f}" for value in column) for column in columns)
        yield f"| {line[0]}, {line[1]} | {' | '.join(cells)} |"


def family_table(prompt: Tensor, tokens: int, seed: int) -> Iterator[str]:
    """Lines of Markdown: mean over prompts and, in brackets, its standard error."""
    yield f"| T | children of a node | {' | '.join(f'width {width + 1}' for width in range(WIDTHS))} |"
    yield "|---" * (WIDTHS + 2) + "|"
    for temperature in (0.3, 0.8, 1.0):
        lengths = acceptance_lengths(chances(prompt, tokens, temperature, seed))  # [ways, widths, B]
        error = lengths.std(-1) / prompt.shape[0] ** 0.5
        for way, name in enumerate(WAYS):
            cells = (f"{mean:.2f} ({se:.2f})" for mean, se in zip(lengths.mean(-1)[way], error[way], strict=True))
            yield f"| {temperature} | {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--random", action="store_true", help="random distributions in place of models")
    parser.add_argument("--samples", type=int, default=20000, help="random: draws per pair")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--length", type=int, default=48, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens drawn behind each prompt")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    lines = (
        random_table(args.samples, args.seed)
        if args.random
        else family_table(prompt_ids(args.prompts, args.length), args.tokens, args.seed)
    )
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    main()
