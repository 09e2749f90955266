# SPDX-License-Identifier: Apache-2.0
"""``vllm-spec tune router``: from recorded answers, a policy's model and a threshold that keeps a promise.

    vllm-spec tune router --config cascade.yaml --prompts prompts.jsonl --record answers.jsonl --policy classifier --output m.json
    vllm-spec tune router --record answers.jsonl --policy classifier --output m.json

A record is a line of JSON: {"prompt": ..., "answers": [{"stage", "text", "logprobs": [...], "good"}, ...]}, cheapest stage
first. Where "good" is missing, an answer is good if it reads as the last stage's does. With --prompts every stage is asked
first, and the record written.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from vllm_spec_plugins.cascade import config
from vllm_spec_plugins.cascade.ledger import Bill
from vllm_spec_plugins.cascade.logistic import Logistic, figures, fit, ngrams
from vllm_spec_plugins.cascade.policies import Confidence
from vllm_spec_plugins.cascade.request import Body, Kind, Request
from vllm_spec_plugins.layers.calibration import boldest, hoeffding_bentkus
from vllm_spec_plugins.tools.router.cascade import together
from vllm_spec_plugins.tools.router.service import NAME, Service
from vllm_spec_plugins.tools.router.stage import StageFailed
from vllm_spec_plugins.tools.router.upstream import Busy, Refused

# Fixed before any answer is looked at, safest first: what the guarantee of Learn then Test needs.
THRESHOLDS = tuple(round(1.0 - 0.01 * i, 2) for i in range(101))

DECAY = {"classifier": 1e-3, "scorer": 1e-3}


class TuneError(ValueError):
    """Records that nothing can be learnt from; the message is the sentence a user reads."""


@dataclass(frozen=True)
class Answered:
    """One stage's recorded answer."""

    stage: str
    text: str
    logprobs: tuple[float, ...]
    good: bool


@dataclass(frozen=True)
class Record:
    """One prompt and what every stage made of it, cheapest first."""

    prompt: str
    answers: tuple[Answered, ...]

    @classmethod
    def parse(cls, line: str) -> Record:
        """Raises ValueError when a line is no record."""
        try:
            held = json.loads(line)
            answers, reference = held["answers"], " ".join(held["answers"][-1]["text"].split())
            made = [
                Answered(
                    str(each["stage"]),
                    each["text"],
                    tuple(float(value) for value in each["logprobs"]),
                    bool(each["good"]) if "good" in each else " ".join(each["text"].split()) == reference,
                )
                for each in answers
            ]
            prompt = held["prompt"]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"it is no record ({error!r})") from error
        if len(made) < 2 or not isinstance(prompt, str):
            raise ValueError("it is no record: a prompt and the answers of two or more stages")
        return cls(prompt, tuple(made))


def load(path: Path) -> list[Record]:
    """All records. Raises TuneError, naming the line, when one is none, or not of the first one's stages."""
    records: list[Record] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = Record.parse(line)
        except ValueError as error:
            raise TuneError(f"{path}: line {number}: {error}") from error
        stages = [each.stage for each in record.answers]
        if records and stages != [each.stage for each in records[0].answers]:
            raise TuneError(f"{path}: line {number} is of the stages {', '.join(stages)}, the first is of others")
        records.append(record)
    if len(records) < 20:
        raise TuneError(f"{path} has {len(records)} records; 20 or more are needed, hundreds for a useful promise")
    return records


async def record(
    service: Service, prompts: Sequence[str], path: Path, max_tokens: int, places: int, kind: Kind = "completions"
) -> None:
    """Ask every stage each prompt, greedily, and write the records. Raises StageFailed, Busy, Refused."""
    free = asyncio.Semaphore(places)

    async def one(number: int, prompt: str) -> str:
        what = {"prompt": prompt} if kind == "completions" else {"messages": [{"role": "user", "content": prompt}]}
        body: Body = {"model": NAME, **what, "max_tokens": max_tokens, "temperature": 0}
        request = Request(f"tune-{number}", kind, body, "tune", 1.0)
        bill: Bill = service.cascade.ledger.open(request.id, request.tenant)
        answers = []
        async with free:
            for stage in service.cascade.stages:
                reply = (await stage.call(request, request.with_logprobs(), bill)).reply
                logprobs = [round(value, 4) for value in reply.judged_logprobs()[0]]
                answers.append({"stage": stage.name, "text": reply.texts[0], "logprobs": logprobs})
        return json.dumps({"prompt": prompt, "answers": answers})

    async with service.running():
        lines = await together([one(i, prompt) for i, prompt in enumerate(prompts)])
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


@dataclass(frozen=True)
class Tuned:
    """A policy's models, and what calibration says; `threshold` None: not even the safest keeps the promise."""

    policy: str
    models: dict[str, Logistic]
    threshold: float | None
    risk: float
    cheap: float
    prompts: int

    def as_dict(self, tolerance: float, error: float) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "models": {name: model.as_dict() for name, model in self.models.items()},
            "calibration": {
                "threshold": self.threshold,
                "tolerance": tolerance,
                "error": error,
                "risk": self.risk,
                "answered before the last stage": self.cheap,
                "prompts": self.prompts,
            },
        }


