# SPDX-License-Identifier: Apache-2.0
"""Medusa heads on an engine beside plain decoding: the same text, and candidates that meet the target's draws."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import vllm_spec_plugins
from tests.engine import compare
from tests.engine.conftest import MODELS
from tests.engine.decoding import SAMPLINGS, generate
from vllm_spec_plugins.config import SettingError
from vllm_spec_plugins.engine import sampler
from vllm_spec_plugins.tools import cli

HEADS = MODELS / "medusa"
# The chance threshold is for speed: without it trees are full, and branch.
FULL = {"model": str(HEADS), "min_chance": 0.0, "adapt": False}


@pytest.fixture(scope="module")
def plain(engine: Callable[..., Any]) -> Any:
    return engine(vllm_spec_plugins.engine_args("none"))


@pytest.fixture(scope="module")
def medusa(engine: Callable[..., Any], plain: Any) -> Any:
    return engine(vllm_spec_plugins.engine_args("medusa", **FULL))


@pytest.fixture(scope="module")
def typical(engine: Callable[..., Any], plain: Any) -> Any:
    """With what was logged at its start."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("vllm").addHandler(handler)
    llm = engine(vllm_spec_plugins.engine_args("medusa", **FULL, accept="typical"))
    logging.getLogger("vllm").removeHandler(handler)
    llm.logged = lines
    return llm


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("together", [1, 12])
def test_text_is_plain_decodings(name: str, together: int, plain: Any, medusa: Any, prompts: list[list[int]]) -> None:
    prompts = prompts[: max(together, 3)]
    sampling = [SAMPLINGS[name](i) for i in range(len(prompts))]
    expected, _ = generate(plain, prompts, sampling)
    for begin in range(0, len(prompts), together):
        part = slice(begin, begin + together)
        found, speed = generate(medusa, prompts[part], sampling[part])
        assert found == expected[part]
        if together == 1 and name != "constrained":  # whose first steps wait for the grammar
            assert speed > 1.2


def test_a_fixed_trees_text_is_plain_decodings(
    engine: Callable[..., Any], plain: Any, prompts: list[list[int]]
) -> None:
    settings = {"model": str(HEADS), "adapt": False, "choices": "mc_sim_7b_63"}
    llm = engine(vllm_spec_plugins.engine_args("medusa", **settings))
    assert llm.llm_engine.vllm_config.num_speculative_tokens == 63
    sampling = [SAMPLINGS[name](i) for i, name in enumerate(["greedy", "sampled", "mixed", "mixed"])]
    expected, _ = generate(plain, prompts[:4], sampling)
    assert generate(llm, prompts[:4], sampling)[0] == expected
    alone, speed = generate(llm, prompts[:1], sampling[:1])
    assert alone == expected[:1]
    assert speed > 1.5


@pytest.mark.cpu_lane("loops are compiled there only")
def test_a_trees_loops_are_compiled_at_the_start_for_what_serving_gives_them(medusa: Any, prompts: Any) -> None:
    from vllm_spec_plugins.tree import ranks_loops

    generate(medusa, prompts[:3], [SAMPLINGS["mixed"](i) for i in range(3)])
    for loop in (ranks_loops.ranked, ranks_loops.judge, ranks_loops.rank_chances):
        assert len(loop.signatures) == 1


