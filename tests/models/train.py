# SPDX-License-Identifier: Apache-2.0
"""Trains the tiny target on a CPU: full loss plus early exits, layer dropout, Muon. Resumes where it was killed.

    python -m tests.models.corpus --workdir DIR
    python -m tests.models.train --workdir DIR --tokens 7000000 --export target

The learning rate stays constant until the last `--decay` of `--tokens`, so a run can be extended, or ended sooner, by
starting it again with another `--tokens`.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.models.corpus import load_stream
from tests.models.llama import Llama, Shape, save_checkpoint
from tests.models.muon import Muon, schedule

HERE = Path(__file__).resolve().parent
EXITS = (2, 4, 6)
EXIT_WEIGHT = 0.15
EXIT_SHARE = 4  # every exit is trained on one position in four
MAX_LAYER_DROPOUT = 0.1
TARGET = Shape()


@dataclass
class Progress:
    """How far a run has come."""

    tokens: int = 0
    window: int = 0
    step: int = 0
    seconds: float = 0.0


class Batches:
    """Windows of `seq` + 1 tokens in an order that depends on (seed, epoch) alone, so that a run can be resumed."""

    def __init__(self, stream: np.ndarray, seq: int, seed: int) -> None:
        self.stream, self.seq, self.seed = stream, seq, seed
        self.count = (len(stream) - 1) // seq - 1
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    def at(self, window: int) -> np.ndarray:
        epoch, index = divmod(window, self.count)
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self.epoch, self.offset = epoch, int(rng.integers(self.seq))
            self.order = rng.permutation(self.count)
        start = int(self.order[index]) * self.seq + self.offset
        return self.stream[start : start + self.seq + 1]

    def take(self, first: int, batch: int) -> tuple[Tensor, Tensor]:
        """ids and targets [batch, seq] int64 of windows first .. first + batch - 1."""
        rows = torch.from_numpy(np.stack([self.at(first + i) for i in range(batch)]).astype(np.int64))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def family_loss(model: Llama, ids: Tensor, targets: Tensor, exits: tuple[int, ...], rng: random.Random) -> list[Tensor]:
    """[exit losses ..., full loss]; layers are dropped with a probability that grows with depth."""
    layers = model.shape.layers
    dropped = frozenset(i for i in range(layers) if exits and rng.random() < MAX_LAYER_DROPOUT * i / (layers - 1))
    states = model.hidden(ids, exits, dropped)
    losses = []
    flat = targets.flatten()
    for x in states[:-1]:
        picked = slice(rng.randrange(EXIT_SHARE), None, EXIT_SHARE)
        losses.append(model.loss_fn(x.flatten(0, 1)[picked].contiguous(), model.norm, model.head, flat[picked]))
    losses.append(model.loss_fn(states[-1].flatten(0, 1), model.norm, model.head, flat))
    return losses


@torch.no_grad()
def heldout_loss(model: Llama, stream: np.ndarray, seq: int, windows: int) -> float:
    """Mean loss in nats per token over `windows` evenly spaced windows of held-out text."""
    starts = np.linspace(0, len(stream) - seq - 2, windows).astype(int)
    total = 0.0
    for chunk in np.array_split(starts, max(1, windows // 8)):
        rows = torch.from_numpy(np.stack([stream[s : s + seq + 1] for s in chunk]).astype(np.int64))
        x = model.hidden(rows[:, :-1])[-1]
        total += model.loss_fn(x.flatten(0, 1), model.norm, model.head, rows[:, 1:].flatten()).item() * len(chunk)
    return total / windows


def optimizers(model: Llama, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    matrices = [w for name, w in model.weights.items() if "layers" in name and w.ndim == 2]
    embedding = model["model.embed_tokens.weight"]
    rest = [w for name, w in model.weights.items() if w is not embedding and not ("layers" in name and w.ndim == 2)]
    groups: list[dict[str, Any]] = [{"params": [embedding], "lr": 2 * adam_lr}, {"params": rest}]
    adam = torch.optim.AdamW(groups, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [Muon(matrices, lr=muon_lr), adam]


def train(args: argparse.Namespace, shape: Shape, exits: tuple[int, ...]) -> None:
    torch.manual_seed(args.seed)
    run = args.workdir / args.name
    run.mkdir(parents=True, exist_ok=True)
    (run / "pid").write_text(f"{os.getpid()}\n")
    model = Llama(shape, torch.Generator().manual_seed(args.seed))
    opts = optimizers(model, args.muon_lr, args.adam_lr)
    base = [[g["lr"] for g in o.param_groups] for o in opts]
    progress = Progress()
    state_file = run / "state.pt"
    if state_file.exists():
        state = torch.load(state_file)
        model.load_state_dict(state["model"])
        for o, s in zip(opts, state["opts"], strict=True):
            o.load_state_dict(s)
        progress = Progress(**state["progress"])
    if not args.no_compile:
        model.compile()
    batches = Batches(load_stream(args.workdir, "train"), args.seq, args.seed)
    heldout = load_stream(args.workdir, "heldout")
    print(f"{sum(w.numel() for w in model.weights.values()):,} parameters, starting at {progress}", flush=True)

    def save() -> None:
        state = {"model": model.state_dict(), "opts": [o.state_dict() for o in opts], "progress": asdict(progress)}
        torch.save(state, run / "state.tmp")
        (run / "state.tmp").replace(state_file)  # atomic: a kill leaves the old or the new state
        save_checkpoint(model, run / "export.tmp")
        shutil.copytree(args.workdir / "tokenizer", run / "export.tmp", dirs_exist_ok=True)
        shutil.rmtree(run / "export", ignore_errors=True)
        (run / "export.tmp").replace(run / "export")

    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    began = logged = saved = time.monotonic()
    base_seconds, mean, since = progress.seconds, None, 0
    per_step = args.batch * args.accumulate * args.seq
    while progress.tokens < args.tokens and not stop:
        rng = random.Random(args.seed * 1_000_003 + progress.step)
        values = torch.zeros(len(exits) + 1)
        for _ in range(args.accumulate):
            losses = family_loss(model, *batches.take(progress.window, args.batch), exits, rng)
            (losses[-1] + EXIT_WEIGHT * sum(losses[:-1])).div(args.accumulate).backward()
            values += torch.tensor([x.item() for x in losses]) / args.accumulate
            progress.window += args.batch
        factor = min(schedule(progress.tokens / args.tokens, args.decay), (progress.step + 1) / args.warmup)
        for o, rates in zip(opts, base, strict=True):
            for group, rate in zip(o.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            o.step()
            o.zero_grad(set_to_none=True)
        progress.tokens += per_step
        progress.step += 1
        since += per_step
        mean = values if mean is None else mean.lerp(values, 0.05)
        now = time.monotonic()
        progress.seconds = base_seconds + now - began
        if now - logged > args.log_every or args.verbose:
            shown = " ".join(f"{v:.3f}" for v in mean)
            print(
                f"{time.strftime('%H:%M:%S')} step {progress.step} tokens {progress.tokens:,} "
                f"lr x{factor:.2f} loss {shown} {since / (now - logged):.0f} tok/s",
                flush=True,
            )
            logged, since = now, 0
        if now - saved > args.save_every or progress.step == args.first_save:
            save()
            if now - saved > args.save_every:
                print(f"  held-out {heldout_loss(model, heldout, args.seq, 64):.4f}", flush=True)
            saved = time.monotonic()
    save()
    print(f"end: {progress}, held-out {heldout_loss(model, heldout, args.seq, 256):.4f}", flush=True)
    if args.export and not stop:
        shutil.copytree(run / "export", HERE / args.export, dirs_exist_ok=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="where corpus.py put its output")
    parser.add_argument("--name", default="target", help="folder of this run below --workdir")
    parser.add_argument("--tokens", type=int, default=7_000_000, help="length of the run")
    parser.add_argument("--decay", type=float, default=0.25, help="share of the run in which the rate falls to zero")
    parser.add_argument("--warmup", type=int, default=40, help="steps")
    parser.add_argument("--batch", type=int, default=8, help="windows per forward pass")
    parser.add_argument("--accumulate", type=int, default=2, help="forward passes per step")
    parser.add_argument("--seq", type=int, default=256, help="tokens per window")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.004)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=float, default=30, help="seconds")
    parser.add_argument("--save-every", type=float, default=240, help="seconds")
    parser.add_argument("--first-save", type=int, default=60, help="also save after this step")
    parser.add_argument("--export", help="folder beside this file that gets the finished checkpoint")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--verbose", action="store_true", help="log every step")
    return parser.parse_args(argv)


if __name__ == "__main__":
    train(parse(), TARGET, EXITS)
