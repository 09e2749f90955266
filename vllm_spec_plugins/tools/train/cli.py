# SPDX-License-Identifier: Apache-2.0
"""``vllm-spec train``: what a plugin needs of a model, trained on text of your own.

    vllm-spec train medusa --model MODEL --data FILE --output DIR
    vllm-spec train skipdecode --model MODEL --data FILE --speedup 2 --output DIR
    vllm-spec train exits --model MODEL --data FILE --exits 2 4 6 --kind gate --output FILE

MODEL stays as it is; what is trained goes to --output.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vllm_spec_plugins.layers.recorded_exits import Gate, Hash
from vllm_spec_plugins.layers.schedule import Schedule
from vllm_spec_plugins.tools import report
from vllm_spec_plugins.tools.train import data, options
from vllm_spec_plugins.tools.train import exits as recorded_exits
from vllm_spec_plugins.tools.train.medusa import FrozenModel, Plan, Training
from vllm_spec_plugins.tools.train.run import Checkpoint, Run, TrainError
from vllm_spec_plugins.tools.train.skipdecode import ScheduledModel, SkipDecodePlan, SkipDecodeTraining, mean_loss

STATE = "training.state"


def prepare(arguments: argparse.Namespace) -> Training | SkipDecodeTraining:
    """The run that is asked for, at the step it is at. Raises TrainError and DataError."""
    output, state = arguments.output, arguments.output / STATE
    if arguments.resume and not state.exists():
        raise TrainError(f"--resume: {output} holds no interrupted run; leave --resume out to start one")
    if not arguments.resume and state.exists():
        raise TrainError(f"--output {output}: holds an interrupted run; add --resume, or choose another folder")
    # Beside a state it is a part of what was being written.
    if not arguments.resume and any(
        (output / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")
    ):
        raise TrainError(f"--output {output}: holds a model already; choose another folder")
    _check_data(arguments.data)
    output.mkdir(parents=True, exist_ok=True)
    training = _medusa(arguments) if arguments.what == "medusa" else _skipdecode(arguments)
    if arguments.resume:
        training.load(state)
    return training


def _check_data(file: Path) -> None:
    """Before the model is loaded, which may take minutes."""
    if not file.is_file():
        raise TrainError(f"--data {file}: is no file; give UTF-8 text or JSON lines")


def _common(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields that every plan has."""
    return {
        "model": arguments.model,
        "tokens": arguments.tokens or 0,
        "batch": arguments.batch,
        "length": arguments.length,
        "rate": arguments.lr,
        "warmup": arguments.lr_warmup,
        "seed": arguments.seed,
    }


def _medusa(arguments: argparse.Namespace) -> Training:
    base = FrozenModel(arguments.model, _device(arguments.device), arguments.trust_remote_code)
    plan = Plan(
        **_common(arguments),
        heads=arguments.heads,
        layers=arguments.layers,
        share_lm_head=arguments.share_lm_head,
        labels=arguments.labels,
    )
    return Training(base, data.tokens(arguments.data, base.tokenizer), plan)


def _skipdecode(arguments: argparse.Namespace) -> SkipDecodeTraining:
    settings = options.settings(arguments)
    base = _scheduled(arguments)
    plan = SkipDecodePlan(
        **_common(arguments),
        schedule=options.schedule(settings, base.num_layers),
        prompt=arguments.prompt,
        loss=arguments.loss,
        anneal=arguments.anneal,
    )
    return SkipDecodeTraining(base, data.tokens(arguments.data, base.checkpoint.tokenizer), plan)


def _scheduled(arguments: argparse.Namespace) -> ScheduledModel:
    device = _device(arguments.device)
    return ScheduledModel(
        Checkpoint(arguments.model, device, torch.float32, arguments.trust_remote_code), arguments.model
    )


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TrainError(f"--device {name}: cannot be used ({str(error).splitlines()[0]})") from error
    return device