def test_coupled_candidates_meet_more_draws_than_the_likeliest(
    medusa: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = [{"temperature": 1.0, "seed": i} for i in range(6)]

    def tokens_per_step() -> float:
        speeds = [generate(medusa, [prompt], [each])[1] for prompt, each in zip(prompts, sampling, strict=False)]
        return sum(speeds) / len(speeds)

    coupled = tokens_per_step()
    state = medusa.llm_engine.model_executor.driver_worker.worker.model_runner.req_states.tree_state
    monkeypatch.setattr(state, "likeliest", lambda logits, rows, slots, position, count: logits.topk(count, 1)[::-1])
    assert coupled > tokens_per_step() + 0.1


@pytest.mark.parametrize("name", ["greedy", "sampled", "mixed"])
def test_logprobs_of_accepted_tokens_are_plain_decodings(
    name: str, plain: Any, medusa: Any, prompts: list[list[int]]
) -> None:
    sampling = [{**SAMPLINGS[name](i), "logprobs": 5} for i in range(8)]
    limits = {"max_tokens": 32, "ignore_eos": True}
    expected = compare.generate(plain, prompts[:8], sampling, **limits)
    for found, other in zip(compare.generate(medusa, prompts[:8], sampling, **limits), expected, strict=True):
        compare.assert_same_logprobs(found, other)


def test_typical_acceptance_is_plain_decoding_for_greedy_requests_also_beside_sampled_ones(
    plain: Any, typical: Any, prompts: list[list[int]]
) -> None:
    greedy = [SAMPLINGS["greedy"](i) for i in range(8)]
    expected, _ = generate(plain, prompts[:8], greedy)
    assert generate(typical, prompts[:8], greedy)[0] == expected
    mixed = [{"temperature": 0.8 * (i % 2), "seed": i} for i in range(8)]
    assert generate(typical, prompts[:8], mixed)[0][::2] == expected[::2]


def test_typical_acceptance_is_lossy_faster_and_says_so(
    plain: Any, medusa: Any, typical: Any, prompts: list[list[int]]
) -> None:
    sampling = [{"temperature": 0.8, "seed": i} for i in range(6)]

    def alone(llm: Any) -> tuple[list[list[int]], float]:
        runs = [generate(llm, [prompt], [each]) for prompt, each in zip(prompts, sampling, strict=False)]
        return [text[0] for text, _ in runs], sum(speed for _, speed in runs) / len(runs)

    (walked, slow), (kept, fast) = alone(medusa), alone(typical)
    print(slow, fast)
    assert walked == generate(plain, prompts[:6], sampling)[0]
    assert kept != walked
    assert fast > slow + 0.1
    sentences = [line for line in typical.logged if "lossy" in line]
    assert sentences == [
        "--plugin medusa: accept=typical is lossy: sampled text is not plain decoding's (greedy text is)"
    ]


def test_logprobs_of_what_typical_acceptance_kept_are_the_models(
    plain: Any, typical: Any, prompts: list[list[int]]
) -> None:
    """Whatever the text has become, plain decoding gives its tokens these probabilities."""
    from vllm import SamplingParams

    sampling = [{"temperature": 0.8, "seed": i, "logprobs": 5} for i in range(4)]
    outputs = compare.generate(typical, prompts[:4], sampling, max_tokens=32, ignore_eos=True)
    for prompt, output in zip(prompts, outputs, strict=False):
        text = {"prompt_token_ids": prompt + list(output.token_ids)}
        (scored,) = plain.generate(text, SamplingParams(max_tokens=1, prompt_logprobs=5), use_tqdm=False)
        expected = scored.prompt_logprobs[len(prompt) :]
        for token, mine, other in zip(output.token_ids, output.logprobs, expected, strict=True):
            assert mine.keys() == other.keys() and token in mine
            assert all(mine[each].logprob == pytest.approx(other[each].logprob, abs=1e-4) for each in mine)


def test_heads_in_the_original_layout_serve(
    engine: Callable[..., Any], plain: Any, tmp_path: Any, prompts: Any
) -> None:
    named = {}
    for name, tensor in load_file(HEADS / "model.safetensors").items():
        parts = name.split(".")
        new = f"{parts[1]}.{parts[3]}.linear.weight" if parts[0] == "blocks" else f"{parts[1]}.1.weight"
        named[new] = tensor
    save_file(named, tmp_path / "medusa_lm_head.safetensors")
    llm = engine(vllm_spec_plugins.engine_args("medusa", **{**FULL, "model": str(tmp_path), "depth": 3}))
    sampling = [SAMPLINGS["greedy"](i) for i in range(4)]
    found, _ = generate(llm, prompts[:4], sampling)
    assert found == generate(plain, prompts[:4], sampling)[0]


def test_heads_that_were_just_trained_serve(
    engine: Callable[..., Any], plain: Any, tmp_path: Any, prompts: Any
) -> None:
    arguments = ["--model", str(MODELS / "target"), "--data", str(MODELS / "heldout_prompts.jsonl")]
    arguments += ["--output", str(tmp_path / "heads")]
    sizes = ["--heads", "2", "--share-lm-head", "--length", "64", "--tokens", str(40 * 8 * 64), "--lr", "3e-3"]
    assert cli.main(["train", "medusa", *arguments, *sizes]) == 0
    settings = {**FULL, "model": str(tmp_path / "heads"), "depth": 2}
    llm = engine(vllm_spec_plugins.engine_args("medusa", **settings))
    sampling = [SAMPLINGS["mixed"](i) for i in range(4)]
    found, _ = generate(llm, prompts[:4], sampling)
    assert found == generate(plain, prompts[:4], sampling)[0]
    assert generate(llm, prompts[:1], sampling[:1])[1] > 1.3


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model": "no/such/folder"}, "no/such/folder is neither a folder nor a hub id"),
        ({"model": str(MODELS / "target")}, "no Medusa heads among its tensors"),
        ({"model": str(MODELS)}, "holds no "),
        ({"model": str(HEADS), "choices": "0/0.0/0.0.0/0.0.0.0/0.0.0.0.0"}, "asks for 5 heads, "),
        ({"model": str(HEADS), "depth": 5}, "depth=5 asks for more heads than the 4 of"),
    ],
)
def test_heads_that_cannot_be_used_are_refused_before_the_engine_starts(
    settings: dict[str, Any], sentence: str, engine: Callable[..., Any]
) -> None:
    with pytest.raises(SettingError) as error:
        engine(vllm_spec_plugins.engine_args("medusa", **settings))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_heads_of_another_model_are_refused(engine: Callable[..., Any], tmp_path: Any) -> None:
    import torch

    save_file(
        {"blocks.0.layers.0.weight": torch.zeros(128, 128), "lm_heads.0.weight": torch.zeros(4096, 128)},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(
        SettingError, match="heads for a hidden size of 128 and 4096 tokens, the target has 256 and 4096"
    ):
        engine(vllm_spec_plugins.engine_args("medusa", model=str(tmp_path)))


def test_the_sampler_is_asked_for_candidates(medusa: Any) -> None:
    """Were the ranking not the sampler's, sampled text would still be right, and slow."""
    state = medusa.llm_engine.model_executor.driver_worker.worker.model_runner.req_states.tree_state
    assert state.likeliest.func is sampler.likeliest
