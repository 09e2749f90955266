# SPDX-License-Identifier: Apache-2.0
"""Early-exit policies against their formulas, written out for one token at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.unit.layers.signals import HIDDEN, of_logits, signals
from vllm_spec_plugins.layers.exits import POLICIES, ExitPolicy, ExitSignals, policy
from vllm_spec_plugins.layers.recorded_exits import Gate, Hash

VOCAB = 50


def probabilities(row: Tensor) -> list[float]:
    """Of logits [V], in float64, largest first."""
    weights = [math.exp(x - row.max().item()) for x in row.tolist()]
    return sorted((w / sum(weights) for w in weights), reverse=True)


def entropy(s: ExitSignals, m: int) -> float:
    return -sum(p * math.log(p) for p in probabilities(s.logits[m]) if p > 0)


def margin(s: ExitSignals, m: int) -> float:
    first, second, *_ = probabilities(s.logits[m])
    return first - second


def run(s: ExitSignals, m: int) -> int:
    """Exits in a row, this one the last, whose answer is this one's."""
    answer, length = s.logits[m].argmax().item(), 1
    for token in reversed(s.earlier[m].tolist()):
        if token != answer:
            break
        length += 1
    return length


def cosine(s: ExitSignals, m: int) -> float:
    assert s.earlier_hidden is not None
    a, b = s.hidden[m].double().numpy(), s.earlier_hidden[m].double().numpy()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def gate_chance(gate: Gate, s: ExitSignals, m: int) -> float:
    x, row = s.hidden[m].double().numpy(), gate.exits.index(s.layer)
    x = x / np.sqrt((x @ x) / HIDDEN + 1e-6)
    return 1 / (1 + math.exp(-(x @ gate.weight[row].double().numpy() + gate.bias[row].item())))


RANDOM = torch.Generator().manual_seed(5)
GATE = Gate(0.5, (2, 4), torch.randn(2, HIDDEN, generator=RANDOM), torch.randn(2, generator=RANDOM), "g")
HASH = Hash(0.0, torch.randint(1, 9, (VOCAB,), generator=RANDOM).to(torch.int16), "h")
FORMULAS: list[tuple[ExitPolicy, Callable[[ExitSignals, int], float]]] = [
    (policy("entropy:1.5"), lambda s, m: -entropy(s, m)),
    (policy("normalised-entropy:0.3"), lambda s, m: -entropy(s, m) / math.log(s.logits.shape[1])),
    (policy("confidence:0.6"), lambda s, m: probabilities(s.logits[m])[0]),
    (policy("margin:0.4"), margin),
    (policy("patience:2"), run),
    (policy("saturation:0.9"), cosine),
    (HASH, lambda s, m: s.layer - int(HASH.layers[s.tokens[m]])),
    (GATE, lambda s, m: gate_chance(GATE, s, m)),
]
EVERY = pytest.mark.parametrize("asked", [p for p, _ in FORMULAS], ids=lambda p: p.name)


def test_every_policy_is_compared_with_a_formula() -> None:
    assert {type(p) for p, _ in FORMULAS} == set(POLICIES.values())


@pytest.mark.parametrize(("asked", "formula"), FORMULAS, ids=[p.name for p, _ in FORMULAS])
def test_a_score_is_the_papers_formula(
    asked: ExitPolicy, formula: Callable[[ExitSignals, int], float], rng: torch.Generator
) -> None:
    given = signals(64, rng, VOCAB)
    score = asked.score(given)
    assert score.dtype == torch.float32
    expected = [float(formula(given, m)) for m in range(64)]
    torch.testing.assert_close(score.double(), torch.tensor(expected).double(), atol=2e-5, rtol=2e-5)
    assert len(set(expected)) > 1
    clear = (torch.tensor(expected) - asked.threshold).abs() > 1e-4
    clear |= torch.tensor([value == int(value) for value in expected])
    assert torch.equal(asked.good(given)[clear], (torch.tensor(expected) >= asked.threshold)[clear])
    assert clear.sum() > 48


