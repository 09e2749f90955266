# SPDX-License-Identifier: Apache-2.0
"""Gates and tables from text: what is recorded, what is learned from it, what is measured, and what self-draft makes of it."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.models.llama import load_checkpoint, rms_norm
from vllm_spec_plugins import registry
from vllm_spec_plugins.config import SettingError
from vllm_spec_plugins.layers.exits import policy
from vllm_spec_plugins.layers.recorded_exits import Gate, Hash
from vllm_spec_plugins.tools import cli
from vllm_spec_plugins.tools.train import data
from vllm_spec_plugins.tools.train.exits import ExitModel, Recording, figures, record, split, tables
from vllm_spec_plugins.tools.train.run import Checkpoint, TrainError
from vllm_spec_plugins.tools.train.skipdecode import decoder_layers

MODELS = Path(__file__).parents[2] / "models"
TARGET, TEXT = str(MODELS / "target"), MODELS / "heldout_prompts.jsonl"
CPU = torch.device("cpu")
EXITS = (2, 4, 6)


def nothing(name: str) -> Any:
    raise AssertionError(f"self-draft has no use for {name}")


SERVED = registry.Target(256, 4096, max_model_len=256, num_layers=8, lora=False, shapes=nothing, draft=nothing)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint(TARGET, CPU, torch.float32, False)


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> ExitModel:
    return ExitModel(checkpoint, EXITS, TARGET)


@pytest.fixture(scope="module")
def windows(checkpoint: Checkpoint) -> Tensor:
    """What RUN reads."""
    return data.spread(data.tokens(TEXT, checkpoint.tokenizer), 32, 100)


def reference(windows: Tensor) -> Recording:
    """The same by the tests' own model."""
    target = load_checkpoint(Path(TARGET))
    with torch.no_grad():
        *streams, last = target.hidden(windows, EXITS)
        answers = [(rms_norm(stream, target.norm) @ target.head.T).argmax(-1) for stream in (*streams, last)]
    agreed = torch.stack([answer == answers[-1] for answer in answers[:-1]], -1)
    return Recording(EXITS, windows.flatten(), agreed.flatten(0, 1), torch.stack(streams, 2).flatten(0, 1))


def test_the_residual_streams_and_the_agreement_at_the_exits_are_recorded(model: ExitModel, windows: Tensor) -> None:
    found, expected = record(model, windows[:9].split(4), keep_hidden=True), reference(windows[:9])
    assert torch.equal(found.tokens, windows[:9].flatten())
    torch.testing.assert_close(found.hidden, expected.hidden, rtol=1e-3, atol=1e-3)
    assert torch.equal(found.agreed, expected.agreed)
    assert 0.2 < found.agreed[:, 0].float().mean() < found.agreed[:, 2].float().mean() < 0.95
    assert record(model, windows[:2].split(1), keep_hidden=False).hidden.shape == (64, 3, 0)


