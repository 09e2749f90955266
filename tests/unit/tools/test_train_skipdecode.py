# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning for SkipDecode: a window's pass is the schedule row by row; the loss, interruptions, what is written."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding, linear, silu

from tests.models.llama import Llama, load_checkpoint, rms_norm, rotate
from vllm_spec_plugins.layers.schedule import Schedule
from vllm_spec_plugins.tools import cli
from vllm_spec_plugins.tools.train import data
from vllm_spec_plugins.tools.train.run import Checkpoint, TrainError
from vllm_spec_plugins.tools.train.skipdecode import (
    ScheduledModel,
    SkipDecodePlan,
    SkipDecodeTraining,
    decoder_layers,
    mean_loss,
    rows_of_layers,
)

MODELS = Path(__file__).parents[2] / "models"
TARGET, TEXT = str(MODELS / "target"), MODELS / "heldout_prompts.jsonl"
CPU = torch.device("cpu")
SCHEDULES = [
    Schedule(8, 7, 2, warmup=1, max_tokens=12, levels=0),
    Schedule(8, 6, 2, warmup=2, max_tokens=16, levels=4),
    Schedule(8, 5, 1, warmup=0, max_tokens=20, levels=4),
    Schedule(8, 8, 8, warmup=0, max_tokens=5, levels=2),
    Schedule(8, 1, 1, warmup=1, max_tokens=5, levels=0),
]
LOW = Schedule(8, 3, 2, warmup=1, max_tokens=16, levels=4)
SMALL = SkipDecodePlan(model=TARGET, schedule=LOW, prompt=(4, 12), tokens=8 * 4 * 32, batch=4, length=32, rate=1e-3)


def load() -> ScheduledModel:
    return ScheduledModel(Checkpoint(TARGET, CPU, torch.float32, False), TARGET)


@pytest.fixture(scope="module")
def base() -> ScheduledModel:
    """The target; not to be trained on."""
    return load()


@pytest.fixture(scope="module")
def stream(base: ScheduledModel) -> Tensor:
    return data.tokens(TEXT, base.checkpoint.tokenizer)[:8000]


def with_(plan: SkipDecodePlan, **changes: Any) -> SkipDecodePlan:
    return SkipDecodePlan(**{**vars(plan), **changes})


def row_by_row(model: Llama, ids: Tensor, schedule: Schedule, prompt: int) -> Tensor:
    """Logits [R, V] of `ids` [R], one row after the other, each layer with the K/V of the rows that ran it so far."""
    keys: list[list[Tensor]] = [[] for _ in model.per_layer]
    values: list[list[Tensor]] = [[] for _ in model.per_layer]
    size, out = model.shape.head_dim, []
    for at, token in enumerate(ids):
        budget = schedule.num_layers if at < prompt else schedule.budget(at - prompt)
        runs = schedule.plan(budget).attention
        assert sum(runs) == budget
        cos, sin = model.cos[at : at + 1], model.sin[at : at + 1]  # type: ignore[index]
        x = embedding(token, model["model.embed_tokens.weight"])
        for layer, (ln1, ln2, wq, wk, wv, wo, gate, up, down) in enumerate(model.per_layer):
            if not runs[layer]:
                continue
            assert len(keys[layer]) == at, "K/V of an earlier row is missing"
            h = rms_norm(x, ln1)
            q, k, v = (linear(h, w).view(-1, 1, size) for w in (wq, wk, wv))
            keys[layer].append(rotate(k, cos, sin))
            values[layer].append(v)
            groups = q.shape[0] // k.shape[0]
            seen, read = (torch.cat(t[layer], 1).repeat_interleave(groups, 0) for t in (keys, values))
            chance = (rotate(q, cos, sin) @ seen.mT / size**0.5).softmax(-1)
            x = x + linear((chance @ read).flatten(), wo)
            h = rms_norm(x, ln2)
            x = x + linear(silu(linear(h, gate)) * linear(h, up), down)
        out.append(linear(rms_norm(x, model.norm), model.head))
    return torch.stack(out)


