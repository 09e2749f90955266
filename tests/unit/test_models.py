# SPDX-License-Identifier: Apache-2.0
"""The committed checkpoints are what tests/models/README.md says they are."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.models.corpus import PROMPTS, VOCAB_SIZE, is_heldout
from tests.models.distill import HEADS
from tests.models.evaluate import evaluate, prompts
from tests.models.llama import load_checkpoint
from tests.models.train import EXITS, HERE

TARGET, DRAFT, MEDUSA = HERE / "target", HERE / "draft", HERE / "medusa"
TEXT = "def parse(self, line):\n    if not line:\n        return None\n"


def parameters(directory: Path) -> int:
    return sum(tensor.numel() for tensor in load_file(directory / "model.safetensors").values())


@cache
def figures() -> dict[str, float]:
    return evaluate(prompts(96))


@pytest.mark.parametrize("directory", [TARGET, DRAFT], ids=lambda d: d.name)
def test_transformers_and_the_training_code_compute_the_same_logits(directory: Path) -> None:
    ids = torch.tensor([AutoTokenizer.from_pretrained(directory)(TEXT)["input_ids"]])
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(load_checkpoint(directory).logits(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_sizes_are_those_of_a_tiny_family() -> None:
    config = AutoConfig.from_pretrained(TARGET)
    assert config.model_type == "llama"
    assert config.num_hidden_layers >= 8
    assert 4_000_000 <= parameters(TARGET) <= 8_000_000
    assert parameters(DRAFT) < 1_000_000
    assert AutoConfig.from_pretrained(DRAFT).vocab_size == config.vocab_size == VOCAB_SIZE
    weights = list(HERE.glob("*/*.safetensors"))
    assert {path.parent for path in weights} == {TARGET, DRAFT, MEDUSA}
    assert sum(path.stat().st_size for path in weights) < 25e6


def test_weights_are_bfloat16() -> None:
    for directory in (TARGET, DRAFT, MEDUSA):
        assert {t.dtype for t in load_file(directory / "model.safetensors").values()} == {torch.bfloat16}


def test_medusa_heads_have_the_names_and_shapes_that_vllm_reads() -> None:
    config = json.loads((MEDUSA / "config.json").read_text())
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    assert (config["model_type"], config["medusa_num_heads"], config["medusa_num_layers"]) == ("medusa", HEADS, 1)
    assert (hidden, vocab) == (AutoConfig.from_pretrained(TARGET).hidden_size, VOCAB_SIZE)
    shapes = {name: tuple(t.shape) for name, t in load_file(MEDUSA / "model.safetensors").items()}
    expected = {f"blocks.{k}.layers.0.weight": (hidden, hidden) for k in range(HEADS)}
    assert shapes == expected | {f"lm_heads.{k}.weight": (vocab, hidden) for k in range(HEADS)}


def test_target_and_draft_share_one_tokenizer_that_returns_any_text_unchanged() -> None:
    assert (TARGET / "tokenizer.json").read_bytes() == (DRAFT / "tokenizer.json").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    assert len(tokenizer) == VOCAB_SIZE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    for text in (TEXT, "  é漢字🙂\t\r\n\x00 ~", "<s> is a name, not text"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    chat = [{"role": "user", "content": "import os"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == "# user: import os\n\n"


def test_prompts_come_from_held_out_files_and_have_the_length_they_state() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    assert len(rows) == 512
    assert PROMPTS.stat().st_size < 400_000
    assert len({row["prompt"] for row in rows}) >= 500  # the draw may hit a line twice
    for row in rows:
        assert is_heldout(row["file"])
        assert 20 <= row["tokens"] <= 120
        assert len(tokenizer(row["prompt"])["input_ids"]) == row["tokens"]


def test_the_target_predicts_held_out_source_code() -> None:
    # The bound stands in tests/models/README.md. A model that knows the tokens' frequencies alone has 6.3 nats.
    assert figures()["full/loss"] < 3.2


def test_deeper_exits_are_better_and_closer_to_the_full_model() -> None:
    got = figures()
    order = [f"exit {n}" for n in EXITS]
    losses = [got[f"{name}/loss"] for name in order] + [got["full/loss"]]
    agreement = [got[f"{name}/agreement"] for name in order]
    assert losses == sorted(losses, reverse=True)
    assert agreement == sorted(agreement)
    assert agreement[0] > 0.5


def test_draft_and_heads_agree_with_the_target_and_nearer_heads_more() -> None:
    got = figures()
    assert got["draft/agreement"] > 0.4
    heads = [got[f"head {k}/top-5"] for k in range(1, HEADS + 1)]
    assert heads == sorted(heads, reverse=True)
    assert heads[0] > 0.35
