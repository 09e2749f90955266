# SPDX-License-Identifier: Apache-2.0
"""Quality of the tiny model family on held-out text.

    python -m tests.models.evaluate --workdir DIR          # held-out files of the corpus
    python -m tests.models.evaluate                        # the committed prompts: short contexts, so higher losses

Losses are nats per token of the text; "top-1" and "top-5" say how often the text's token is the model's first guess or
among its first five. "Agreement" is how often a draft's first guess is the full model's, and "overlap" is 1 - TV(p, q):
how often a draft token sampled at temperature 1 is accepted by speculative sampling.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.models.corpus import PROMPTS, load_stream
from tests.models.distill import HEADS, MedusaHeads, medusa_head
from tests.models.llama import load_checkpoint, rms_norm
from tests.models.train import EXITS, HERE

Sums = dict[str, list[float]]  # name -> [sum over tokens, tokens]


def windows(stream: np.ndarray, seq: int, count: int) -> Iterator[Tensor]:
    """`count` evenly spaced windows [1, seq + 1] int64 of a token stream."""
    for start in np.linspace(0, len(stream) - seq - 2, count).astype(int):
        yield torch.from_numpy(stream[start : start + seq + 1].astype(np.int64))[None]


def prompts(count: int) -> Iterator[Tensor]:
    """The first `count` committed prompts [1, n] int64."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(HERE / "target")
    with PROMPTS.open() as lines:
        for _, line in zip(range(count), lines, strict=False):
            yield torch.tensor([tokenizer(json.loads(line)["prompt"])["input_ids"]])


def add(sums: Sums, name: str, values: Tensor) -> None:
    total = sums.setdefault(name, [0.0, 0])
    total[0] += values.double().sum().item()
    total[1] += values.numel()


def add_hits(sums: Sums, name: str, logits: Tensor, text: Tensor) -> None:
    """How often the text's token is the most likely one, and among the five most likely."""
    hit = logits.topk(5).indices == text[:, None]
    add(sums, f"{name}/top-1", hit[:, 0])
    add(sums, f"{name}/top-5", hit.any(-1))


@torch.inference_mode()
def evaluate(rows: Iterator[Tensor], directory: Path = HERE, followers: bool = True) -> dict[str, float]:
    """Mean figures over `rows` of token ids [1, n + 1] for the family in `directory`; without followers, the target."""
    target = load_checkpoint(directory / "target")
    draft = load_checkpoint(directory / "draft") if followers else None
    heads = MedusaHeads.load(directory / "medusa") if followers else None
    sums: Sums = {}
    for row in rows:
        ids, text = row[:, :-1], row[0, 1:]
        *shallow, last = target.hidden(ids, EXITS)
        h = rms_norm(last[0], target.norm)
        full = F.log_softmax(F.linear(h, target.head), dim=-1)
        add(sums, "full/loss", F.nll_loss(full, text, reduction="none"))
        add_hits(sums, "full", full, text)
        others = {
            f"exit {n}": F.linear(rms_norm(x[0], target.norm), target.head) for n, x in zip(EXITS, shallow, strict=True)
        }
        if draft is not None:
            others["draft"] = draft.logits(ids)[0]
        for name, logits in others.items():
            q = F.log_softmax(logits, dim=-1)
            add(sums, f"{name}/loss", F.nll_loss(q, text, reduction="none"))
            add_hits(sums, name, q, text)
            add(sums, f"{name}/agreement", q.argmax(-1) == full.argmax(-1))
            add(sums, f"{name}/overlap", torch.minimum(q.exp(), full.exp()).sum(-1))
        if heads is not None:
            for k in range(1, HEADS + 1):
                q = F.log_softmax(medusa_head(h[:-k], heads.w1[k - 1], heads.w2[k - 1]), dim=-1)
                add(sums, f"head {k}/loss", F.nll_loss(q, text[k:], reduction="none"))
                add_hits(sums, f"head {k}", q, text[k:])
                add(sums, f"head {k}/agreement", q.argmax(-1) == full[k:].argmax(-1))
                add(sums, f"head {k}/overlap", torch.minimum(q.exp(), full[k:].exp()).sum(-1))
    return {name: total / count for name, (total, count) in sums.items()} | {"tokens": sums["full/loss"][1]}


def table(figures: dict[str, float]) -> str:
    """The figures as a Markdown table: one line per exit, draft and head."""
    columns = ("loss", "top-1", "top-5", "agreement", "overlap")
    names = list(dict.fromkeys(key.split("/")[0] for key in figures if "/" in key))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        cells = [figures.get(f"{name}/{c}") for c in columns]
        lines.append(f"| {name} | " + " | ".join("" if c is None else f"{c:.3f}" for c in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workdir", type=Path, help="where corpus.py put its output; left out: the committed prompts")
    parser.add_argument("--directory", type=Path, default=HERE, help="folder that holds target/, draft/ and medusa/")
    parser.add_argument("--target-only", action="store_true")
    parser.add_argument("--seq", type=int, default=256, help="tokens per window")
    parser.add_argument("--windows", type=int, default=256, help="windows, or prompts, to read")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = (
        windows(load_stream(args.workdir, "heldout"), args.seq, args.windows) if args.workdir else prompts(args.windows)
    )
    figures = evaluate(rows, args.directory, not args.target_only)
    print(json.dumps(figures) if args.json else f"{figures['tokens']:,} tokens\n\n{table(figures)}")


if __name__ == "__main__":
    main()
