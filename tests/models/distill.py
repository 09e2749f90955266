# SPDX-License-Identifier: Apache-2.0
"""Trains what drafts for the target, in one pass over the text: a small draft model and Medusa heads.

    python -m tests.models.distill --workdir DIR --tokens 2000000

Both learn the frozen target's distributions (soft labels) rather than the text: what counts is agreement with the
target. Medusa head k sees the target's normed hidden state h at position t and predicts the token at t + k + 1 by
W2 (SiLU(W1 h) + h), with W1 = 0 and W2 = the LM head at the start and loss weights .8^k (arXiv 2401.10774).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.models.corpus import load_stream
from tests.models.llama import Llama, Shape, load_checkpoint, rms_norm, save_checkpoint
from tests.models.muon import schedule
from tests.models.train import HERE, Batches, optimizers

DRAFT = Shape(hidden=128, layers=2, heads=4, kv_heads=2, intermediate=256, tied=True)
HEADS = 4
HEAD_DECAY = 0.8
HEAD_STRIDE = 2  # the heads are trained on every second position: they are the larger part of the work


def medusa_head(h: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Logits [n, vocab] of one head from normed hidden states h [n, hidden]."""
    return F.linear(F.silu(F.linear(h, w1)) + h, w2)


def soft_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """Mean cross entropy (nats) of logits [n, vocab] against the distributions teacher [n, vocab]."""
    return -(teacher * F.log_softmax(logits, dim=-1)).sum(-1).mean()


def head_loss(h: Tensor, w1: Tensor, w2: Tensor, teacher: Tensor) -> Tensor:
    return soft_loss(medusa_head(h, w1, w2), teacher)


def draft_loss(x: Tensor, norm: Tensor, head: Tensor, teacher: Tensor) -> Tensor:
    return soft_loss(F.linear(rms_norm(x, norm), head), teacher)


class MedusaHeads(nn.Module):
    """Weights of all heads, under the names that vLLM's `medusa` model reads."""

    def __init__(self, lm_head: Tensor) -> None:
        super().__init__()
        vocab, hidden = lm_head.shape
        self.hidden, self.vocab = hidden, vocab
        self.w1 = nn.ParameterList([nn.Parameter(torch.zeros(hidden, hidden)) for _ in range(HEADS)])
        self.w2 = nn.ParameterList([nn.Parameter(lm_head.detach().clone()) for _ in range(HEADS)])

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for k in range(HEADS):
            tensors[f"blocks.{k}.layers.0.weight"] = self.w1[k].detach().to(torch.bfloat16)
            tensors[f"lm_heads.{k}.weight"] = self.w2[k].detach().to(torch.bfloat16)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "model.safetensors").chmod(0o644)
        config = {
            "architectures": ["MedusaModel"],
            "model_type": "medusa",
            "hidden_size": self.hidden,
            "vocab_size": self.vocab,
            "truncated_vocab_size": self.vocab,
            "medusa_num_heads": HEADS,
            "medusa_num_layers": 1,
            "torch_dtype": "bfloat16",
        }
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    @staticmethod
    def load(directory: Path) -> MedusaHeads:
        tensors = load_file(directory / "model.safetensors")
        heads = MedusaHeads(tensors["lm_heads.0.weight"].float())
        with torch.no_grad():
            for k in range(HEADS):
                heads.w1[k].copy_(tensors[f"blocks.{k}.layers.0.weight"])
                heads.w2[k].copy_(tensors[f"lm_heads.{k}.weight"])
        return heads


