# SPDX-License-Identifier: Apache-2.0
"""``vllm-spec train medusa``: heads for a model, trained on text of your own.

    vllm-spec train medusa --model MODEL --data FILE --output DIR

MODEL stays as it is. DIR then serves: vllm serve MODEL --plugin medusa:model=DIR
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vllm_spec_plugins.tools import report
from vllm_spec_plugins.tools.train import data
from vllm_spec_plugins.tools.train.medusa import FrozenModel, Plan, TrainError, Training

STATE = "training.state"


def _within(kind: Callable[[str], float], least: float, most: float) -> Callable[[str], float]:
    """An argument's type: a number from `least` to `most`."""

    def read(value: str) -> float:
        number = kind(value)
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{value} is out of range; valid are {least} to {most}")
        return number

    read.__name__ = kind.__name__  # argparse names it for what is no number at all
    return read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["medusa"], help="what to train")
    parser.add_argument("--model", required=True, help="folder or hub id of the model, decoder-only; it is not changed")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help='UTF-8 text, or .jsonl with a "text" or "prompt" a line',
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the heads go")
    parser.add_argument("--heads", type=_within(int, 1, 16), default=4, metavar="N", help="heads (%(default)s)")
    parser.add_argument(
        "--layers", type=_within(int, 1, 8), default=1, metavar="N", help="residual layers (%(default)s)"
    )
    parser.add_argument(
        "--share-lm-head",
        action="store_true",
        help="train no matrix to the vocabulary: the model's own serves all heads",
    )
    parser.add_argument(
        "--labels",
        choices=["text", "model"],
        default="text",
        help="learn the text's tokens, or the model's distributions over them (%(default)s)",
    )
    parser.add_argument(
        "--tokens", type=_within(int, 1, 10**12), metavar="N", help="tokens to train on (one pass over the text)"
    )
    parser.add_argument(
        "--batch", type=_within(int, 1, 4096), default=8, metavar="N", help="windows a step (%(default)s)"
    )
    parser.add_argument(
        "--length", type=_within(int, 3, 1 << 20), default=512, metavar="N", help="tokens a window (%(default)s)"
    )
    parser.add_argument(
        "--lr", type=_within(float, 1e-8, 1), default=1e-3, metavar="X", help="learning rate (%(default)s)"
    )
    parser.add_argument(
        "--warmup", type=_within(float, 0, 1), default=0.05, metavar="X", help="share of the run (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the windows' order (%(default)s)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (cuda where there is one)")
    parser.add_argument(
        "--save-every", type=_within(float, 0, 1e6), default=300, metavar="SECONDS", help="(%(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run that was interrupted in --output")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def prepare(arguments: argparse.Namespace) -> Training:
    """The run that is asked for, at the step it is at. Raises TrainError and DataError."""
    output, state = arguments.output, arguments.output / STATE
    if arguments.resume and not state.exists():
        raise TrainError(f"--resume: {output} holds no interrupted run; leave --resume out to start one")
    if not arguments.resume and state.exists():
        raise TrainError(f"--output {output}: holds an interrupted run; add --resume, or choose another folder")
    if (output / "model.safetensors").exists():
        raise TrainError(f"--output {output}: holds a model already; choose another folder")
    if not arguments.data.is_file():  # before the model is loaded, which may take minutes
        raise TrainError(f"--data {arguments.data}: is no file; give UTF-8 text or JSON lines")
    output.mkdir(parents=True, exist_ok=True)
    base = FrozenModel(arguments.model, _device(arguments.device), arguments.trust_remote_code)
    plan = Plan(
        model=arguments.model,
        heads=arguments.heads,
        layers=arguments.layers,
        share_lm_head=arguments.share_lm_head,
        labels=arguments.labels,
        tokens=arguments.tokens or 0,
        batch=arguments.batch,
        length=arguments.length,
        rate=arguments.lr,
        warmup=arguments.warmup,
        seed=arguments.seed,
    )
    training = Training(base, data.tokens(arguments.data, base.tokenizer), plan)
    if arguments.resume:
        training.load(state)
    return training


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TrainError(f"--device {name}: cannot be used ({str(error).splitlines()[0]})") from error
    return device


def train(training: Training, output: Path, save_every: float, progress: Progress) -> None:
    """To the end, the state kept in `output` every `save_every` seconds; then the heads.

    Interrupted (SIGINT, SIGTERM) it ends behind the step that it is in, so that the state kept is one between two steps.
    Raises TrainError where the loss is no number any more.
    """
    signals: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: signals.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        _advance(training, output / STATE, save_every, progress, signals)
        if training.step == training.plan.steps:
            training.heads.save(output, training.base.dtype)
            (output / STATE).unlink(missing_ok=True)
            return
        training.save(output / STATE)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    raise SystemExit(128 + signals[0])


def _advance(training: Training, state: Path, save_every: float, progress: Progress, signals: Sequence[int]) -> None:
    """Step after step to the end, or to a signal."""
    plan, first = training.plan, training.step
    task = progress.add_task("training", total=plan.steps, completed=first, figures="")
    begin = saved = time.monotonic()
    mean = None
    while training.step < plan.steps and not signals:
        losses = training.advance()
        mean = losses if mean is None else mean.lerp(losses, 0.05)
        if not mean.isfinite().all():
            raise TrainError(f"--lr {plan.rate}: the loss is no number after {training.step} steps; use a smaller one")
        now = time.monotonic()
        speed = (training.step - first) * plan.batch * plan.length / (now - begin)
        shown = " ".join(f"{loss:.3f}" for loss in mean.tolist())
        progress.update(task, completed=training.step, figures=f"loss by head {shown}, {speed:.0f} tokens/s")
        if now - saved > save_every:
            training.save(state)
            saved = now


def run(arguments: argparse.Namespace) -> int:
    """Train and report; returns the exit status."""
    out = report.console()
    try:
        training = prepare(arguments)
        plan, trained = training.plan, sum(w.numel() for w in training.heads.parameters() if w.requires_grad)
        out.print(
            f"{plan.heads} heads for {plan.model}, {trained:,} weights; {plan.steps} steps of {plan.batch} windows of "
            f"{plan.length} tokens, {len(training.windows.train)} windows to train on, {len(training.windows.held_out)} "
            f"held out" + (f"; going on from step {training.step}" if training.step else ""),
            markup=False,
            soft_wrap=True,
        )
        columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
        with Progress(*columns, console=out) as progress:
            train(training, arguments.output, arguments.save_every, progress)
    except (TrainError, data.DataError, OSError) as error:
        out.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    except SystemExit:
        state = arguments.output / STATE
        out.print(f"Interrupted: the same command with --resume goes on from {state}", markup=False, soft_wrap=True)
        raise
    table = Table(title="Held-out text")
    for name in ("head", "tokens ahead", "first guess is the model's"):
        table.add_column(name, justify="right")
    for k, share in enumerate(training.agreement(), start=1):
        table.add_row(str(k), str(k + 1), f"{share:.3f}")
    out.print(table)
    out.print(f"vllm serve {plan.model} --plugin medusa:model={arguments.output}", markup=False, soft_wrap=True)
    return 0


def main(argv: Sequence[str] | None = None, prog: str = "python -m vllm_spec_plugins.tools.train.cli") -> int:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
