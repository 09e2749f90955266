# SPDX-License-Identifier: Apache-2.0
"""``vllm-spec train``: what a plugin needs of a model, trained on text of your own.

    vllm-spec train medusa --model MODEL --data FILE --output DIR
    vllm-spec train skipdecode --model MODEL --data FILE --speedup 2 --output DIR

MODEL stays as it is; what is trained goes to DIR.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vllm_spec_plugins.config import FLAG, SettingError
from vllm_spec_plugins.layers.schedule import Schedule
from vllm_spec_plugins.settings import SkipDecodeSettings
from vllm_spec_plugins.tools import report
from vllm_spec_plugins.tools.train import data
from vllm_spec_plugins.tools.train.medusa import FrozenModel, Plan, Training
from vllm_spec_plugins.tools.train.run import Checkpoint, Run, TrainError
from vllm_spec_plugins.tools.train.skipdecode import ScheduledModel, SkipDecodePlan, SkipDecodeTraining, mean_loss

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


MEDUSA = """Heads for a model, trained on text of your own. MODEL stays as it is. DIR then serves:

    vllm serve MODEL --plugin medusa:model=DIR
"""
SKIPDECODE = """A model fine-tuned for a SkipDecode schedule: later tokens of an answer run fewer layers.

    vllm-spec train skipdecode --model MODEL --data FILE --speedup 2 --output DIR
    vllm-spec train skipdecode --model MODEL --data FILE --speedup 2 --evaluate

MODEL stays as it is; DIR becomes a checkpoint like it, with the schedule in skipdecode.json. It then serves with that schedule:

    vllm serve DIR --plugin skipdecode:speedup=2
"""
SCHEDULE_KEYS = ("speedup", "max_layers", "min_layers", "warmup", "max_tokens", "levels")
RUN_ONLY = ("output", "resume", "tokens", "lr", "lr_warmup", "seed", "loss", "anneal", "save_every")  # not --evaluate's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    style = argparse.RawDescriptionHelpFormatter
    medusa = commands.add_parser("medusa", help="heads that draft", description=MEDUSA, formatter_class=style)
    skipdecode = commands.add_parser(
        "skipdecode", help="a model that stands skipped layers", description=SKIPDECODE, formatter_class=style
    )
    _add_medusa(medusa)
    _add_skipdecode(skipdecode)


def _add_medusa(parser: argparse.ArgumentParser) -> None:
    _add_input(parser)
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
    _add_run(parser, rate=1e-3, warmup="--warmup")


def _add_skipdecode(parser: argparse.ArgumentParser) -> None:
    _add_input(parser)
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the checkpoint goes")
    parser.add_argument(
        "--evaluate", action="store_true", help="train nothing: the loss of MODEL on FILE, under the schedule and whole"
    )
    about = {f.name: f for f in fields(SkipDecodeSettings)}
    schedule = parser.add_argument_group(
        "schedule", "as --plugin skipdecode has it: --speedup, or --max- and --min-layers"
    )
    for key in SCHEDULE_KEYS:
        default = about[key].default
        schedule.add_argument(
            f"--{key.replace('_', '-')}",
            metavar="X" if key == "speedup" else "N",
            help=about[key].metadata["doc"] + ("" if default is None else f" ({default})"),
        )
    parser.add_argument(
        "--prompt",
        type=_prompt,
        default=(32, 128),
        metavar="N-N",
        help="tokens of a window's prompt, drawn for each step, the middle for what is held out; or one number (32-128)",
    )
    parser.add_argument(
        "--loss",
        choices=["answer", "all"],
        default="answer",
        help="learn the answer's tokens, or the prompt's too (%(default)s)",
    )
    parser.add_argument(
        "--anneal",
        type=_within(float, 0, 1),
        default=0.0,
        metavar="X",
        help="share of the run in which the budgets fall from all layers to the schedule's (%(default)s)",
    )
    _add_run(parser, rate=1e-4, warmup="--lr-warmup")
    parser.add_argument(
        "--windows",
        type=_within(int, 1, 10**6),
        default=256,
        metavar="N",
        help="--evaluate: windows read (%(default)s)",
    )


def _prompt(value: str) -> tuple[int, int]:
    """An argument's type: N, or N-N."""
    least, dash, most = value.partition("-")
    if not least.isdecimal() or (dash and not most.isdecimal()):
        raise argparse.ArgumentTypeError(f"{value} is not a number of tokens; write 64, or 32-128")
    found = int(least), int(most if dash else least)
    if not 1 <= found[0] <= found[1]:
        raise argparse.ArgumentTypeError(f"{value} is out of range; valid are 1 and more, the smaller number first")
    return found


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder or hub id of the model, decoder-only; it is not changed")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help='UTF-8 text, or .jsonl with a "text" or "prompt" a line',
    )


