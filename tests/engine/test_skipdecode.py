# SPDX-License-Identifier: Apache-2.0
"""SkipDecode on engines beside a plain PyTorch one: the same text, whatever shares the batch, the cache and the memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import vllm_spec_plugins
from tests.engine import decoding
from tests.engine.conftest import TARGET
from tests.engine.skipdecode_reference import Decoder, falling
from vllm_spec_plugins.config import SettingError
from vllm_spec_plugins.engine import activation, salts, skipdecode

# Settings, and the layers that the first and the last token get by them.
SCHEDULES: dict[str, tuple[dict[str, Any], int, int]] = {
    "half": ({"speedup": 2, "max_tokens": 32}, 5, 3),
    "half, a line": ({"speedup": 2, "max_tokens": 32, "levels": 0, "warmup": 2}, 5, 3),
    "a quarter, no warm-up": ({"speedup": 4, "max_tokens": 24, "warmup": 0}, 3, 1),
    "a quarter, a line": ({"speedup": 4, "max_tokens": 28, "levels": 0}, 3, 1),
    "all to two": ({"max_layers": 8, "min_layers": 2, "max_tokens": 32, "warmup": 2}, 8, 2),
    "all to one, a line": ({"max_layers": 8, "min_layers": 1, "max_tokens": 40, "levels": 0, "warmup": 0}, 8, 1),
}
STEEP = "all to one, a line"
BLOCK = 32
# Prompts in chunks of at most 34 tokens beside the others' rows; blocks for about two requests of eight.
TIGHT = {"max_num_batched_tokens": 34, "max_model_len": 192, "num_gpu_blocks_override": 8}


@pytest.fixture(scope="module")
def requests(prompts: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """Eight prompts of 9 to 86 tokens, and how many to generate."""
    cut = [prompt[: 9 + 11 * i] for i, prompt in enumerate(p for p in prompts if len(p) >= 86)][:8]
    assert len(cut) == 8
    return cut, [20 + 5 * (i * 3 % 8) for i in range(8)]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    from tests.models.llama import load_checkpoint

    return Decoder(load_checkpoint(TARGET))


@pytest.fixture(scope="module")
def expected(decoder: Decoder) -> Callable[..., list[list[int]]]:
    """What the reference gives under a schedule."""
    known: dict[str, list[list[int]]] = {}

    def texts(name: str, prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
        settings, high, low = SCHEDULES[name]
        budget = falling(high, low, settings["max_tokens"], settings.get("levels", 4))
        if (key := f"{name} {prompts} {counts}") not in known:
            pairs = zip(prompts, counts, strict=True)
            known[key] = [decoder.text(prompt, n, settings.get("warmup", 1), budget) for prompt, n in pairs]
        return known[key]

    return texts


@pytest.fixture(scope="module")
def start(engine: Callable[..., Any]) -> Callable[..., Any]:
    """Starts an engine with a schedule, once; its K/V memory holds random numbers."""
    made: dict[str, Any] = {}

    def make(name: str, **settings: Any) -> Any:
        if (key := f"{name} {settings}") not in made:
            plugin = vllm_spec_plugins.engine_args("skipdecode", **SCHEDULES[name][0])
            made[key] = engine(plugin, block_size=BLOCK, **{"kv_cache_memory_bytes": 1 << 25, **settings})
        poison(made[key])
        return made[key]

    return make


def poison(llm: Any) -> None:
    """Fill all K/V memory with random numbers, so that what no row wrote is not zero by luck."""
    generator = torch.Generator().manual_seed(0)
    llm.reset_prefix_cache()
    for layer in llm.llm_engine.vllm_config.compilation_config.static_forward_context.values():
        layer.kv_cache.normal_(generator=generator)


def params(counts: list[int], **others: Any) -> list[Any]:
    from vllm import SamplingParams

    return [SamplingParams(**{"temperature": 0.0, "max_tokens": n, "ignore_eos": True, **others}) for n in counts]


def generate(llm: Any, prompts: list[list[int]], counts: list[int], **others: Any) -> list[list[int]]:
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    results = llm.generate(given, params(counts, **others), use_tqdm=False)
    return [list(result.outputs[0].token_ids) for result in results]


def joining(llm: Any, prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
    """The same, with a new request every fourth step."""
    texts: dict[str, list[int]] = {}
    waiting = list(enumerate(zip(prompts, params(counts), strict=True)))
    step = 0
    while waiting or llm.llm_engine.has_unfinished_requests():
        if waiting and step % 4 == 0:
            number, (prompt, sampling) = waiting.pop(0)
            llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
        for output in llm.llm_engine.step():
            if output.finished:
                texts[output.request_id] = list(output.outputs[0].token_ids)
        step += 1
    return [texts[str(number)] for number in range(len(prompts))]


def preemptions(llm: Any) -> float:
    return next(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


def model_state(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.model_state


@pytest.mark.parametrize("name", SCHEDULES)
def test_text_is_the_references_alone_and_in_batches(
    name: str, start: Callable[..., Any], expected: Any, requests: Any
) -> None:
    prompts, counts = requests
    llm = start(name)
    texts = expected(name, prompts, counts)
    assert generate(llm, prompts[5:6], counts[5:6]) == texts[5:6]
    assert generate(llm, prompts[:3], counts[:3]) == texts[:3]
    assert generate(llm, prompts, counts) == texts


@pytest.mark.parametrize("name", SCHEDULES)
def test_text_is_the_references_under_chunked_prefill_and_preemption(
    name: str, start: Callable[..., Any], expected: Any, requests: Any
) -> None:
    prompts, counts = requests
    llm = start(name, **TIGHT)
    before = preemptions(llm)
    assert generate(llm, prompts, counts) == expected(name, prompts, counts)
    assert preemptions(llm) - before >= 2


@pytest.mark.parametrize("name", ["half", STEEP])
def test_text_is_the_references_when_requests_join_in_the_middle(
    name: str, start: Callable[..., Any], expected: Any, requests: Any
) -> None:
    assert joining(start(name), *requests) == expected(name, *requests)


@pytest.mark.parametrize(
    ("name", "as_seen"),
    [
        pytest.param(STEEP, lambda places: np.full_like(places, places.min()), id="the deepest row of the batch"),
        pytest.param(STEEP, lambda places: np.full_like(places, places.max()), id="the shallowest row of the batch"),
        pytest.param("half", lambda places: np.maximum(places, 0), id="prompts at reduced depth"),
        pytest.param(STEEP, lambda places: places - 1, id="a place too early"),
    ],
)
def test_no_other_depth_gives_the_references_text(
    name: str,
    as_seen: Callable[[Any], Any],
    start: Callable[..., Any],
    expected: Any,
    requests: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = skipdecode.places
    monkeypatch.setattr(skipdecode, "places", lambda batch, lengths: as_seen(own(batch, lengths)))
    assert joining(start(name), *requests) != expected(name, *requests)


def test_a_preempted_request_is_computed_again_by_its_schedule_and_not_as_a_prompt(
    start: Callable[..., Any], expected: Any, requests: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = start(STEEP, **TIGHT)
    state = model_state(llm)
    own = state.add_request

    def add_request(slot: int, new: Any) -> None:
        own(slot, new)
        state._prompt_len[slot] = len(new.prefill_token_ids)

    monkeypatch.setattr(state, "add_request", add_request)
    assert generate(llm, *requests) != expected(STEEP, *requests)


def second_turn(llm: Any, prompts: list[list[int]], answers: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """Texts behind the prompts with their answers and some tokens more, and how many tokens came from the cache."""
    turns = [{"prompt_token_ids": p + a + prompts[0]} for p, a in zip(prompts, answers, strict=True)]
    results = llm.generate(turns, params([24] * len(turns)), use_tqdm=False)
    return [list(result.outputs[0].token_ids) for result in results], [result.num_cached_tokens for result in results]


def test_the_prefix_cache_gives_prompts_and_no_generated_token(
    start: Callable[..., Any], expected: Any, requests: Any
) -> None:
    prompts, counts = requests
    llm = start(STEEP)
    answers = expected(STEEP, prompts, counts)
    assert generate(llm, prompts, counts) == answers

    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    again = llm.generate(given, params(counts), use_tqdm=False)
    assert [list(result.outputs[0].token_ids) for result in again] == answers
    assert [result.num_cached_tokens for result in again] == [(len(p) - 1) // BLOCK * BLOCK for p in prompts]

    texts, cached = second_turn(llm, prompts, answers)
    assert cached == [len(prompt) // BLOCK * BLOCK for prompt in prompts]
    turns = [p + a + prompts[0] for p, a in zip(prompts, answers, strict=True)]
    assert texts == expected(STEEP, turns, [24] * len(turns))


def test_without_salts_a_second_turn_reads_what_was_never_computed(
    start: Callable[..., Any], expected: Any, requests: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, counts = requests
    llm = start(STEEP)
    monkeypatch.setattr(llm.llm_engine.engine_core.engine_core.scheduler, "_spec_schedule", None)
    answers = generate(llm, prompts, counts)
    assert answers == expected(STEEP, prompts, counts)
    texts, cached = second_turn(llm, prompts, answers)
    assert sum(cached) > sum(len(prompt) // BLOCK * BLOCK for prompt in prompts)
    turns = [p + a + prompts[0] for p, a in zip(prompts, answers, strict=True)]
    assert texts != expected(STEEP, turns, [24] * len(turns))
    llm.reset_prefix_cache()


def test_only_blocks_that_end_behind_the_prompt_are_salted(start: Callable[..., Any]) -> None:
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.request import Request

    scheduler = start("half").llm_engine.engine_core.engine_core.scheduler
    request = Request("0", [5] * 40, params([4])[0], None, cache_salt="mine")
    other = Request("1", [5] * 40, params([4])[0], None)
    salts.mark(scheduler, request)
    salt = ("skipdecode", (8, 5, 3, 1, 32, 4, 40))
    for module in (kv_cache_utils, block_pool):  # hashes, events
        keys = module.generate_block_hash_extra_keys
        assert keys(request, 0, 32, 0) == ((("cache_salt", "mine"),), 0)
        assert keys(request, 0, 40, 0) == keys(request, 0, 32, 0)
        assert keys(request, 32, 64, 0) == keys(request, 40, 41, 0) == ((salt,), 0)
        assert keys(request, 0, 64, 0) == ((("cache_salt", "mine"), salt), 0)
        assert keys(other, 32, 64, 0) == (None, 0)


@pytest.mark.parametrize("kind", ["mixed", "constrained"])
def test_requests_of_every_kind_get_the_same_text_alone_and_among_others(
    kind: str, start: Callable[..., Any], requests: Any
) -> None:
    prompts, llm = requests[0], start("half")
    sampling = [decoding.SAMPLINGS[kind](i) for i in range(len(prompts))]
    together, _ = decoding.generate(llm, prompts, sampling, max_tokens=40)
    assert together != generate(llm, prompts, [40] * len(prompts))
    for i in (0, 2, 3, 7):
        assert decoding.generate(llm, prompts[i : i + 1], sampling[i : i + 1], max_tokens=40)[0] == together[i : i + 1]


def test_engines_without_a_schedule_in_the_same_process_run_all_layers(
    engine: Callable[..., Any], start: Callable[..., Any], decoder: Decoder, expected: Any, requests: Any
) -> None:
    prompts, counts = requests[0][:3], requests[1][:3]
    scheduled, plain, vllms = start(STEEP), engine(vllm_spec_plugins.engine_args("none")), engine(None)
    full = [decoder.text(p, n, 0, lambda _: 8) for p, n in zip(prompts, counts, strict=True)]
    for _ in range(2):
        assert generate(scheduled, prompts, counts) == expected(STEEP, prompts, counts) != full
        assert generate(plain, prompts, counts) == full
        assert generate(vllms, prompts, counts) == full


def test_steps_at_one_depth_build_no_metadata_of_their_own_and_leave_nothing_behind(
    start: Callable[..., Any], requests: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are equally deep cost the layers that they run, and no more."""
    parts = []
    own = skipdecode.part_of
    monkeypatch.setattr(skipdecode, "part_of", lambda *given: parts.append(given) or own(*given))
    llm = start("half")
    generate(llm, requests[0], [40] * 8)  # which begin in one step, and stay together
    assert parts == []
    joining(llm, requests[0][:3], [12] * 3)
    assert parts
    assert not any("forward" in vars(module) for module in model_state(llm).layers.layers)


