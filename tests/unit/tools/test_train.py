# SPDX-License-Identifier: Apache-2.0
"""Training of Medusa heads: the text, the loss, interruptions, and what is written."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from vllm_spec_plugins.proposers.medusa import HeadShapes, MedusaHeads
from vllm_spec_plugins.tools import cli
from vllm_spec_plugins.tools.train import data
from vllm_spec_plugins.tools.train import medusa as trainer
from vllm_spec_plugins.tools.train.medusa import FrozenModel, Plan, TrainError, Training

MODELS = Path(__file__).parents[2] / "models"
TARGET, TEXT = str(MODELS / "target"), MODELS / "heldout_prompts.jsonl"
CPU = torch.device("cpu")
SMALL = Plan(model=TARGET, heads=3, tokens=8 * 4 * 32, batch=4, length=32, rate=2e-3)


@pytest.fixture(scope="module")
def base() -> FrozenModel:
    return FrozenModel(TARGET, CPU)


@pytest.fixture(scope="module")
def stream(base: FrozenModel) -> torch.Tensor:
    return data.tokens(TEXT, base.tokenizer)[:8000]


def with_(plan: Plan, **changes: Any) -> Plan:
    return Plan(**{**vars(plan), **changes})


def test_documents_are_lines_of_json_or_a_whole_text(tmp_path: Path, base: FrozenModel) -> None:
    lines, text = tmp_path / "a.jsonl", tmp_path / "a.txt"
    lines.write_text('{"text": "def f():"}\n\n{"prompt": "return 1", "id": 3}\n')
    text.write_text('{"text": "def f():"}\nreturn 1\n')
    assert list(data.documents(lines)) == ["def f():", "return 1"]
    assert list(data.documents(text)) == ['{"text": "def f():"}\nreturn 1\n']
    eos = base.tokenizer.eos_token_id
    pieces = data.tokens(lines, base.tokenizer).tolist()
    at = pieces.index(eos)
    assert base.tokenizer.decode(pieces[:at]) == "def f():"
    assert base.tokenizer.decode(pieces[at + 1 :]) == "return 1"
    assert base.tokenizer.decode(data.tokens(text, base.tokenizer)) == text.read_text()


def test_a_long_text_is_tokenized_in_parts_that_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "PIECE", 10)
    text = "one\ntwo three four five\nsix\n\nseven" * 3
    assert "".join(data._pieces(text)) == text
    assert max(map(len, data._pieces(text))) <= 10


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', 'a.jsonl, line 2: has no text under "text" or "prompt"'),
        ("a.jsonl", b'{"text": 3}\n', 'line 1: has no text under "text"'),
        ("a.json", b'["a"]\n', 'line 1: has no text under "text"'),
        ("a.jsonl", b"text\n", "line 1: is not JSON (Expecting value)"),
        ("a.txt", b"\xff\xfe", "is not UTF-8 text (invalid start byte at byte 0)"),
    ],
)
def test_a_file_that_is_no_text_is_refused(name: str, content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(data.DataError) as error:
        list(data.documents(tmp_path / name))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_every_window_is_trained_on_once_a_pass_and_held_out_ones_never() -> None:
    windows = data.Windows(torch.arange(10 * 203 + 7), length=10, seed=5)
    assert (len(windows.train), len(windows.held_out)) == (199, 4)
    assert windows.held_out[0, 0] == 1990
    passes = []
    for begin in (0, 199):
        firsts = [int(windows.batch(step, 1)[0, 0]) for step in range(begin, begin + 199)]
        assert sorted(firsts) == list(range(0, 1990, 10))
        passes.append(firsts)
    assert passes[0] != passes[1]
    assert torch.equal(windows.batch(3, 4), windows.batch(3, 4))
    with pytest.raises(data.DataError, match="has 19 tokens, too few for two windows of 10"):
        data.Windows(torch.arange(19), length=10, seed=0)


def test_the_hidden_state_is_what_the_lm_head_sees(base: FrozenModel, stream: torch.Tensor) -> None:
    ids = stream[:40].view(2, 20)
    hidden, logits = base.hidden_and_logits(ids)
    assert torch.equal(base.hidden(ids), hidden)
    assert torch.allclose(hidden @ base.lm_head.T, logits, atol=1e-4)
    # And it is a good one: the text is likelier under it than a uniform guess.
    assert cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) < 6


@pytest.mark.parametrize("labels", ["text", "model"])
def test_head_k_starts_as_the_lm_head_and_learns_the_token_k_places_further_on(
    labels: str, base: FrozenModel, stream: torch.Tensor
) -> None:
    training = Training(base, stream, with_(SMALL, labels=labels))
    ids = training.windows.batch(0, 4)
    _, logits = base.hidden_and_logits(ids)
    expected = []
    for k in (1, 2, 3):
        rows = []
        for b in range(4):
            for t in range(32 - 3 - 1):
                guess = logits[b, t].log_softmax(-1)
                true = logits[b, t + k].softmax(-1) if labels == "model" else None
                rows.append(-guess[ids[b, t + k + 1]] if true is None else -(true * guess).sum())
        expected.append(torch.stack(rows).mean())
    assert torch.allclose(training.advance(), torch.stack(expected), atol=1e-3)


@pytest.mark.parametrize("change", [{}, {"labels": "model", "layers": 2}, {"share_lm_head": True}])
def test_the_loss_falls_and_what_is_written_is_what_was_trained(
    change: dict[str, Any], base: FrozenModel, stream: torch.Tensor, tmp_path: Path
) -> None:
    # Eight windows, twelve times over.
    training = Training(base, stream[: 9 * 32], with_(SMALL, tokens=24 * 4 * 32, **change))
    losses = []
    while training.step < training.plan.steps:
        losses.append(training.advance())
    assert (torch.stack(losses[-2:]).mean(0) < torch.stack(losses[:2]).mean(0) - 0.5).all()
    training.heads.save(tmp_path, base.dtype)
    assert base.dtype == torch.bfloat16
    weights = load_file(tmp_path / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    assert HeadShapes.of(shapes) == HeadShapes(heads=3, layers=training.plan.layers, hidden=256, vocab=4096)
    assert len([name for name in weights if name.startswith("lm_head")]) == (1 if training.plan.share_lm_head else 3)
    hidden = base.hidden(stream[:20].view(1, 20))[0]
    served = MedusaHeads(weights.items(), 3, 4096, CPU, torch.float32)(hidden)
    with torch.no_grad():
        trained = torch.stack([training.heads(hidden, head) for head in range(3)], 1)
    assert torch.allclose(served, trained, atol=0.1)
    assert (served[:, 0] - hidden @ base.lm_head.T).abs().max() > 0.5


def test_agreement_counts_the_first_guesses_that_are_the_models_own(base: FrozenModel, stream: torch.Tensor) -> None:
    training = Training(base, stream, SMALL)
    held_out = training.windows.held_out
    best = base.hidden_and_logits(held_out)[1].argmax(-1)
    # Before any training a head says what the model says one place too early for it.
    expected = [float((best[:, :28] == best[:, k : k + 28]).float().mean()) for k in (1, 2, 3)]
    assert training.agreement() == pytest.approx(expected)


def test_the_rate_rises_and_falls_to_nothing(base: FrozenModel, stream: torch.Tensor) -> None:
    training = Training(base, stream, with_(SMALL, tokens=100 * 4 * 32, warmup=0.1))
    rates = []
    for training.step in range(100):
        rates.append(training.rate())
    assert max(rates) == pytest.approx(SMALL.rate)
    assert rates[:10] == pytest.approx([SMALL.rate * (i + 1) / 10 for i in range(10)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] < 0.01 * SMALL.rate


ARGUMENTS = [
    "train",
    "medusa",
    "--model",
    TARGET,
    "--data",
    str(TEXT),
    "--heads",
    "2",
    "--batch",
    "2",
    "--length",
    "32",
]


def test_an_interrupted_run_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*ARGUMENTS, "--tokens", str(6 * 2 * 32)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli.main([*arguments, "--save-every", "0", "--output", str(whole)]) == 0
    assert "first guess is the model's" in capsys.readouterr().out

    steps = []
    advance = Training.advance

    def interrupted(self: Training) -> torch.Tensor:
        steps.append(self.step)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)  # in the middle of a step
        return advance(self)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Training, "advance", interrupted)
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments, "--output", str(parts)])
    assert end.value.code == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert [file.name for file in parts.iterdir()] == ["training.state"]

    for more, sentence in (
        ([], "holds an interrupted run; add --resume"),
        (["--resume", "--lr", "0.5"], "is of a run with rate=0.001, this one has rate=0.5"),
    ):
        capsys.readouterr()
        assert cli.main([*arguments, *more, "--output", str(parts)]) == 2
        assert sentence in capsys.readouterr().out
    assert cli.main([*arguments, "--resume", "--output", str(parts)]) == 0
    assert steps == [0, 1, 2, 3, 4, 5]
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert sorted(file.name for file in parts.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((parts / "config.json").read_text())["medusa_num_heads"] == 2


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--data", "nowhere.txt"], "--data nowhere.txt: is no file"),
        (["--model", "./nowhere"], "--model ./nowhere: cannot be loaded ("),
        (["--resume"], "holds no interrupted run; leave --resume out"),
        (["--length", "3"], "--length 3: holds no example for 2 heads; use at least 4"),
        (["--tokens", "5"], "are 64 tokens a step, the run has 5; give more text or --tokens"),
        (["--length", "1000000"], "too few for two windows of 1000000"),
        (["--device", "tpu9"], "--device tpu9: cannot be used ("),
    ],
)
def test_wrong_input_stops_with_one_sentence(
    more: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*ARGUMENTS, "--output", str(tmp_path / "heads"), *more]) == 2
    said = capsys.readouterr().out
    assert sentence in said
    assert said.count("\n") == 1


def test_a_folder_with_a_model_is_not_written_over(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*ARGUMENTS, "--output", TARGET]) == 2
    assert "holds a model already; choose another folder" in capsys.readouterr().out


@pytest.mark.parametrize("flag", [["--heads", "0"], ["--lr", "2"], ["--warmup", "often"]])
def test_a_number_out_of_range_is_refused_before_anything_is_loaded(
    flag: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([*ARGUMENTS, "--output", str(tmp_path), *flag])
    assert end.value.code == 2
    assert flag[0] in capsys.readouterr().err


def test_a_loss_that_is_no_number_ends_the_run(
    base: FrozenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "cross_entropy", lambda logits, labels: logits.sum() * float("nan"))
    assert cli.main([*ARGUMENTS, "--output", str(tmp_path / "heads")]) == 2
    assert "the loss is no number after 1 steps" in capsys.readouterr().out


def test_a_state_of_another_text_or_none_at_all_is_refused(
    base: FrozenModel, stream: torch.Tensor, tmp_path: Path
) -> None:
    training = Training(base, stream, SMALL)
    training.save(tmp_path / "state")
    Training(base, stream, SMALL).load(tmp_path / "state")
    with pytest.raises(TrainError, match="is of a run on another text"):
        Training(base, stream[1:], SMALL).load(tmp_path / "state")
    (tmp_path / "state").write_bytes(b"not a state")
    with pytest.raises(TrainError, match="cannot be read"):
        training.load(tmp_path / "state")