def _add_run(parser: argparse.ArgumentParser, rate: float, warmup: str) -> None:
    """What every run has; `warmup` is the flag of the learning rate's."""
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
        "--lr", type=_within(float, 1e-8, 1), default=rate, metavar="X", help="learning rate (%(default)s)"
    )
    parser.add_argument(
        warmup,
        dest="lr_warmup",
        type=_within(float, 0, 1),
        default=0.05,
        metavar="X",
        help="share of the run in which the learning rate rises (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the windows' order (%(default)s)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (cuda where there is one)")
    parser.add_argument(
        "--save-every", type=_within(float, 0, 1e6), default=300, metavar="SECONDS", help="(%(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run that was interrupted in --output")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


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
    settings = _settings(arguments)
    base = _scheduled(arguments)
    plan = SkipDecodePlan(
        **_common(arguments),
        schedule=_schedule(settings, base),
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


def _settings(arguments: argparse.Namespace) -> SkipDecodeSettings:
    """The schedule as the plugin's settings have it. Raises TrainError, which speaks of this command's flags."""
    given = {key: getattr(arguments, key) for key in SCHEDULE_KEYS if getattr(arguments, key) is not None}
    try:
        return SkipDecodeSettings.parse(given)
    except SettingError as error:
        raise TrainError(as_flags(str(error))) from error


def _schedule(settings: SkipDecodeSettings, base: ScheduledModel) -> Schedule:
    try:
        return settings.schedule(base.num_layers)
    except SettingError as error:
        raise TrainError(as_flags(str(error))) from error


def as_flags(sentence: str) -> str:
    """A sentence about the plugin's settings as one about this command's flags."""
    sentence = sentence.replace(f"{FLAG} {SkipDecodeSettings.name}: ", "").replace(f"{SkipDecodeSettings.name}:", "")
    names = "|".join(SCHEDULE_KEYS)
    sentence = re.sub(rf"(?<=\w),({names})=", r" \1=", sentence)
    return re.sub(rf"\b({names})\b(=?)", lambda m: f"--{m[1].replace('_', '-')}{' ' if m[2] else ''}", sentence)


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
        if arguments.what == "skipdecode":
            _check_evaluate(arguments)
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
    keys = ",".join(f"{key}={getattr(plan.schedule, key)}" for key in SCHEDULE_KEYS if key != "speedup")
    return f"vllm serve {output} --plugin skipdecode:{keys}"


def _check_evaluate(arguments: argparse.Namespace) -> None:
    """Raises TrainError where what is given belongs to the other of a run and --evaluate."""
    parser = argparse.ArgumentParser()
    _add_skipdecode(parser)
    names = RUN_ONLY if arguments.evaluate else ("windows",)
    if given := [name for name in names if getattr(arguments, name) != parser.get_default(name)]:
        flag = f"--{given[0].replace('_', '-')}"
        if arguments.evaluate:
            raise TrainError(f"{flag}: goes with a run, and --evaluate is none; leave one of them out")
        raise TrainError(f"{flag}: goes with --evaluate, and this is a run; leave it out")
    if not arguments.evaluate and not arguments.output:
        raise TrainError("--output: is missing; give a folder for the checkpoint, or --evaluate to train nothing")


def evaluate(arguments: argparse.Namespace) -> tuple[str, list[float]]:
    """What is read, and a model's losses on it with all layers and the schedule's. Raises TrainError and DataError."""
    _check_data(arguments.data)
    settings = _settings(arguments)
    base = _scheduled(arguments)
    schedule = _schedule(settings, base)
    stream = data.tokens(arguments.data, base.checkpoint.tokenizer)
    windows = data.spread(stream, arguments.length, arguments.windows)
    prompt = sum(arguments.prompt) // 2
    if prompt > arguments.length - 2:
        raise TrainError(
            f"--prompt {prompt}: leaves no answer in windows of {arguments.length}; use a greater --length"
        )
    losses = [mean_loss(base, windows, plan, prompt, arguments.batch) for plan in (None, schedule)]
    read = f"{len(windows)} windows of {arguments.length} tokens, {prompt} of them the prompt"
    return f"{arguments.model}, {describe(schedule)}; {read}", losses


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