def tiny(kind: str) -> Any:
    """What `Checkpoint` has, of a small random model of 4 layers."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    llama = {**sizes, "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8, "max_position_embeddings": 64}
    config = {
        "llama": lambda: transformers.LlamaConfig(**llama),
        "gemma2": lambda: transformers.Gemma2Config(**llama, sliding_window=6, query_pre_attn_scalar=8),
        "cohere": lambda: transformers.CohereConfig(**llama),
        "opt": lambda: transformers.OPTConfig(**sizes, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=24),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_positions=64),
        "bloom": lambda: transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=4, n_head=4),
    }[kind]()
    torch.manual_seed(3)
    made = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, weight in made.named_parameters():  # the initial ones leave the layers next to no say
        if weight.dim() > 1 and "embed" not in name:
            nn.init.normal_(weight, std=0.3)
    return SimpleNamespace(model=made, config=config.get_text_config())


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "opt", "gpt2", "bloom"])
def test_the_answer_at_an_exit_is_that_of_the_model_without_the_layers_behind_it(kind: str) -> None:
    checkpoint = tiny(kind)
    ids = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(5))
    expected = []
    for layer in (1, 3, 4):
        cut = copy.deepcopy(checkpoint.model)
        del decoder_layers(cut, 4, kind)[layer:]
        cut.config.num_hidden_layers = layer
        with torch.no_grad():
            expected.append(cut(input_ids=ids, use_cache=False).logits.argmax(-1))
    streams, answers = ExitModel(checkpoint, (1, 3), kind).read(ids)
    assert streams.shape == (3, 12, 2, 32)
    assert torch.equal(answers, torch.stack(expected, 2))
    assert not torch.equal(answers[..., 0], answers[..., 2])


def test_a_model_that_answers_from_more_than_its_last_layer_is_refused() -> None:
    odd, kept = tiny("llama"), []
    odd.model.model.layers[1].register_forward_hook(lambda module, args, output: kept.append(output))
    odd.model.model.norm.register_forward_pre_hook(lambda module, args: (args[0] + 3 * kept[-1].roll(1, -1),))
    with pytest.raises(TrainError, match="--model odd: its answer does not follow from what its last decoder layer"):
        ExitModel(odd, (1,), "odd")
    with pytest.raises(TrainError, match="--exits 4: leaves nothing out of a model of 4 layers; use 3 or less"):
        ExitModel(tiny("llama"), (2, 4), "llama")
    strange = tiny("llama")
    strange.config = SimpleNamespace(num_hidden_layers=5, vocab_size=64)
    with pytest.raises(TrainError, match="in which no one list holds the 5 decoder layers"):
        ExitModel(strange, (2,), "strange")


def test_the_last_windows_are_held_out() -> None:
    windows = torch.arange(40).view(20, 2)
    learned, held_out = split(windows, 0.1)
    assert torch.equal(torch.cat((learned, held_out)), windows) and len(held_out) == 2
    assert [len(split(windows[:2], share)[1]) for share in (0.01, 0.9)] == [1, 1]
    with pytest.raises(data.DataError, match="--data: gives one window of 2 tokens, and one is held out"):
        split(windows[:1], 0.1)


def test_figures_are_shares_of_the_rows(rng: torch.Generator) -> None:
    count, vocab = 500, 12
    tokens = torch.randint(vocab, (count,), generator=rng)
    agreed = torch.rand(count, 2, generator=rng) < 0.6
    recorded = Recording((2, 5), tokens, agreed, torch.randn(count, 2, 8, generator=rng))
    layers = torch.randint(1, 9, (vocab,), generator=rng).to(torch.int16)
    gate = Gate(0.7, (2, 5), torch.randn(2, 8, generator=rng), torch.zeros(2))
    never = Hash(0.0, torch.full((vocab,), 8, dtype=torch.int16))
    found = figures(recorded, {0.5: Hash(0.0, layers), 0.7: gate, 0.9: never})
    assert [(figure.exit, figure.bound) for figure in found] == [(e, b) for e in (2, 5) for b in (0.5, 0.7, 0.9)]
    for e, layer in enumerate((2, 5)):
        by_token, by_gate, none = found[3 * e : 3 * e + 3]
        early = [i for i in range(count) if layers[tokens[i]] <= layer]
        unit = recorded.hidden[:, e] / recorded.hidden[:, e].square().mean(1, keepdim=True).sqrt()
        sure = [i for i in range(count) if torch.sigmoid(unit[i] @ gate.weight[e]) >= 0.7]
        for figure, rows in ((by_token, early), (by_gate, sure)):
            assert figure.agreement == pytest.approx(agreed[:, e].sum().item() / count)
            assert figure.good == pytest.approx(len(rows) / count)
            # Drawn tables may let no row stop: one in thirty does at the first exit.
            right = pytest.approx(sum(bool(agreed[i, e]) for i in rows) / len(rows)) if rows else None
            assert figure.right == right
        assert (none.good, none.right) == (0.0, None)


COMMON = ["train", "exits", "--model", TARGET, "--data", str(TEXT), "--length", "32", "--windows", "100"]
RUN = [*COMMON, "--exits", "6", "2", "4"]


def trained(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, list[str], Any]:
    """What the command prints, the flags in it, and its JSON."""
    given = [*RUN, "--output", str(folder / "made"), "--json", str(folder / "figures.json"), *arguments]
    assert cli.main(given) == 0
    said = capsys.readouterr().out
    return said, re.findall(r"--plugin (\S+)", said), json.loads((folder / "figures.json").read_text())


def test_a_gate_learns_from_the_first_windows_and_is_measured_on_the_last(
    windows: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said, flags, written = trained(["--kind", "gate", "--bound", "0.75"], tmp_path, capsys)
    file = tmp_path / "made"
    assert "exits after 2, 4, 6 of 8 layers; 90 windows of 32 tokens to learn from, 10 held out" in said
    assert flags == [f"self-draft:exit_layer={layer},exit=gate:{file}:0.75" for layer in EXITS]
    for flag in flags:
        accept(flag)
    learned, rest = reference(windows[:90]), reference(windows[90:])
    made = policy(f"gate:{file}:0.75")
    assert isinstance(made, Gate) and made.exits == EXITS
    expected = Gate.train({layer: (learned.hidden[:, e], learned.agreed[:, e]) for e, layer in enumerate(EXITS)}, 0.75)
    torch.testing.assert_close(made.weight, expected.weight, rtol=1e-2, atol=1e-2)
    held_out = figures(rest, {0.75: expected})
    found = [figure for figure in written["held_out"] if figure["bound"] == 0.75]
    assert [figure["exit"] for figure in found] == list(EXITS)
    for figure, own in zip(found, held_out, strict=True):
        assert figure["agreement"] == pytest.approx(own.agreement)
        assert figure["good"] == pytest.approx(own.good, abs=0.02)
        assert f"{figure['good']:.3f}" in said and f"{figure['right']:.3f}" in said
    # What it calls good is right more often than an answer there is.
    assert all(figure["right"] > figure["agreement"] + 0.01 for figure in found)
    assert written["tokens"] == {"learned": 90 * 32, "held_out": 10 * 32}


def test_a_table_holds_the_exits_of_its_bound(
    model: ExitModel, windows: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said, flags, written = trained(
        ["--kind", "hash", "--bound", "0.65", "--prior", "3", "--held-out", "0.25"], tmp_path, capsys
    )
    file = tmp_path / "made"
    assert flags == [f"self-draft:exit_layer={layer},exit=hash:{file}" for layer in EXITS]
    for flag in flags:
        accept(flag)
    assert "the table written is that of bound 0.65" in said
    learned, rest = reference(windows[:75]), reference(windows[75:])
    made = policy(f"hash:{file}")
    assert isinstance(made, Hash)
    expected = tables(learned, [0.5, 0.65], model, prior=3.0)
    assert torch.equal(made.layers, expected[0.65].layers) and not torch.equal(made.layers, expected[0.5].layers)
    assert len(made.layers.unique()) > 2
    shares = {(figure["exit"], figure["bound"]): figure["good"] for figure in written["held_out"]}
    for own in figures(rest, expected):
        assert shares[own.exit, own.bound] == pytest.approx(own.good)


def accept(flag: str) -> None:
    """As the engine does before it starts."""
    settings = registry.resolve(flag)
    check = registry.method_of(settings).check
    assert check is not None
    check(settings, SERVED)


def test_self_draft_asks_for_a_gate_at_its_exit_layer_and_nowhere_else(tmp_path: Path) -> None:
    gate = Gate(0.5, (3, 6), torch.zeros(2, 256), torch.zeros(2))
    gate.save(tmp_path / "gate")
    given = f"exit=gate:{tmp_path}/gate:0.5"
    for part in ("exit_layer=3", "exit_layer=6", "skip=3-4-5-6-7", "skip=1-2m-6-7"):
        accept(f"self-draft:{part},{given}")
    for part, layer in (("exit_layer=2", 2), ("exit_layer=4", 4), ("skip=3", 8), ("speedup=2", 8)):
        with pytest.raises(SettingError) as error:
            accept(f"self-draft:{part},{given}")
        assert f"has no gate after layer {layer}; it has them after 3, 6" in str(error.value)
        assert "\n" not in str(error.value)
    for part in ("skip=auto,", ""):
        with pytest.raises(SettingError, match=r"has gates after layers 3, 6 alone, and a part .*; give exit_layer=6"):
            accept(f"self-draft:{part}{given}")


def test_policies_that_compare_exits_still_need_as_many() -> None:
    accept("self-draft:exit_layer=2,exit=saturation:0.9")
    accept("self-draft:exit_layer=3,exit=patience:3")
    accept("self-draft:exit_layer=1,exit=margin:0.3")
    with pytest.raises(SettingError, match=r"saturation:0\.9 compares 2 exits of a pass, and this one has 1"):
        accept("self-draft:exit_layer=1,exit=saturation:0.9")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--exits", "2", "8"], "--exits 8: leaves nothing out of a model of 8 layers; use 7 or less"),
        (["--exits", "4", "2", "4"], "--exits 4: is given 2 times; give it once"),
        (["--prior", "2"], "--prior: goes with --kind hash, and this is gate; leave it out"),
        (["--kind", "hash", "--penalty", "0"], "--penalty: goes with --kind gate, and this is hash; leave it out"),
        (["--output", "a,b"], "--output a,b: cannot be named in a --plugin flag, where ',' and ' & ' part settings"),
        (["--output", str(TEXT)], "is there already; choose another name"),
        (["--data", "nowhere.txt"], "--data nowhere.txt: is no file"),
        (["--model", "./nowhere"], "--model ./nowhere: cannot be loaded ("),
        (["--length", "1000000"], "too few for a window of 1000000"),
        (["--length", "20000"], "--data: gives one window of 20000 tokens, and one is held out; give more text"),
        (["--device", "nothing"], "--device nothing: cannot be used ("),
    ],
)
def test_wrong_input_stops_with_one_sentence(
    more: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*RUN, "--kind", "gate", "--output", str(tmp_path / "out"), *more]) == 2
    said = capsys.readouterr().out
    assert sentence in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [["--exits", "0"], ["--bound", "1.5"], ["--held-out", "0"], ["--windows", "1"]])
def test_numbers_out_of_range_are_refused(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([*RUN, "--kind", "gate", "--output", "never", *more])
    assert end.value.code == 2
    assert f"argument {more[0]}: {more[1]} is out of range" in capsys.readouterr().err
