# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from tests.unit.tools.router.fakes import Fakes, settings
from vllm_spec_plugins.cascade.config import ClassifierSettings, ScorerSettings
from vllm_spec_plugins.cascade.policies import build
from vllm_spec_plugins.cascade.request import Kind, Request
from vllm_spec_plugins.tools.router import tune
from vllm_spec_plugins.tools.router.service import Service

EASY = ("list the days", "name a colour", "say hello", "count to three")
HARD = ("prove the lemma", "derive the bound", "refute the claim", "solve the integral")


def records(path: Path, rng: random.Random, count: int, flip: float = 0.0) -> Path:
    """The cheap stage is right and sure of easy prompts, wrong and unsure of hard ones, but for a share `flip`."""
    with path.open("w") as file:
        for number in range(count):
            easy = rng.random() < 0.6
            good = easy != (rng.random() < flip)
            prompt = f"{rng.choice(EASY if easy else HARD)} {number}"
            logprobs = [math.log(rng.uniform(0.6, 1.0) if easy else rng.uniform(0.05, 0.5)) for _ in range(6)]
            answers = [
                {"stage": "small", "text": "right" if good else "wrong", "logprobs": logprobs},
                {"stage": "large", "text": "right", "logprobs": [-0.1]},
            ]
            file.write(json.dumps({"prompt": prompt, "answers": answers}) + "\n")
    return path


@pytest.mark.parametrize("policy", ["classifier", "scorer", "confidence"])
def test_a_policy_learns_what_the_cheap_stage_can_do_and_its_threshold_holds_on_new_prompts(
    tmp_path: Path, seed: int, policy: str
) -> None:
    rng = random.Random(seed)
    found = tune.tune(tune.load(records(tmp_path / "a", rng, 600)), policy, 0.05, 0.1, 0, "mean")
    assert found.threshold is not None
    # 0.6 of the prompts are easy; the promise leaves room for some hard ones.
    assert 0.45 < found.cheap < 0.8
    fresh = tune.load(records(tmp_path / "b", rng, 600))
    score = tune._score(policy, found.models, "mean")
    kept = [each for each in fresh if score(each, 0) >= found.threshold]
    assert len(kept) > 0.5 * len(fresh)
    # 0.05 and what chance adds to it here and in the calibration.
    assert sum(not each.answers[0].good for each in kept) <= 0.09 * len(fresh)


def test_what_was_trained_serves(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(records(tmp_path / "r", random.Random(seed), 400))
    for policy in ("classifier", "scorer"):
        output = tmp_path / f"{policy}.json"
        assert tune.main(["--record", source, "--policy", policy, "--output", str(output)]) == 0
        assert "threshold: " in capsys.readouterr().out
        held = json.loads(output.read_text())["calibration"]
        assert 0 < held["threshold"] <= 1
    classifier = build(
        ClassifierSettings(kind="classifier", model=str(tmp_path / "classifier.json")), ["small", "large"]
    )
    starts = [
        classifier.start(Request("r", "completions", {"prompt": prompt}, "t", 0.5), ["small", "large"])
        for prompt in (*EASY, *HARD)
    ]
    assert starts == [0] * 4 + [1] * 4
    build(ScorerSettings(kind="scorer", model=str(tmp_path / "scorer.json")), ["small", "large"])


def test_no_threshold_is_promised_where_none_holds(
    tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(records(tmp_path / "r", random.Random(seed), 30))
    arguments = ["--record", source, "--output", str(tmp_path / "m"), "--policy", "confidence", "--tolerance", "0.01"]
    assert tune.main(arguments) == 1
    assert "no threshold keeps the risk at 0.01" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "m").read_text())["calibration"]["threshold"] is None


ANSWERS = [{"stage": "a", "text": "x y", "logprobs": []}, {"stage": "b", "text": "x  y", "logprobs": []}]


def test_an_answer_is_good_if_it_is_said_to_be_or_reads_as_the_last_stages() -> None:
    record = tune.Record.parse(json.dumps({"prompt": "p", "answers": ANSWERS}))
    assert [each.good for each in record.answers] == [True, True]
    record = tune.Record.parse(json.dumps({"prompt": "p", "answers": [{**ANSWERS[0], "good": 0}, ANSWERS[1]]}))
    assert [each.good for each in record.answers] == [False, True]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["{"] * 20, "line 1"),
        ([json.dumps({"prompt": "p", "answers": ANSWERS[:1]})], "two or more stages"),
        ([json.dumps({"prompt": "p", "answers": ANSWERS})] * 19, "19 records"),
        (
            [json.dumps({"prompt": "p", "answers": ANSWERS}), json.dumps({"prompt": "p", "answers": ANSWERS[::-1]})],
            "line 2 is of the stages b, a",
        ),
        ([json.dumps({"prompt": "p", "answers": ANSWERS})] * 40, "all 20 recorded answers are good"),
    ],
)
def test_records_that_teach_nothing_are_refused_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[str], words: str
) -> None:
    (tmp_path / "r").write_text("\n".join(lines))
    assert tune.main(["--record", str(tmp_path / "r"), "--output", str(tmp_path / "m")]) == 1
    assert words in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_recording_asks_every_stage_each_prompt_greedily(tmp_path: Path, kind: Kind) -> None:
    def said(body: dict[str, Any]) -> str:
        return body["prompt"] if kind == "completions" else body["messages"][0]["content"]

    async def run() -> Fakes:
        fakes = Fakes()
        fakes.text["small"] = lambda body: said(body).upper()
        service = Service(settings(), environment={}, transport=fakes.transport)
        await tune.record(service, [f"p{i}" for i in range(30)], tmp_path / "r", 16, 4, kind)
        return fakes

    fakes = asyncio.run(run())
    held: list[Any] = [json.loads(line) for line in (tmp_path / "r").read_text().splitlines()]
    assert [each["prompt"] for each in held] == [f"p{i}" for i in range(30)]
    assert [[a["text"] for a in each["answers"]] for each in held] == [[f"P{i}", "text"] for i in range(30)]
    assert held[0]["answers"][0]["logprobs"] == [-0.1054] * 2
    bodies = [json.loads(request.content) for _, request in fakes.calls]
    assert {(body["temperature"], body["max_tokens"]) for body in bodies} == {(0, 16)}
    assert len(tune.load(tmp_path / "r")) == 30
