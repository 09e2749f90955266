# SPDX-License-Identifier: Apache-2.0
"""The target as its own draft: the text of plain decoding, whatever part drafts, and drafts of exactly that part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vllm_spec_plugins
from tests.engine.conftest import LANE, MODELS, TARGET
from tests.engine.decoding import SAMPLINGS, generate
from tests.models.llama import load_checkpoint, rms_norm
from vllm_spec_plugins.config import SettingError
from vllm_spec_plugins.layers.plan import LayerPlan
from vllm_spec_plugins.layers.planner import FixedPlan
from vllm_spec_plugins.proposers import specinfer
from vllm_spec_plugins.tools import cli

TOKENS = 32
EAGER = {"min_chance": 0.0, "adapt": False}
PARTS: dict[str, dict[str, Any]] = {
    "prefix": {"exit_layer": 2},
    "blocks": {"skip": "2a-3-5m"},
    "schedule": {"speedup": 2, "max_tokens": 32},
}


@pytest.fixture(scope="module")
def plain(engine: Callable[..., Any]) -> Any:
    return engine(vllm_spec_plugins.engine_args("none"))


@pytest.fixture(scope="module")
def engines(engine: Callable[..., Any], plain: Any) -> dict[str, Any]:
    return {name: engine(vllm_spec_plugins.engine_args("self-draft", **part, **EAGER)) for name, part in PARTS.items()}


POLICIES = ["entropy:1.5", "margin:0.3", "patience:2", "saturation:0.9"]


@pytest.mark.parametrize("policy", POLICIES)
def test_exit_policies_stop_drafts_and_leave_the_text_alone(
    policy: str, engine: Callable[..., Any], plain: Any, engines: dict[str, Any], prompts: list[list[int]]
) -> None:
    from vllm_spec_plugins.layers.exits import policy as parse

    sampling = [SAMPLINGS["mixed"](i) for i in range(6)]
    expected, _ = generate(plain, prompts[:6], sampling)
    one = drafter(engines["prefix"])
    rows = {"good": 0, "all": 0}
    one.policy = parse(policy)
    try:
        good = one.policy.good

        def count(signals: Any) -> torch.Tensor:
            assert signals.earlier.shape == (len(signals.tokens), one.policy.exits_needed - 1)
            assert torch.allclose(
                one.model.model.norm(signals.hidden) @ one.model.lm_head.weight.T, signals.logits, atol=1e-3
            )
            found = good(signals)
            rows["good"] += int(found.sum())
            rows["all"] += len(found)
            return found

        one.policy.good = count
        assert generate(engines["prefix"], prompts[:6], sampling)[0] == expected
    finally:
        one.policy = one.kept = None
    few = 0.01 if LANE else 0.05  # where shapes are fixed, most of the rows are of no request
    assert few < rows["good"] / rows["all"] < 1 - few


@pytest.mark.parametrize("kind", ["gate", "hash"])
def test_gates_and_tables_made_by_the_command_stop_drafts_and_leave_the_text_alone(
    kind: str,
    tmp_path: Path,
    engine: Callable[..., Any],
    plain: Any,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, data = tmp_path / kind, MODELS / "heldout_prompts.jsonl"
    given = ["--model", str(TARGET), "--data", str(data), "--output", str(file), "--exits", "4", "--bound", "0.7"]
    assert cli.main(["train", "exits", "--kind", kind, *given, "--windows", "64", "--length", "128"]) == 0
    policy = f"gate:{file}:0.7" if kind == "gate" else f"hash:{file}"
    llm = engine(vllm_spec_plugins.engine_args("self-draft", exit_layer=4, exit=policy, **EAGER))
    one, alone = drafter(llm), load_checkpoint(TARGET)
    good, grow = one.policy.good, one._grow
    rows, checked = {"good": 0, "all": 0}, 0
    seen: list[torch.Tensor] = []

    def count(signals: Any) -> torch.Tensor:
        found = good(signals)
        rows["good"] += int(found.sum())
        rows["all"] += len(found)
        seen.append(signals.hidden)
        return found

    def check(tree: Any, request: torch.Tensor, row: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """At roots, the policy sees what it was made from."""
        nonlocal checked
        logits = grow(tree, request, row, token)
        if not row.any() and checked < 10:
            text = one.req_states.all_token_ids.gpu[one.slots[0], : int(one.step.roots[0]) + 1]
            with torch.inference_mode():
                stream = alone.hidden(text[None].long(), exits=(4,))[0][0, -1]
            torch.testing.assert_close(seen[-1][0], stream, rtol=1e-3, atol=1e-3)
            checked += 1
        return logits

    one.policy.good = count
    monkeypatch.setattr(one, "_grow", check)
    sampling = [SAMPLINGS["mixed"](i) for i in range(6)]
    expected, _ = generate(plain, prompts[:6], sampling)
    assert generate(llm, prompts[:6], sampling)[0] == expected
    few = 0.01 if LANE else 0.05  # where shapes are fixed, most of the rows are of no request
    assert few < rows["good"] / rows["all"] < 1 - few
    assert checked == 10


def drafter(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.speculator.drafters[0]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", SAMPLINGS)
def test_text_is_plain_decodings(
    part: str, name: str, plain: Any, engines: dict[str, Any], prompts: list[list[int]]
) -> None:
    sampling = [SAMPLINGS[name](i) for i in range(12)]
    expected, _ = generate(plain, prompts[:12], sampling, TOKENS)
    assert generate(engines[part], prompts[:12], sampling, TOKENS)[0] == expected
    for i in range(2):
        found, speed = generate(engines[part], prompts[i : i + 1], sampling[i : i + 1], TOKENS)
        assert found == expected[i : i + 1]
        if name != "constrained":  # which also counts steps that wait for the grammar
            assert speed > 1.5


def test_the_part_says_in_the_engine_what_it_says_alone(
    engines: dict[str, Any], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the root and below it, behind prompts from the prefix cache too: two layers of eight over the text and the path."""
    alone, one, checked = load_checkpoint(TARGET), drafter(engines["prefix"]), 0
    grow = one._grow

    def check(tree: Any, request: torch.Tensor, row: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        nonlocal checked
        found = grow(tree, request, row, token)
        for line, (b, at) in enumerate(zip(request.tolist(), row.tolist(), strict=True)):
            # Where shapes are fixed there are rows for nodes that are not; nobody asks what they say.
            if line % 5 or (at and tree.tokens[b, at - 1] < 0):
                continue
            path: list[int] = []
            while at:
                path.insert(0, int(tree.tokens[b, at - 1]))
                at = int(tree.parents[b, at - 1])
            root = int(one.step.roots[b])
            text = one.req_states.all_token_ids.gpu[one.slots[b], : root + 1].tolist()
            with torch.inference_mode():
                stream = alone.hidden(torch.tensor([text + path]), exits=(2,))[0][0, -1]
                logits = rms_norm(stream, alone.norm) @ alone.head.T
            torch.testing.assert_close(found[line], logits, rtol=1e-3, atol=1e-3)
            checked += 1
        return found

    monkeypatch.setattr(one, "_grow", check)
    generate(engines["prefix"], prompts[:6], [SAMPLINGS["mixed"](i) for i in range(6)], max_tokens=24)
    longer = [(prompt * 12)[:200] for prompt in prompts[:2]]
    for _ in range(2):
        generate(engines["prefix"], longer, [SAMPLINGS["greedy"](0)] * 2, max_tokens=8)
    assert checked > 60


@pytest.mark.parametrize("part", PARTS)
def test_tight_memory_chunked_prompts_and_the_end_of_the_context_give_plain_decodings_text(
    part: str, engine: Callable[..., Any], plain: Any, prompts: list[list[int]]
) -> None:
    from vllm import SamplingParams

    small = {"max_num_batched_tokens": 32, "max_num_seqs": 4, "num_gpu_blocks_override": 9, "max_model_len": 160}
    given = {**PARTS[part], **EAGER, "nodes": 12}
    llm = engine(vllm_spec_plugins.engine_args("self-draft", **given), block_size=32, **small)
    sampling = [SAMPLINGS["mixed"](i) for i in range(8)]
    expected, _ = generate(plain, prompts[:8], sampling, max_tokens=40)
    assert generate(llm, prompts[:8], sampling, max_tokens=40)[0] == expected
    params = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
    outputs = [
        list(each.generate([{"prompt_token_ids": prompts[0]}], params, use_tqdm=False)[0].outputs[0].token_ids)
        for each in (plain, llm)
    ]
    assert len(outputs[1]) == 160 - len(prompts[0]) and outputs[1] == outputs[0][: len(outputs[1])]


def test_beside_lookahead_in_one_tree_the_text_is_plain_decodings(
    engine: Callable[..., Any], plain: Any, prompts: list[list[int]]
) -> None:
    given = ["lookahead:adapt=false", "self-draft:exit_layer=4,adapt=false"]
    llm = engine(vllm_spec_plugins.engine_args(given))
    sampling = [SAMPLINGS["mixed"](i) for i in range(12)]
    expected, _ = generate(plain, prompts[:12], sampling)
    assert generate(llm, prompts[:12], sampling)[0] == expected
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    _, _, right = runner.speculator.proposer.calibration.counts[-1].unbind(1)
    assert (right > 0).all(), "one of the two was never right"


def test_a_part_is_drafted_with_where_the_target_is_compiled(
    engine: Callable[..., Any], plain: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(specinfer, "LEVEL", 0.0)  # deep trees also where a level costs a whole pass
    # vLLM's way to have graphs on a CPU without their machine code, which takes half a minute to make; it leaves out the warm-up.
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")
    llm = engine(vllm_spec_plugins.engine_args("self-draft", exit_layer=2, **EAGER), enforce_eager=False)
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    runner.warming_up_model()
    assert runner.model.model.compiled
    sampling = [SAMPLINGS["greedy"](i) for i in range(4)]
    expected, _ = generate(plain, prompts[:4], sampling)
    found, _ = generate(llm, prompts[:4], sampling)
    assert found == expected
    # A deeper part guesses otherwise: had the plan been ignored, both would be the target's own guesses.
    _, shallow = generate(llm, prompts[:1], sampling[:1])
    drafter(llm).planner = FixedPlan(LayerPlan.full(8))
    _, deep = generate(llm, prompts[:1], sampling[:1])
    assert 1.2 * shallow < deep


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"exit_layer": 8}, "exit_layer=8 leaves nothing out of a model of 8 layers; use exit_layer=7 or less"),
        ({"skip": "3-9m"}, "skip=3-9m names layer 9; the model has layers 0 to 7"),
        ({"skip": "3,4"}, "skip=3,4 holds '3,4'; write layers with dashes between, as 3-4a-5m"),
        ({"exit_layer": 2, "skip": "3"}, "exit_layer and skip both say what drafts; give one of them"),
        ({"exit_layer": 2, "max_tokens": 9}, "max_tokens=9 belongs to speedup; give both"),
    ],
)
def test_parts_that_the_model_has_not_are_refused_before_the_engine_starts(
    settings: dict[str, Any], sentence: str, engine: Callable[..., Any]
) -> None:
    with pytest.raises(SettingError) as error:
        engine(vllm_spec_plugins.engine_args("self-draft", **settings))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_lora_adapters_are_refused(engine: Callable[..., Any]) -> None:
    with pytest.raises(SettingError, match="--enable-lora is not supported"):
        engine(vllm_spec_plugins.engine_args("self-draft", exit_layer=2), enable_lora=True)