def tune(records: Sequence[Record], policy: str, tolerance: float, error: float, seed: int, statistic: str) -> Tuned:
    """Fit on one half of the records, calibrate on the other.

    The loss of a prompt under a threshold is 1 if the stage whose answer is kept gave a bad one where the last stage's is
    good, else 0. Raises TuneError when there is nothing to learn.
    """
    order = list(records)
    random.Random(seed).shuffle(order)
    # A confidence has nothing to fit: every record calibrates.
    half = 0 if policy == "confidence" else len(order) // 2
    models = _fit(order[:half], policy) if half else {}
    score = _score(policy, models, statistic)
    rest = order[half:]
    losses, cheap = np.zeros((len(rest), len(THRESHOLDS))), np.zeros(len(THRESHOLDS))
    for row, each in enumerate(rest):
        scores = [score(each, index) for index in range(len(each.answers) - 1)]
        for column, threshold in enumerate(THRESHOLDS):
            kept = next((i for i, value in enumerate(scores) if value >= threshold), None)
            if kept is not None:
                cheap[column] += 1 / len(rest)
                losses[row, column] = each.answers[-1].good and not each.answers[kept].good
    bold = boldest(losses, tolerance, error, hoeffding_bentkus)
    if bold is None:
        return Tuned(policy, models, None, float(losses[:, 0].mean()), float(cheap[0]), len(rest))
    return Tuned(policy, models, THRESHOLDS[bold], float(losses[:, bold].mean()), float(cheap[bold]), len(rest))


def _fit(records: Sequence[Record], policy: str) -> dict[str, Logistic]:
    stages = [each.stage for each in records[0].answers[:-1]]
    try:
        if policy == "scorer":
            cheap = [(r.prompt, answer) for r in records for answer in r.answers[:-1]]
            x = np.stack([figures(prompt, answer.logprobs) for prompt, answer in cheap])
            return {"answer": fit(x, np.array([answer.good for _, answer in cheap]), DECAY[policy], standardise=True)}
        x = np.stack([ngrams(each.prompt) for each in records])
        return {
            stage: fit(x, np.array([r.answers[i].good for r in records]), DECAY[policy], standardise=False)
            for i, stage in enumerate(stages)
        }
    except ValueError as error:
        raise TuneError(f"a {policy} cannot be trained: {error}") from error


def _score(policy: str, models: dict[str, Logistic], statistic: str) -> Callable[[Record, int], float]:
    if policy == "classifier":
        return lambda each, index: models[each.answers[index].stage](ngrams(each.prompt))
    if policy == "scorer":
        return lambda each, index: models["answer"](figures(each.prompt, each.answers[index].logprobs))
    confidence = Confidence(statistic)
    return lambda each, index: confidence.score(each.answers[index].logprobs)


def parser(prog: str) -> argparse.ArgumentParser:
    """The command's arguments."""
    found = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").splitlines()[0])
    found.add_argument("--record", type=Path, required=True, metavar="FILE", help="the recorded answers, JSON lines")
    found.add_argument("--policy", choices=["classifier", "scorer", "confidence"], default="classifier")
    found.add_argument("--statistic", choices=["mean", "min", "quantile"], default="mean", help="of a confidence")
    found.add_argument("--output", type=Path, required=True, metavar="FILE", help="where the model goes")
    found.add_argument("--config", type=Path, metavar="FILE", help="with --prompts: the cascade to record")
    found.add_argument(
        "--prompts", type=Path, metavar="FILE", help='JSON lines with a "prompt" each: record them first'
    )
    found.add_argument("--chat", action="store_true", help="record them as a user's messages, not as plain prompts")
    found.add_argument("--max-tokens", type=int, default=256, help="of a recorded answer (%(default)s)")
    found.add_argument("--together", type=int, default=16, help="prompts recorded at a time (%(default)s)")
    found.add_argument(
        "--tolerance", type=float, default=0.05, help="bad answers in the place of good ones (%(default)s)"
    )
    found.add_argument("--error", type=float, default=0.1, help="chance that the promise is wrong (%(default)s)")
    found.add_argument("--seed", type=int, default=0, help="which half trains and which calibrates (%(default)s)")
    return found


def main(argv: Sequence[str] | None = None, prog: str = "vllm-spec tune router") -> int:
    """0; 1 when no threshold keeps the promise, or on any error that has a sentence."""
    known = parser(prog)
    arguments = known.parse_args(argv)
    if (arguments.config is None) != (arguments.prompts is None):
        known.error("--config and --prompts go together: the cascade, and what to ask it")
    out = Console()
    try:
        if arguments.prompts is not None:
            lines = arguments.prompts.read_text(encoding="utf-8").splitlines()
            prompts = [json.loads(line)["prompt"] for line in lines]
            service = Service(config.load(arguments.config), str(arguments.config))
            kind: Kind = "chat" if arguments.chat else "completions"
            asyncio.run(record(service, prompts, arguments.record, arguments.max_tokens, arguments.together, kind))
        records = load(arguments.record)
        given = arguments.tolerance, arguments.error
        found = tune(records, arguments.policy, *given, arguments.seed, arguments.statistic)
        arguments.output.write_text(json.dumps(found.as_dict(*given)) + "\n", encoding="utf-8")
    except (OSError, ValueError, KeyError, StageFailed, Busy, Refused) as error:
        out.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    if found.threshold is None:
        out.print(
            f"no threshold keeps the risk at {arguments.tolerance:g} or less, with error {arguments.error:g}, on "
            f"{found.prompts} prompts: record more, or allow more",
            markup=False,
        )
        return 1
    out.print(
        f"threshold: {found.threshold:g}: {found.cheap:.0%} of {found.prompts} prompts answered before the last stage, "
        f"a worse answer for {found.risk:.1%} (allowed: {arguments.tolerance:.1%}, error {arguments.error:g})",
        markup=False,
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
