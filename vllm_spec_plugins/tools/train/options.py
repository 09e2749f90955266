# SPDX-License-Identifier: Apache-2.0
"""The options of ``vllm-spec train`` and what must hold between them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from vllm_spec_plugins.config import FLAG, SettingError
from vllm_spec_plugins.depth_settings import SkipDecodeSettings
from vllm_spec_plugins.layers.schedule import Schedule
from vllm_spec_plugins.tools.train.run import TrainError

MEDUSA = """Heads for a model, trained on text of your own. MODEL stays as it is. DIR then serves:

    vllm serve MODEL --plugin medusa:model=DIR
"""
SKIPDECODE = """A model fine-tuned for a SkipDecode schedule: later tokens of an answer run fewer layers.

    vllm-spec train skipdecode --model MODEL --data FILE --speedup 2 --output DIR
    vllm-spec train skipdecode --model MODEL --data FILE --speedup 2 --evaluate

MODEL stays as it is; DIR becomes a checkpoint like it, with the schedule in skipdecode.json. It then serves with that schedule:

    vllm serve DIR --plugin skipdecode:speedup=2
"""
EXITS = """A gate or a table that says behind which tokens a shallow answer is the model's own, for exits after some layers.

    vllm-spec train exits --model MODEL --data FILE --exits 2 4 6 --kind gate --output GATE

MODEL stays as it is. GATE then stops drafts:

    vllm serve MODEL --plugin self-draft:exit_layer=4,exit=gate:GATE:0.8
"""
SCHEDULE_KEYS = ("speedup", "max_layers", "min_layers", "warmup", "max_tokens", "levels")
RUN_ONLY = ("output", "resume", "tokens", "lr", "lr_warmup", "seed", "loss", "anneal", "save_every")  # not --evaluate's


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
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    style = argparse.RawDescriptionHelpFormatter
    medusa = commands.add_parser("medusa", help="heads that draft", description=MEDUSA, formatter_class=style)
    skipdecode = commands.add_parser(
        "skipdecode", help="a model that stands skipped layers", description=SKIPDECODE, formatter_class=style
    )
    _add_medusa(medusa)
    _add_skipdecode(skipdecode)
    exits = commands.add_parser("exits", help="a gate or a table for drafts", description=EXITS, formatter_class=style)
    _add_exits(exits)


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
    group = parser.add_argument_group(
        "schedule", "as --plugin skipdecode has it: --speedup, or --max- and --min-layers"
    )
    for key in SCHEDULE_KEYS:
        default = about[key].default
        group.add_argument(
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


def _add_exits(parser: argparse.ArgumentParser) -> None:
    _add_input(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="where gate or table goes")
    parser.add_argument(
        "--exits",
        type=_within(int, 1, 1024),
        nargs="+",
        required=True,
        metavar="N",
        help="layers behind which there is an exit; self-draft's exit_layer is one of them",
    )
    parser.add_argument(
        "--kind",
        choices=["gate", "hash"],
        required=True,
        help="gate: logistic, on the hidden state; hash: a table by the token that goes in",
    )
    parser.add_argument(
        "--bound",
        type=_within(float, 0, 1),
        default=0.8,
        metavar="X",
        help="least share or chance of agreement with the whole model: fixed in a table, the flag's for a gate "
        "(%(default)s)",
    )
    parser.add_argument(
        "--prior",
        type=_within(float, 0, 1e6),
        metavar="X",
        help="hash: a token's share counts for as much as so many of its places at the exit's own share (8)",
    )
    parser.add_argument(
        "--penalty",
        type=_within(float, 0, 1e3),
        metavar="X",
        help="gate: times half the squared length of the weights, added to the mean loss (0.001)",
    )
    parser.add_argument(
        "--windows", type=_within(int, 2, 10**6), default=256, metavar="N", help="windows read (%(default)s)"
    )
    parser.add_argument(
        "--length", type=_within(int, 3, 1 << 20), default=512, metavar="N", help="tokens a window (%(default)s)"
    )
    parser.add_argument(
        "--held-out",
        type=_within(float, 0.01, 0.9),
        default=0.1,
        metavar="X",
        help="share of the windows, the last ones, that is measured on and not learned from (%(default)s)",
    )
    parser.add_argument(
        "--batch", type=_within(int, 1, 4096), default=8, metavar="N", help="windows at a time (%(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures, machine and versions there")
    _add_device(parser)


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
    parser.add_argument(
        "--save-every", type=_within(float, 0, 1e6), default=300, metavar="SECONDS", help="(%(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run that was interrupted in --output")
    _add_device(parser)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (cuda where there is one)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def settings(arguments: argparse.Namespace) -> SkipDecodeSettings:
    """The schedule as the plugin's settings have it. Raises TrainError, which speaks of this command's flags."""
    values = {key: getattr(arguments, key) for key in SCHEDULE_KEYS if getattr(arguments, key) is not None}
    try:
        return SkipDecodeSettings.parse(values)
    except SettingError as error:
        raise TrainError(as_flags(str(error))) from error


def schedule(given: SkipDecodeSettings, num_layers: int) -> Schedule:
    """As `SkipDecodeSettings.schedule`. Raises TrainError."""
    try:
        return given.schedule(num_layers)
    except SettingError as error:
        raise TrainError(as_flags(str(error))) from error


def as_flags(sentence: str) -> str:
    """A sentence about the plugin's settings as one about this command's flags."""
    sentence = sentence.replace(f"{FLAG} {SkipDecodeSettings.name}: ", "").replace(f"{SkipDecodeSettings.name}:", "")
    names = "|".join(SCHEDULE_KEYS)
    sentence = re.sub(rf"(?<=\w),({names})=", r" \1=", sentence)
    return re.sub(rf"\b({names})\b(=?)", lambda m: f"--{m[1].replace('_', '-')}{' ' if m[2] else ''}", sentence)


def check_skipdecode(arguments: argparse.Namespace) -> None:
    """Raises TrainError where options do not go together: those of a run with --evaluate, a prompt with the windows."""
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
    prompt = sum(arguments.prompt) // 2 if arguments.evaluate else arguments.prompt[1]
    if prompt > arguments.length - 2:
        raise TrainError(
            f"--length {arguments.length}: leaves no answer behind a prompt of {prompt} tokens; use at least {prompt + 2}, or a "
            f"shorter --prompt"
        )


def check_exits(arguments: argparse.Namespace) -> None:
    """Raises TrainError where options do not go together, or the file could not be named in a flag."""
    exits, output = arguments.exits, arguments.output
    if twice := [layer for layer in exits if exits.count(layer) > 1]:
        raise TrainError(f"--exits {twice[0]}: is given {exits.count(twice[0])} times; give it once")
    for key, kind in (("prior", "hash"), ("penalty", "gate")):
        if getattr(arguments, key) is not None and arguments.kind != kind:
            raise TrainError(f"--{key}: goes with --kind {kind}, and this is {arguments.kind}; leave it out")
    if "," in str(output) or " & " in str(output):
        raise TrainError(
            f"--output {output}: cannot be named in a --plugin flag, where ',' and ' & ' part settings; choose another name"
        )
    if output.exists():
        raise TrainError(f"--output {output}: is there already; choose another name")
