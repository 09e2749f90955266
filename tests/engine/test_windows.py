# SPDX-License-Identifier: Apache-2.0
"""Models whose layers see the last tokens only, all of them or every second one: trees give plain decoding's text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import vllm_spec_plugins
from tests.engine.conftest import LANE, TARGET
from tests.engine.oracle import Oracle
from vllm_spec_plugins import compiled
from vllm_spec_plugins.engine import attention

WINDOW, TOKENS = 260, 16 if LANE else 40
LENGTHS = (235, 260, 340) if LANE else (180, 235, 259, 260, 300, 340)
KINDS = {"all layers": ["sliding_attention"] * 2, "every second": ["sliding_attention", "full_attention"]}


@dataclass
class Windowed:
    """A model with windows, and what plain decoding makes of prompts that end before, at and behind one."""

    path: Path
    prompts: list[list[int]]
    texts: list[list[int]]
    params: list[Any]
    plain: Any


def outputs(llm: Any, prompts: list[list[int]], params: list[Any]) -> list[list[int]]:
    results = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [list(result.outputs[0].token_ids) for result in results]


def sampling() -> list[Any]:
    from vllm import SamplingParams

    kinds: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9, "seed": 5}]
    return [SamplingParams(max_tokens=TOKENS, ignore_eos=True, **kinds[i % 2]) for i in range(len(LENGTHS))]


@pytest.fixture(scope="module", params=KINDS)
def windowed(
    request: pytest.FixtureRequest,
    engine: Callable[..., Any],
    prompts: list[list[int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Windowed:
    path = tmp_path_factory.mktemp("windowed") / "model"
    shutil.copytree(TARGET, path)
    config = json.loads((path / "config.json").read_text())
    kinds = KINDS[request.param]
    config |= {
        "sliding_window": WINDOW,
        "layer_types": [kinds[i % 2] for i in range(config["num_hidden_layers"])],
    }
    (path / "config.json").write_text(json.dumps(config))
    whole = [token for prompt in prompts for token in prompt]
    chosen = [whole[150 * i :][:length] for i, length in enumerate(LENGTHS)]
    llm = engine(vllm_spec_plugins.engine_args("none"), model=str(path), max_model_len=512)
    texts = [p + o for p, o in zip(chosen, outputs(llm, chosen, sampling()), strict=True)]
    return Windowed(path, chosen, texts, sampling(), llm)


@pytest.fixture(scope="module")
def served(windowed: Windowed, engine: Callable[..., Any]) -> tuple[Any, Oracle]:
    """Prompts come in chunks, beside others' trees; blocks are scarce, so that those in front of a window are used again."""
    tight = {"max_num_batched_tokens": 96, "block_size": 32, "num_gpu_blocks_override": 48}
    llm = engine(vllm_spec_plugins.engine_args("oracle"), model=str(windowed.path), max_model_len=512, **tight)
    return llm, Oracle.instances[-1]


@pytest.mark.parametrize("loops", [True, False], ids=["loops", "tensors"])
def test_text_is_plain_decodings(
    windowed: Windowed, served: tuple[Any, Oracle], loops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "use_loops", loops)
    llm, oracle = served
    oracle.prepare(windowed.texts)
    found = outputs(llm, windowed.prompts, windowed.params)
    assert [p + o for p, o in zip(windowed.prompts, found, strict=True)] == windowed.texts
    assert oracle.accepted > len(windowed.prompts) * TOKENS / 4, "the hidden truth was hardly ever found"


def test_a_second_turn_reads_cached_blocks_and_is_plain_decodings(
    windowed: Windowed, served: tuple[Any, Oracle]
) -> None:
    llm, oracle = served
    params = windowed.params[:1] * len(windowed.texts)
    expected = outputs(windowed.plain, windowed.texts, params)
    oracle.prepare([t + o for t, o in zip(windowed.texts, expected, strict=True)])
    for text, continuation in zip(windowed.texts, expected, strict=True):
        llm.reset_prefix_cache()
        outputs(llm, [text[:-TOKENS]], params[:1])  # writes K/V through trees
        (result,) = llm.generate({"prompt_token_ids": text}, params[0], use_tqdm=False)
        assert list(result.outputs[0].token_ids) == continuation


def test_tree_rows_that_see_beyond_their_window_give_another_text(
    windowed: Windowed, served: tuple[Any, Oracle], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, oracle = served
    oracle.prepare(windowed.texts)
    llm.reset_prefix_cache()
    with monkeypatch.context() as patch:
        if LANE:
            patch.setattr("vllm_spec_plugins.engine.triton_attention.window_of", lambda impl: 0)
        else:
            attend = attention.attend_tree
            patch.setattr(attention, "attend_tree", lambda *given: attend(*given[:-1], 0))
        found = outputs(llm, windowed.prompts, windowed.params)
    llm.reset_prefix_cache()
    wrong = [p + o != t for p, o, t in zip(windowed.prompts, found, windowed.texts, strict=True)]
    assert not any(w for w, text in zip(wrong, windowed.texts, strict=True) if len(text) <= WINDOW)
    assert sum(wrong) >= len(LENGTHS) // 3
