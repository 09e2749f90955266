# SPDX-License-Identifier: Apache-2.0
"""Draft models on an engine beside plain decoding: the same text, a draft that reads what it would read alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vllm_spec_plugins
from tests.engine.conftest import LANE, MODELS
from tests.engine.decoding import SAMPLINGS, generate
from tests.models.llama import load_checkpoint
from vllm_spec_plugins.config import SettingError

DRAFT = MODELS / "draft"
FULL = {"model": str(DRAFT), "min_chance": 0.0, "adapt": False}


@pytest.fixture(scope="module")
def plain(engine: Callable[..., Any]) -> Any:
    return engine(vllm_spec_plugins.engine_args("none"))


@pytest.fixture(scope="module")
def specinfer(engine: Callable[..., Any], plain: Any) -> Any:
    return engine(vllm_spec_plugins.engine_args("specinfer", **FULL))


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("together", [1, 12])
def test_text_is_plain_decodings(
    name: str, together: int, plain: Any, specinfer: Any, prompts: list[list[int]]
) -> None:
    prompts = prompts[: max(together, 3)]
    sampling = [SAMPLINGS[name](i) for i in range(len(prompts))]
    expected, _ = generate(plain, prompts, sampling)
    for begin in range(0, len(prompts), together):
        part = slice(begin, begin + together)
        found, speed = generate(specinfer, prompts[part], sampling[part])
        assert found == expected[part]
        if together == 1 and name != "constrained":  # which also counts steps that wait for the grammar
            assert speed > 1.5


def drafter(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.speculator.drafters[0]


def test_the_draft_says_in_the_engine_what_it_says_alone(
    specinfer: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its K/V of prompts, of kept nodes and of rows read again is that of the text; each level sees its own path."""
    alone, one = load_checkpoint(DRAFT), drafter(specinfer)
    checked = {"begin": 0, "extend": 0}

    def logits_of(text: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return alone.logits(torch.tensor([text]))[0, -1]

    def text_of(b: int) -> list[int]:
        root = int(one.step.roots[b])
        return one.req_states.all_token_ids.gpu[one.slots[b], : root + 1].tolist()

    begin, extend = one.begin, one.extend

    def check_begin(ctx: Any) -> torch.Tensor:
        found = begin(ctx)
        for b in range(len(ctx.slots)):
            if ctx.num_emitted[b] > 0:
                torch.testing.assert_close(found[b], logits_of(text_of(b)), rtol=1e-3, atol=1e-3)
                checked["begin"] += 1
        return found

    def check_extend(tree: Any, request: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        found = extend(tree, request, row)
        for line, (b, at) in enumerate(zip(request.tolist(), row.tolist(), strict=True)):
            # Where shapes are fixed there are rows for nodes that are not; nobody asks what they say.
            if line % 5 == 0 and not (at and tree.tokens[b, at - 1] < 0):
                path: list[int] = []
                while at:
                    path.insert(0, int(tree.tokens[b, at - 1]))
                    at = int(tree.parents[b, at - 1])
                torch.testing.assert_close(found[line], logits_of(text_of(b) + path), rtol=1e-3, atol=1e-3)
                checked["extend"] += 1
        return found

    monkeypatch.setattr(one, "begin", check_begin)
    monkeypatch.setattr(one, "extend", check_extend)
    sampling = [SAMPLINGS["mixed"](i) for i in range(6)]
    generate(specinfer, prompts[:6], sampling, max_tokens=24)
    # A second turn over text whose blocks are in the prefix cache.
    longer = [(prompt * 12)[:200] for prompt in prompts[:2]]
    for _ in range(2):
        generate(specinfer, longer, sampling[:2], max_tokens=8)
    assert checked["begin"] > 40 and checked["extend"] > 80


def test_kept_nodes_are_not_read_again(
    specinfer: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, counts = drafter(specinfer), []
    read = one._read

    def count(*given: Any) -> torch.Tensor:
        if LANE:  # from where, to where, at most
            seen, ends, _ = given
            counts.append(int((ends - seen).sum()))
        else:  # of which requests, from where, how many
            counts.append(int(given[2].sum()))
        return read(*given)

    monkeypatch.setattr(one, "_read", count)
    found, speed = generate(specinfer, prompts[:1], [{"temperature": 0.0}])
    assert counts[0] == len(prompts[0]) + 1  # the prompt and the first root, once
    # The rest: every root, and nodes of the last level, which the draft proposes and does not read.
    assert sum(counts[1:]) < len(found[0]) * 0.8
    assert speed > 1.5


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A second draft model: the target's first two layers, its norm and its LM head, which were trained to exit there."""
    folder = tmp_path_factory.mktemp("models") / "shallow"
    shutil.copytree(MODELS / "target", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    tensors = load_file(folder / "model.safetensors")
    kept = {
        name: t for name, t in tensors.items() if not name.startswith(tuple(f"model.layers.{i}." for i in range(2, 8)))
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("settings", [{}, {"widths": "2-1-1"}])
def test_two_draft_models_make_one_tree_and_plain_decodings_text(
    settings: dict[str, Any], engine: Callable[..., Any], plain: Any, prompts: list[list[int]], shallow: str
) -> None:
    given = {"model": f"{DRAFT}+{shallow}", "adapt": False, **settings}
    llm = engine(vllm_spec_plugins.engine_args("specinfer", **given))
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    assert [len(each.layers) for each in runner.speculator.drafters] == [2, 2]
    assert runner.speculator.proposer.num_nodes == (2 * (2 + 2 + 2) if settings else 24)
    sampling = [SAMPLINGS["mixed"](i) for i in range(12)]
    expected, _ = generate(plain, prompts[:12], sampling)
    assert generate(llm, prompts[:12], sampling)[0] == expected
    found, speed = generate(llm, prompts[:1], sampling[:1])
    assert found == expected[:1]
    assert speed > 1.5
    _, _, right = runner.speculator.proposer.calibration.counts[-1].unbind(1)
    assert (right > 0).all(), "one of the drafts was never right"


@pytest.mark.parametrize("settings", [{"widths": "1-1-1-1"}, {"widths": "3-2"}, {"nodes": 24, "depth": 6}])
def test_other_shapes_and_tight_memory_give_plain_decodings_text(
    settings: dict[str, Any], engine: Callable[..., Any], plain: Any, prompts: list[list[int]]
) -> None:
    """Chunked prompts, preemption, the end of the context."""
    given = {"model": str(DRAFT), "adapt": False, **settings}
    small = {"max_num_batched_tokens": 32, "max_num_seqs": 4, "num_gpu_blocks_override": 9, "max_model_len": 160}
    llm = engine(vllm_spec_plugins.engine_args("specinfer", **given), block_size=32, **small)
    sampling = [SAMPLINGS["mixed"](i) for i in range(8)]
    expected, _ = generate(plain, prompts[:8], sampling, max_tokens=40)
    assert generate(llm, prompts[:8], sampling, max_tokens=40)[0] == expected
    assert llm.llm_engine.engine_core.engine_core.scheduler.num_spec_tokens > 0
    from vllm import SamplingParams

    to_the_end = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
    outputs = [
        each.generate([{"prompt_token_ids": prompts[0]}], to_the_end, use_tqdm=False)[0].outputs[0]
        for each in (plain, llm)
    ]
    ours = list(outputs[1].token_ids)
    assert len(ours) == 160 - len(prompts[0]) and ours == list(outputs[0].token_ids)[: len(ours)]


def test_a_draft_that_was_left_out_for_a_while_reads_what_it_missed(
    engine: Callable[..., Any], plain: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_spec_plugins.engine.governor import Governor

    steps = iter(range(10**6))
    monkeypatch.setattr(Governor, "asks", lambda self, batch: next(steps) % 7 == 0)
    llm = engine(vllm_spec_plugins.engine_args("specinfer", **{**FULL, "adapt": True}))
    sampling = [SAMPLINGS["mixed"](i) for i in range(6)]
    assert generate(llm, prompts[:6], sampling)[0] == generate(plain, prompts[:6], sampling)[0]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model": "no/such/folder"}, "no/such/folder is neither a folder nor a hub id"),
        ({"model": str(MODELS)}, "cannot be used"),
        ({"model": str(MODELS / "medusa")}, "cannot be used"),
    ],
)
def test_drafts_that_cannot_be_used_are_refused_before_the_engine_starts(
    settings: dict[str, Any], sentence: str, engine: Callable[..., Any]
) -> None:
    with pytest.raises(SettingError) as error:
        engine(vllm_spec_plugins.engine_args("specinfer", **settings))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def _changed(tmp_path: Any, **config: Any) -> str:
    """A copy of the draft's folder with another configuration."""
    folder = tmp_path / "draft"
    shutil.copytree(DRAFT, folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return str(folder)


def test_a_draft_with_another_vocabulary_is_refused(engine: Callable[..., Any], tmp_path: Any) -> None:
    with pytest.raises(SettingError, match="has a vocabulary of 5000 tokens, the target one of 4096"):
        engine(vllm_spec_plugins.engine_args("specinfer", model=_changed(tmp_path, vocab_size=5000)))


def test_a_draft_with_another_tokenizer_is_refused(engine: Callable[..., Any], tmp_path: Any) -> None:
    folder = _changed(tmp_path)
    file = f"{folder}/tokenizer.json"
    with open(file) as stream:
        tokenizer = json.load(stream)
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    with open(file, "w") as stream:
        json.dump(tokenizer, stream)
    with pytest.raises(SettingError, match="gives other token ids than the target's"):
        engine(vllm_spec_plugins.engine_args("specinfer", model=folder))


def test_a_draft_that_reads_less_than_the_engine_serves_is_refused(engine: Callable[..., Any], tmp_path: Any) -> None:
    with pytest.raises(SettingError, match="reads at most 128 tokens, the engine serves up to 384; start with"):
        engine(vllm_spec_plugins.engine_args("specinfer", model=_changed(tmp_path, max_position_embeddings=128)))