@torch.no_grad()
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_windows_pass_is_the_schedule_row_by_row(schedule: Schedule, base: ScheduledModel, stream: Tensor) -> None:
    reference = load_checkpoint(Path(TARGET))
    begin = random.Random(7).randrange(4000)
    ids = stream[begin : begin + 56].view(2, 28)
    whole = base.logits(ids, None, 1, 28)
    for prompt in (1, 5, 27):
        expected = torch.stack([row_by_row(reference, row, schedule, prompt) for row in ids])
        found = base.logits(ids, schedule, prompt, 28)
        assert torch.allclose(found, expected, atol=1e-4), prompt
        assert torch.allclose(found[:, -3:], base.logits(ids, schedule, prompt, 3), atol=1e-4)
        # The schedule is in effect, behind the prompt alone.
        assert torch.allclose(found[:, :prompt], whole[:, :prompt], atol=1e-4)
        assert torch.allclose(found, whole, atol=1e-2) == (schedule.min_layers == 8)


def test_rows_that_run_a_layer_are_the_first_ones() -> None:
    for schedule in SCHEDULES:
        for prompt in (1, 9):
            counts = rows_of_layers(schedule, prompt, 40)
            for layer, count in enumerate(counts):
                budgets = [8] * prompt + [schedule.budget(i) for i in range(40 - prompt)]
                assert [layer in range(8) and schedule.plan(b).attention[layer] for b in budgets] == [
                    row < count for row in range(40)
                ]