def distill(args: argparse.Namespace) -> None:
    run = args.workdir / "followers"
    run.mkdir(parents=True, exist_ok=True)
    (args.workdir / "pid").write_text(f"{os.getpid()}\n")
    target = load_checkpoint(args.target).requires_grad_(False)
    draft = Llama(DRAFT, torch.Generator().manual_seed(args.seed))
    heads = MedusaHeads(target.head)
    for model in (target, draft):
        model.compile()
    draft_fn = torch.compile(draft_loss, dynamic=False)
    head_fn = torch.compile(head_loss, dynamic=False)
    opts = optimizers(draft, args.muon_lr, args.adam_lr)
    opts.append(torch.optim.AdamW(heads.parameters(), lr=args.medusa_lr, betas=(0.9, 0.95), weight_decay=0.0))
    base = [[g["lr"] for g in o.param_groups] for o in opts]
    state_file, step, seconds = run / "state.pt", 0, 0.0
    if state_file.exists():
        state = torch.load(state_file)
        draft.load_state_dict(state["draft"])
        heads.load_state_dict(state["heads"])
        for o, s in zip(opts, state["opts"], strict=True):
            o.load_state_dict(s)
        step, seconds = state["step"], state["seconds"]
    # Another order of the text than the target's run had.
    batches = Batches(load_stream(args.workdir, "train"), args.seq, args.seed + 1)

    def save() -> None:
        state = {"draft": draft.state_dict(), "heads": heads.state_dict(), "opts": [o.state_dict() for o in opts]}
        torch.save({**state, "step": step, "seconds": seconds}, run / "state.tmp")
        (run / "state.tmp").replace(state_file)
        save_checkpoint(draft, run / "draft")
        shutil.copytree(args.workdir / "tokenizer", run / "draft", dirs_exist_ok=True)
        heads.save(run / "medusa")

    per_step = args.batch * args.seq
    total = args.tokens // per_step
    last = logged = saved = time.monotonic()
    mean = None
    last_position = args.seq - HEADS  # heads 1..4 at position t need the target's distribution at t + 1 .. t + 4
    while step < total:
        ids, _ = batches.take(step * args.batch, args.batch)
        with torch.no_grad():
            h = rms_norm(target.hidden(ids)[-1], target.norm)
            teacher = F.softmax(F.linear(h, target.head), dim=-1)
        losses = [draft_fn(draft.hidden(ids)[-1].flatten(0, 1), draft.norm, draft.head, teacher.flatten(0, 1))]
        losses[0].backward()
        first = random.Random(args.seed + step).randrange(HEAD_STRIDE)
        picked = h[:, first:last_position:HEAD_STRIDE].flatten(0, 1)
        for k in range(HEADS):
            shifted = teacher[:, first + k + 1 : last_position + k + 1 : HEAD_STRIDE].flatten(0, 1)
            losses.append(head_fn(picked, heads.w1[k], heads.w2[k], shifted))
            (losses[-1] * HEAD_DECAY ** (k + 1)).backward()
        factor = min(schedule(step / total, args.decay), (step + 1) / args.warmup)
        for o, rates in zip(opts, base, strict=True):
            for group, rate in zip(o.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            o.step()
            o.zero_grad(set_to_none=True)
        step += 1
        values = torch.stack([x.detach() for x in losses])
        mean = values if mean is None else mean.lerp(values, 0.03)
        now = time.monotonic()
        seconds, last = seconds + now - last, now
        if now - logged > args.log_every or step == total:
            shown = " ".join(f"{v:.3f}" for v in mean)
            print(
                f"{time.strftime('%H:%M:%S')} step {step}/{total} lr x{factor:.2f} draft, heads 1-{HEADS}: {shown} "
                f"{step * per_step / seconds:.0f} tok/s",
                flush=True,
            )
            logged = now
        if now - saved > args.save_every:
            save()
            saved = now
    save()
    for name in ("draft", "medusa"):
        if args.export:
            shutil.copytree(run / name, HERE / name, dirs_exist_ok=True)
    print(f"end: {total * per_step:,} tokens in {seconds:.0f} s", flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workdir", type=Path, required=True, help="where corpus.py put its output")
    parser.add_argument("--target", type=Path, default=HERE / "target", help="the frozen target")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--decay", type=float, default=0.4, help="share of the run in which the rate falls to zero")
    parser.add_argument("--warmup", type=int, default=30, help="steps")
    parser.add_argument("--batch", type=int, default=8, help="windows per step")
    parser.add_argument("--seq", type=int, default=256, help="tokens per window")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.004)
    parser.add_argument("--medusa-lr", type=float, default=0.001)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=float, default=30, help="seconds")
    parser.add_argument("--save-every", type=float, default=120, help="seconds")
    parser.add_argument("--export", action="store_true", help="copy the result to draft/ and medusa/ beside this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    distill(parse())