def test_extremes_of_a_distribution() -> None:
    """Uniform, one-hot (the other tokens masked), and a fair coin, which is all that two tokens can be unsure of."""
    uniform, one_hot = torch.zeros(1, 8), torch.full((1, 8), -math.inf)
    one_hot[0, 3] = 2.0
    coin = torch.tensor([[0.7, 0.7]])
    expected = {
        "entropy:1": (-math.log(8), 0.0, -math.log(2)),
        "normalised-entropy:1": (-1.0, 0.0, -1.0),
        "confidence:1": (1 / 8, 1.0, 1 / 2),
        "margin:1": (0.0, 1.0, 0.0),
    }
    for text, scores in expected.items():
        found = [policy(text).score(of_logits(logits)).item() for logits in (uniform, one_hot, coin)]
        assert found == pytest.approx(scores, abs=1e-6), text
    for text in ("entropy:0", "normalised-entropy:0", "confidence:1", "margin:1"):
        assert [bool(policy(text).good(of_logits(x))) for x in (uniform, one_hot, coin)] == [False, True, False], text


def test_half_precision_logits_are_judged_in_single_precision(rng: torch.Generator) -> None:
    given = signals(16, rng, VOCAB)
    rounded = given.logits.bfloat16()
    for text in ("entropy:1", "normalised-entropy:1", "confidence:1", "margin:1"):
        found = policy(text).score(replace(given, logits=rounded))
        assert torch.equal(found, policy(text).score(replace(given, logits=rounded.float()))), text


@EVERY
def test_no_rows_are_no_answers(asked: ExitPolicy, rng: torch.Generator) -> None:
    good = asked.good(signals(0, rng, VOCAB))
    assert (good.shape, good.dtype) == ((0,), torch.bool)


@EVERY
def test_an_answer_does_not_depend_on_the_rows_beside_it(asked: ExitPolicy, rng: torch.Generator) -> None:
    given = signals(12, rng, VOCAB)
    score = asked.score(given)
    for m in range(12):
        alone = {f.name: v[m : m + 1] if isinstance(v := getattr(given, f.name), Tensor) else v for f in fields(given)}
        torch.testing.assert_close(asked.score(ExitSignals(**alone)), score[m : m + 1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "safest_first"),
    [
        ("entropy", (0.2, 0.7, 1.1, 1.6, 2.5, 4.0)),
        ("normalised-entropy", (0.0, 0.1, 0.3, 0.5, 1.0)),
        ("confidence", (1.0, 0.8, 0.5, 0.2, 0.0)),
        ("margin", (1.0, 0.6, 0.3, 0.1, 0.0)),
        ("patience", (4, 3, 2)),
        ("saturation", (1.0, 0.95, 0.9, 0.5, -1.0)),
    ],
)
def test_a_bolder_bound_keeps_what_a_safer_one_keeps(
    name: str, safest_first: tuple[float, ...], rng: torch.Generator
) -> None:
    given = signals(200, rng, VOCAB, earlier=3)
    asked = [policy(f"{name}:{bound}") for bound in safest_first]
    kept = torch.stack([each.good(given) for each in asked]).int()
    assert (kept.diff(dim=0) >= 0).all()
    assert kept[0].sum() < kept[-1].sum()
    assert [each.threshold for each in asked] == sorted((each.threshold for each in asked), reverse=True)


def test_gates_and_tables_are_monotone_too(rng: torch.Generator) -> None:
    given = signals(200, rng, VOCAB)
    by_chance = torch.stack([replace(GATE, bound=b).good(given) for b in (1.0, 0.7, 0.4, 0.0)]).int()
    by_depth = torch.stack([HASH.good(replace(given, layer=layer)) for layer in (1, 3, 5, 8)]).int()
    for kept in (by_chance, by_depth):
        assert (kept.diff(dim=0) >= 0).all()
        assert kept[-1].all() and not kept[0].all()