def test_a_pass_that_fails_leaves_nothing_behind(start: Callable[..., Any], requests: Any) -> None:
    llm = start("half", max_num_seqs=2)
    state = model_state(llm)
    last = state.layers.layers[-1]

    def fail(*_: Any, **__: Any) -> None:
        assert any("forward" in vars(layer) for layer in state.layers.layers[:-1])
        raise ZeroDivisionError

    llm.llm_engine.add_request("0", {"prompt_token_ids": requests[0][0]}, params([9])[0])
    llm.llm_engine.step()
    handle = last.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        llm.llm_engine.step()
    handle.remove()
    assert not any("forward" in vars(layer) for layer in state.layers.layers)
    assert state._step is None


def test_a_compiled_model_follows_the_schedule(
    start: Callable[..., Any], expected: Any, requests: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its control flow is baked in: steps with a schedule must leave it out."""
    prompts, counts = requests[0][:3], requests[1][:3]
    # vLLM's way to have graphs on a CPU without their machine code, which takes half a minute to make; it leaves out the warm-up.
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")
    llm = start(STEEP, enforce_eager=False)
    llm.llm_engine.model_executor.driver_worker.worker.model_runner.warming_up_model()
    inner = model_state(llm).layers.model.model
    assert not inner.do_not_compile and inner.compiled
    texts = expected(STEEP, *requests)[:3]
    assert joining(llm, prompts, counts) == texts
    monkeypatch.setattr(skipdecode, "skip_compiled", lambda: None)
    assert generate(llm, prompts[1:2], counts[1:2]) != texts[1:2]


def test_the_start_says_that_it_is_lossy_and_by_how_much(engine: Callable[..., Any]) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("vllm").addHandler(handler)
    engine(vllm_spec_plugins.engine_args("skipdecode", max_layers=8, min_layers=2))
    logging.getLogger("vllm").removeHandler(handler)
    assert [line for line in lines if "lossy" in line] == [
        "--plugin skipdecode is lossy: the later a token of an answer, the fewer layers it runs: 8, 6, 4, 2 of 8 layers over "
        "256 tokens, 5.0 on average, the first 1 always"
    ]


@pytest.mark.parametrize(
    ("settings", "others", "sentence"),
    [
        (
            {"max_layers": 12, "min_layers": 4},
            {},
            "max_layers=12 is more than the 8 layers of the model; use max_layers=8",
        ),
        ({"speedup": 2, "warmup": 9}, {}, "warmup=9 is more than the 8 layers of the model"),
        ({"speedup": 2}, {"enable_lora": True}, "--enable-lora, which names an adapter per row"),
        ({"speedup": 2}, {"speculative_config": {"method": "ngram"}}, "conflicts with --speculative-config"),
    ],
)
def test_what_cannot_work_is_refused_before_the_engine_starts(
    settings: dict[str, Any], others: dict[str, Any], sentence: str, engine: Callable[..., Any]
) -> None:
    with pytest.raises(SettingError) as error:
        engine(vllm_spec_plugins.engine_args("skipdecode", **settings), **others)
    assert sentence in str(error.value)
    assert str(error.value).startswith("--plugin skipdecode: ")
    assert "\n" not in str(error.value)
    activation.clear()


def test_a_prompt_in_pieces_is_refused(start: Callable[..., Any], requests: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    llm = start("half")
    processor = llm.llm_engine.input_processor
    given = {"type": "token", "prompt_token_ids": requests[0][0]}
    tasks = llm.llm_engine.get_supported_tasks()
    processor.process_inputs("0", given, params([4])[0], tasks)
    with pytest.raises(VLLMValidationError, match="a prompt that comes in pieces cannot be served"):
        processor.process_inputs("1", given, params([4])[0], tasks, resumable=True)