def train(training: Run[Any], output: Path, save_every: float, progress: Progress) -> None:
    """To the end, the state kept in `output` every `save_every` seconds; then the result.

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
            training.write(output)
            (output / STATE).unlink(missing_ok=True)
            return
        training.save(output / STATE)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    raise SystemExit(128 + signals[0])


def _advance(training: Run[Any], state: Path, save_every: float, progress: Progress, signals: Sequence[int]) -> None:
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
        progress.update(task, completed=training.step, figures=f"loss {shown}, {speed:.0f} tokens/s")
        if now - saved > save_every:
            training.save(state)
            saved = now


def run(arguments: argparse.Namespace) -> int:
    """Train and report; returns the exit status."""
    out = report.console()
    try:
        if arguments.what == "exits":
            return _exits(arguments, out)
        if arguments.what == "skipdecode":
            options.check_skipdecode(arguments)
            if arguments.evaluate:
                about, losses = evaluate(arguments)
                out.print(about, markup=False, soft_wrap=True)
                out.print(_losses(Table(title="The text given"), losses))
                return 0
        training = prepare(arguments)
        plan = training.plan
        out.print(
            f"{_about(training)}; {plan.steps} steps of {plan.batch} windows of "
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
    out.print(_held_out(training))
    out.print(_served(training, arguments.output), markup=False, soft_wrap=True)
    return 0


def _about(training: Training | SkipDecodeTraining) -> str:
    """What is trained."""
    plan, trained = training.plan, sum(weight.numel() for weight in training.learned)
    if isinstance(plan, Plan):
        return f"{plan.heads} heads for {plan.model}, {trained:,} weights"
    return f"{plan.model}, {trained:,} weights, for {describe(plan.schedule)}"


def describe(schedule: Schedule) -> str:
    return (
        f"{schedule.max_layers} to {schedule.min_layers} of {schedule.num_layers} layers over {schedule.max_tokens} tokens, "
        f"{schedule.average:.2f} on average"
    )


def _held_out(training: Training | SkipDecodeTraining) -> Table:
    table = Table(title="Held-out text")
    if isinstance(training, SkipDecodeTraining):
        return _losses(table, training.held_out())
    for name in ("head", "tokens ahead", "first guess is the model's"):
        table.add_column(name, justify="right")
    for k, share in enumerate(training.agreement(), start=1):
        table.add_row(str(k), str(k + 1), f"{share:.3f}")
    return table


def _losses(table: Table, losses: Sequence[float]) -> Table:
    table.add_column("layers")
    table.add_column("loss of the answers, nats per token", justify="right")
    for name, loss in zip(("all", "the schedule's"), losses, strict=True):
        table.add_row(name, f"{loss:.3f}")
    return table


def _served(training: Training | SkipDecodeTraining, output: Path) -> str:
    """The command that serves the result."""
    plan = training.plan
    if isinstance(plan, Plan):
        return f"vllm serve {plan.model} --plugin medusa:model={output}"
    keys = ",".join(f"{key}={getattr(plan.schedule, key)}" for key in options.SCHEDULE_KEYS if key != "speedup")
    return f"vllm serve {output} --plugin skipdecode:{keys}"


def evaluate(arguments: argparse.Namespace) -> tuple[str, list[float]]:
    """What is read, and a model's losses on it with all layers and the schedule's. Raises TrainError and DataError."""
    _check_data(arguments.data)
    settings = options.settings(arguments)
    base = _scheduled(arguments)
    schedule = options.schedule(settings, base.num_layers)
    stream = data.tokens(arguments.data, base.checkpoint.tokenizer)
    windows = data.spread(stream, arguments.length, arguments.windows)
    prompt = sum(arguments.prompt) // 2
    losses = [mean_loss(base, windows, plan, prompt, arguments.batch) for plan in (None, schedule)]
    read = f"{len(windows)} windows of {arguments.length} tokens, {prompt} of them the prompt"
    return f"{arguments.model}, {describe(schedule)}; {read}", losses


def _exits(arguments: argparse.Namespace, out: Console) -> int:
    """Record, make the file, measure and report. Raises TrainError and DataError."""
    options.check_exits(arguments)
    _check_data(arguments.data)
    device, gated = _device(arguments.device), arguments.kind == "gate"
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    checkpoint = Checkpoint(arguments.model, device, dtype, arguments.trust_remote_code)
    model = recorded_exits.ExitModel(checkpoint, sorted(arguments.exits), arguments.model)
    stream = data.tokens(arguments.data, checkpoint.tokenizer)
    windows = data.spread(stream, arguments.length, arguments.windows)
    parts = recorded_exits.split(windows, arguments.held_out)
    learned, held_out = (len(part) for part in parts)
    out.print(
        f"{arguments.kind} for {arguments.model}, exits after {', '.join(map(str, model.exits))} of {model.num_layers} layers; "
        f"{learned} windows of {arguments.length} tokens to learn from, {held_out} held out",
        markup=False,
        soft_wrap=True,
    )
    with Progress(TextColumn("{task.description}"), BarColumn(20), TimeRemainingColumn(), console=out) as progress:
        recordings = [
            recorded_exits.record(model, progress.track(part.split(arguments.batch), description=what), gated)
            for part, what in zip(parts, ("learning", "held out"), strict=True)
        ]
    bounds = sorted({*recorded_exits.BOUNDS, arguments.bound})
    own = {key: value for key in ("prior", "penalty") if (value := getattr(arguments, key)) is not None}
    made: Mapping[float, Gate | Hash]
    if gated:
        made = recorded_exits.gates(recordings[0], bounds, **own)
    else:
        made = recorded_exits.tables(recordings[0], bounds, model, **own)
    _save(made[arguments.bound], arguments.output)
    found = recorded_exits.figures(recordings[1], made)
    if arguments.json:
        given = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
        tokens = {"learned": len(recordings[0].tokens), "held_out": len(recordings[1].tokens)}
        figures = [asdict(figure) for figure in found]
        report.write_json(arguments.json, {"arguments": given, "tokens": tokens, "held_out": figures})
    about = "any bound may be given in the flag" if gated else f"the table written is that of bound {arguments.bound:g}"
    out.print(_figures(found, about))
    number = f":{arguments.bound:g}" if gated else ""
    for layer in model.exits:
        policy = f"exit_layer={layer},exit={arguments.kind}:{arguments.output}{number}"
        out.print(f"vllm serve {arguments.model} --plugin self-draft:{policy}", markup=False, soft_wrap=True)
    return 0


def _save(made: Gate | Hash, file: Path) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.tmp")
    made.save(unfinished)
    unfinished.chmod(0o644)  # safetensors makes its files private to their owner
    unfinished.replace(file)


def _figures(found: Sequence[recorded_exits.Figure], about: str) -> Table:
    table = Table(title="Held-out text", caption=about)
    for name in ("exit after", "answers that are the model's", "bound", "called good", "right of those"):
        table.add_column(name, justify="right")
    shown = None
    for figure in found:
        first = figure.exit != shown
        if first:
            table.add_section()
        table.add_row(
            str(figure.exit) if first else "",
            f"{figure.agreement:.3f}" if first else "",
            f"{figure.bound:g}",
            f"{figure.good:.3f}",
            "" if figure.right is None else f"{figure.right:.3f}",
        )
        shown = figure.exit
    return table


def main(argv: Sequence[str] | None = None, prog: str = "python -m vllm_spec_plugins.tools.train.cli") -> int:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