def test_patience_looks_at_the_last_exits_only() -> None:
    """Answers 1 1 0, here 0: two in a row. 0 0 1, here 0: one, however often it was 0 before."""
    given = of_logits(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    given.earlier = torch.tensor([[1, 1, 0], [0, 0, 1]])
    assert policy("patience:2").score(given).tolist() == [2.0, 1.0]
    given.earlier = given.earlier[:, :0]
    assert policy("patience:2").good(given).tolist() == [False, False]


def test_nothing_is_saturated_at_the_first_exit(rng: torch.Generator) -> None:
    first = replace(signals(5, rng), earlier_hidden=None)
    assert not policy("saturation:-1").good(first).any()


@EVERY
def test_no_policy_takes_a_value_to_the_host(asked: ExitPolicy, rng: torch.Generator) -> None:
    """Tensors on the meta device have shapes and no values: whoever asks for one fails."""
    given = signals(6, rng, VOCAB)
    shapes = {f.name: v.to("meta") if isinstance(v := getattr(given, f.name), Tensor) else v for f in fields(given)}
    weights = {f.name: v.to("meta") for f in fields(asked) if isinstance(v := getattr(asked, f.name), Tensor)}
    good = replace(asked, **weights).good(ExitSignals(**shapes))
    assert (good.device.type, good.shape) == ("meta", (6,))
    with pytest.raises(RuntimeError):
        bool(good.any())


@EVERY
def test_a_policy_is_read_from_what_it_prints(asked: ExitPolicy, tmp_path: Path) -> None:
    if isinstance(asked, Hash | Gate):
        asked = replace(asked, file=str(tmp_path / "with:colon.safetensors"))
        asked.save(Path(asked.file))
    again = policy(str(asked))
    assert type(again) is type(asked)
    assert (str(again), again.threshold) == (str(asked), asked.threshold)


@pytest.mark.parametrize("kind", POLICIES.values(), ids=POLICIES)
def test_the_example_in_a_sentence_is_valid(kind: type[ExitPolicy], tmp_path: Path) -> None:
    file = tmp_path / "f"
    {Hash: HASH, Gate: GATE}.get(kind, HASH).save(file)
    assert type(policy(kind.example.replace("FILE", str(file)))) is kind


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("entropie:1", "entropie:1 is no exit policy; valid are entropy:1.5, "),
        ("", " is no exit policy; valid are "),
        ("entropy", "entropy has '' where a number of 0 or more belongs; write entropy:1.5"),
        ("entropy:low", "entropy:low has 'low' where a number of 0 or more belongs; write entropy:1.5"),
        ("entropy:-1", "entropy:-1 has '-1' where a number of 0 or more belongs; write entropy:1.5"),
        ("entropy:inf", "entropy:inf has 'inf' where"),
        ("entropy:nan", "entropy:nan has 'nan' where"),
        ("entropy:1:2", "entropy:1:2 has '1:2' where"),
        ("normalised-entropy:1.1", "normalised-entropy:1.1 has '1.1' where a number of 0 to 1 belongs"),
        ("margin:1.5", "margin:1.5 has '1.5' where a number of 0 to 1 belongs; write margin:0.4"),
        ("confidence:2", "confidence:2 has '2' where a number of 0 to 1 belongs; write confidence:0.6"),
        ("patience:1", "patience:1 has '1' where a number of 2 to 64 belongs; write patience:2"),
        ("patience:2.5", "patience:2.5 has '2.5' where a whole number belongs; write patience:2"),
        ("saturation:-2", "saturation:-2 has '-2' where a number of -1 to 1 belongs; write saturation:0.95"),
        ("hash", "hash names no file; write hash:FILE"),
        ("gate:0.8", "gate:0.8 names no file; write gate:FILE:0.8"),
        ("gate:FILE", "gate:FILE has 'FILE' where a number of 0 to 1 belongs; write gate:FILE:0.8"),
        ("gate:FILE:8", "gate:FILE:8 has '8' where a number of 0 to 1 belongs; write gate:FILE:0.8"),
        ("hash:/no/such/file", "hash:/no/such/file names /no/such/file, which is no readable safetensors file ("),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        policy(text)
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)


def test_a_policy_that_compares_exits_needs_them() -> None:
    policy("patience:3").check((2, 4, 6), VOCAB, HIDDEN)
    policy("entropy:1").check((2,), VOCAB, HIDDEN)
    HASH.check((), VOCAB, HIDDEN)
    with pytest.raises(ValueError, match=r"^patience:3 compares 3 exits of a pass, and this one has 2$"):
        policy("patience:3").check((2, 4), VOCAB, HIDDEN)
    with pytest.raises(ValueError, match=r"^saturation:0\.9 compares 2 exits of a pass, and this one has 1$"):
        policy("saturation:0.9").check((2,), VOCAB, HIDDEN)