def tiny(kind: str) -> Any:
    """A random model of 4 layers."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    llama = {**sizes, "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8, "max_position_embeddings": 64}
    config = {
        "qwen2": lambda: transformers.Qwen2Config(
            **llama, use_sliding_window=True, sliding_window=5, max_window_layers=2
        ),
        "qwen3": lambda: transformers.Qwen3Config(**llama),
        "mistral": lambda: transformers.MistralConfig(**llama, sliding_window=6),
        "gemma": lambda: transformers.GemmaConfig(**llama),
        "gemma2": lambda: transformers.Gemma2Config(**llama, sliding_window=6, query_pre_attn_scalar=8),
        "gemma3": lambda: transformers.Gemma3TextConfig(**llama, sliding_window=6, query_pre_attn_scalar=8),
        "opt": lambda: transformers.OPTConfig(**sizes, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_positions=64),
        "bloom": lambda: transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=4, n_head=4),
    }[kind]()
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():  # the initial ones leave the layers next to no say
        if weight.dim() > 1 and "embed" not in name:
            nn.init.normal_(weight, std=0.3)
    return SimpleNamespace(model=model, config=config.get_text_config())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "opt", "gpt2"])
def test_models_of_other_families_run_the_schedule_too(kind: str) -> None:
    """Against layers that compute all rows and whose output is then put back to their input behind the layer's last row."""
    checkpoint = tiny(kind)
    model, ids = checkpoint.model, torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(5))
    schedule = Schedule(4, 3, 1, warmup=1, max_tokens=8, levels=0)
    counts = rows_of_layers(schedule, 6, 20)
    assert len(set(counts)) > 2
    layers = decoder_layers(model, 4, kind)
    whole = model(input_ids=ids).logits

    def put_back(layer: nn.Module, count: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            joined = torch.cat((hidden[:, :count], args[0][:, count:]), 1)
            return (joined, *output[1:]) if isinstance(output, tuple) else joined

        return layer.register_forward_hook(hook)

    hooks = [put_back(layer, count) for layer, count in zip(layers, counts, strict=True)]
    expected = model(input_ids=ids).logits
    for hook in hooks:
        hook.remove()
    scheduled = ScheduledModel(checkpoint, kind)
    assert torch.allclose(scheduled.logits(ids, schedule, 6, 20), expected, atol=1e-4)
    assert (expected - whole)[:, 6:].abs().max() > 0.01
    assert torch.allclose(scheduled.logits(ids, None, 6, 20), whole, atol=1e-5)


def test_a_model_whose_layers_cannot_be_told_or_cut_is_refused() -> None:
    checkpoint = tiny("qwen3")
    with pytest.raises(
        TrainError, match="in which no one list holds the 5 decoder layers; use a model built like Llama"
    ):
        decoder_layers(checkpoint.model, 5, "odd")
    checkpoint.model.model.more = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    with pytest.raises(TrainError, match="no one list holds the 4"):
        decoder_layers(checkpoint.model, 4, "odd")
    # A list inside of a layer is no list of layers.
    del checkpoint.model.model.more
    checkpoint.model.model.layers[0].experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    assert decoder_layers(checkpoint.model, 4, "experts") is checkpoint.model.model.layers
    with pytest.raises(TrainError, match="--model b: its layers take alibi, of which it is not known how to skip rows"):
        ScheduledModel(tiny("bloom"), "b")


def test_the_loss_is_that_of_the_tokens_that_scheduled_rows_predict(base: ScheduledModel, stream: Tensor) -> None:
    ids = stream[100:164].view(2, 32)
    with torch.no_grad():
        logits = base.logits(ids[:, :-1], LOW, 10, 31)
        every = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        assert base.loss(ids, LOW, 10).item() == pytest.approx(every[:, 10:].mean().item(), abs=1e-5)
        assert base.loss(ids, LOW, 10, answer_only=False).item() == pytest.approx(every.mean().item(), abs=1e-5)
        windows = stream[:160].view(5, 32)
        apart = [base.loss(row[None], LOW, 10).item() for row in windows]
    assert mean_loss(base, windows, LOW, 10, batch=2) == pytest.approx(sum(apart) / 5, abs=1e-5)


def test_gradients_reach_no_layer_that_the_answer_does_not_run(base: ScheduledModel, stream: Tensor) -> None:
    ids = stream[200:264].view(2, 32)
    lowest = Schedule(8, 2, 2, warmup=2, max_tokens=4, levels=0)  # an answer runs layers 0 and 1
    for answer_only, reached in ((True, {0, 1}), (False, set(range(8)))):
        base.model.zero_grad(set_to_none=True)
        base.loss(ids, lowest, 10, answer_only).backward()
        norms = [
            sum(w.grad.abs().sum().item() for w in layer.parameters() if w.grad is not None) for layer in base.layers
        ]
        assert {layer for layer, norm in enumerate(norms) if norm > 0} == reached
    # Over the prompt's K/V in the layers at the top, the layers between learn from the answer too.
    base.model.zero_grad(set_to_none=True)
    base.loss(ids, Schedule(8, 2, 2, warmup=1, max_tokens=4, levels=0), 10).backward()
    assert all(layer.self_attn.k_proj.weight.grad.abs().sum() > 0 for layer in base.layers)
    assert base.layers[6].mlp.down_proj.weight.grad.abs().sum() > 0
    base.model.zero_grad(set_to_none=True)


def test_training_lowers_the_schedules_loss_and_what_is_written_is_what_was_trained(
    stream: Tensor, tmp_path: Path
) -> None:
    # Eight windows, six times over.
    base = load()
    training = SkipDecodeTraining(base, stream[: 9 * 32], with_(SMALL, tokens=12 * 4 * 32))
    before = mean_loss(base, training.windows.train, LOW, 8, 4)
    while training.step < training.plan.steps:
        training.advance()
    assert mean_loss(base, training.windows.train, LOW, 8, 4) < before - 0.5
    training.write(tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "skipdecode.json"} <= names
    assert names >= {file.name for file in Path(TARGET).iterdir()}
    assert Schedule(**json.loads((tmp_path / "skipdecode.json").read_text())) == LOW
    written, given = load_file(tmp_path / "model.safetensors"), load_file(f"{TARGET}/model.safetensors")
    assert {name: (w.shape, w.dtype) for name, w in written.items()} == {
        name: (w.shape, w.dtype) for name, w in given.items()
    }
    assert not torch.equal(written["lm_head.weight"], given["lm_head.weight"])
    ids = stream[:40].view(2, 20)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(again(input_ids=ids).logits, base.logits(ids, None, 1, 20), atol=1e-5)
    held_out = training.held_out()
    loaded = ScheduledModel(Checkpoint(str(tmp_path), CPU, torch.float32, False), "written")
    for schedule, loss in zip((None, LOW), held_out, strict=True):
        assert mean_loss(loaded, training.windows.held_out, schedule, 8, 4) == pytest.approx(loss, abs=1e-5)


def test_budgets_fall_to_the_schedules_over_the_first_part_of_the_run(base: ScheduledModel, stream: Tensor) -> None:
    training = SkipDecodeTraining(base, stream, with_(SMALL, tokens=100 * 4 * 32, anneal=0.5))
    plans = []
    for training.step in range(100):
        plans.append(training.schedule())
    assert plans[0].min_layers == 8
    assert [plan.average for plan in plans] == sorted((plan.average for plan in plans), reverse=True)
    assert len({plan.key for plan in plans}) > 4
    assert plans[40] != LOW
    assert plans[49:] == [LOW] * 51
    training = SkipDecodeTraining(base, stream, SMALL)
    assert training.schedule() == LOW


def test_prompts_are_drawn_from_the_whole_range_and_alike_for_the_same_step(
    base: ScheduledModel, stream: Tensor
) -> None:
    one, two = (SkipDecodeTraining(base, stream, with_(SMALL, prompt=(4, 7), seed=9)) for _ in range(2))
    drawn = []
    for one.step in range(60):
        drawn.append(one.prompt())
    assert set(drawn) == {4, 5, 6, 7}
    two.step = 41
    assert two.prompt() == drawn[41]


def test_windows_to_evaluate_on_lie_at_even_distances() -> None:
    found = data.spread(torch.arange(107), 10, 4)
    assert found[:, 0].tolist() == [0, 32, 64, 97]
    assert (found - found[:, :1] == torch.arange(10)).all()
    assert len(data.spread(torch.arange(107), 10, 50)) == 10
    assert data.spread(torch.arange(10), 10, 3).tolist() == [list(range(10))]
    with pytest.raises(data.DataError, match="has 9 tokens, too few for a window of 10"):
        data.spread(torch.arange(9), 10, 1)


COMMON = ["train", "skipdecode", "--model", TARGET, "--data", str(TEXT), "--batch", "2", "--length", "32"]
ARGUMENTS = [*COMMON, "--prompt", "4-12"]
RUN = [*ARGUMENTS, "--speedup", "3", "--max-tokens", "16"]


def test_an_interrupted_run_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*RUN, "--tokens", str(4 * 2 * 32), "--anneal", "0.5"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli.main([*arguments, "--output", str(whole)]) == 0
    said = capsys.readouterr().out
    assert "3 to 2 of 8 layers over 16 tokens, 2.50 on average" in said
    assert f"vllm serve {whole} --plugin skipdecode:max_layers=3,min_layers=2,warmup=1,max_tokens=16,levels=4" in said

    advance = SkipDecodeTraining.advance

    def interrupted(self: SkipDecodeTraining) -> Tensor:
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)  # in the middle of a step
        return advance(self)

    monkeypatch.setattr(SkipDecodeTraining, "advance", interrupted)
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments, "--output", str(parts)])
    assert end.value.code == 130
    monkeypatch.undo()
    capsys.readouterr()
    assert cli.main([*arguments, "--resume", "--levels", "2", "--output", str(parts)]) == 2
    assert "is of a run with schedule=" in capsys.readouterr().out
    (parts / "model.safetensors").write_bytes(b"half of a file")  # as one that was cut off while writing leaves it
    assert cli.main([*arguments, "--resume", "--output", str(parts)]) == 0
    assert "going on from step 3" in capsys.readouterr().out
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not (parts / "training.state").exists()


def test_evaluate_prints_both_losses_and_changes_nothing(
    base: ScheduledModel, stream: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*RUN, "--evaluate", "--windows", "6"]) == 0
    said = capsys.readouterr().out
    windows = data.spread(data.tokens(TEXT, base.checkpoint.tokenizer), 32, 6)
    for schedule in (None, Schedule(8, 3, 2, warmup=1, max_tokens=16, levels=4)):
        with torch.no_grad():
            assert f"{base.loss(windows, schedule, 8).item():.3f}" in said
    assert f"{TARGET}, 3 to 2 of 8 layers over 16 tokens, 2.50 on average; 6 windows of 32 tokens, 8 of them" in said


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            [],
            "neither --speedup nor both of --max-layers and --min-layers are given; write --speedup 2 or --max-layers 16",
        ),
        (["--speedup", "2", "--max-layers", "4"], "--speedup 2 chooses --max-layers, which is given too; leave one"),
        (["--speedup", "20"], "--speedup 20.0 is out of range; valid are 1 to 16"),
        (["--max-layers", "9", "--min-layers", "2"], "--max-layers 9 is more than the 8 layers of the model"),
        (["--max-layers", "3", "--min-layers", "4"], "--warmup 1, --min-layers 4, --max-layers 3 do not go together"),
        (["--speedup", "2", "--levels", "1"], "--levels 1 is no schedule; use --levels 0 or 2 to 64"),
        (["--speedup", "2", "--warmup", "some"], "--warmup some is not a whole number"),
        (["--speedup", "2", "--prompt", "4-31"], "--length 32: leaves no answer behind a prompt of 31 tokens"),
        (["--speedup", "2", "--data", "nowhere.txt"], "--data nowhere.txt: is no file"),
        (["--speedup", "2", "--model", "./nowhere"], "--model ./nowhere: cannot be loaded ("),
        (["--speedup", "2", "--resume"], "holds no interrupted run; leave --resume out"),
        (["--speedup", "2", "--evaluate"], "--output: goes with a run, and --evaluate is none; leave one of them out"),
        (["--speedup", "2", "--windows", "9"], "--windows: goes with --evaluate, and this is a run; leave it out"),
    ],
)
def test_wrong_input_stops_with_one_sentence(
    more: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*ARGUMENTS, "--output", str(tmp_path / "out"), *more]) == 2
    said = capsys.readouterr().out
    assert sentence in said
    assert said.count("\n") == 1
    assert "skipdecode:" not in said


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--output", TARGET], "holds a model already; choose another folder"),
        ([], "--output: is missing; give a folder for the checkpoint, or --evaluate"),
        (["--evaluate", "--lr-warmup", "0.1"], "--lr-warmup: goes with a run, and --evaluate is none"),
        (
            ["--evaluate", "--prompt", "40"],
            "--length 32: leaves no answer behind a prompt of 40 tokens; use at least 42",
        ),
        (["--evaluate", "--length", "1000000"], "too few for a window of 1000000"),
    ],
)
def test_a_run_needs_a_folder_of_its_own_and_an_evaluation_text(
    more: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*RUN, *more]) == 2
    assert sentence in capsys.readouterr().out


@pytest.mark.parametrize("prompt", ["0", "9-4", "a", "4-", "-3"])
def test_a_prompt_that_is_no_range_is_refused(prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([*RUN, f"--prompt={prompt}"])
    assert end.value.code == 2
    assert "--prompt" in capsys.readouterr().err


def test_a_loss_that_is_no_number_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: ScheduledModel, ids: Tensor, *rest: Any) -> Tensor:
        return cross_entropy(self.model(input_ids=ids).logits[:, 0], ids[:, 1]) * float("nan")

    monkeypatch.setattr(ScheduledModel, "loss", broken)
    assert cli.main([*RUN, "--output", str(tmp_path / "out")]) == 2
    assert "the loss is no number after 1 steps" in capsys.readouterr().out
