# SPDX-License-Identifier: Apache-2.0
"""Learn then Test: p-values proved by enumeration, coverage by resampling, and rules without the guarantee that fail."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from scipy.stats import binom

from tests.models.exits import losses, record, split
from tests.models.llama import load_checkpoint
from tests.models.train import HERE
from vllm_spec_plugins.layers.calibration import PValue, boldest, hoeffding, hoeffding_bentkus
from vllm_spec_plugins.layers.exits import policy

RESAMPLES = 200
BOTH = pytest.mark.parametrize("p_value", [hoeffding, hoeffding_bentkus], ids=lambda p: p.__name__)
Rule = Callable[[np.ndarray, float, float], int | None]


def too_sharp(risk: np.ndarray, count: int, tolerance: float) -> np.ndarray:
    """Hoeffding's bound with twice the exponent that it has: no p-value."""
    return np.exp(-4.0 * count * np.maximum(tolerance - risk, 0.0) ** 2)


def without_a_test(loss: np.ndarray, tolerance: float, error: float) -> int | None:
    """The boldest setting whose risk on the calibration prompts is within the tolerance."""
    fine = np.flatnonzero(loss.mean(0) <= tolerance)
    return int(fine[-1]) if len(fine) else None


def without_a_sequence(loss: np.ndarray, tolerance: float, error: float) -> int | None:
    """The boldest setting that passes its own test, whatever the safer ones do."""
    fine = np.flatnonzero(hoeffding_bentkus(loss.mean(0), len(loss), tolerance) <= error)
    return int(fine[-1]) if len(fine) else None


def with_p_value(p_value: PValue) -> Rule:
    return lambda loss, tolerance, error: boldest(loss, tolerance, error, p_value)


def sums(loss: np.ndarray, count: int) -> np.ndarray:
    """Chances of the sums of `count` losses with chances `loss` on 0, 1/m .. 1: [m * count + 1]."""
    total = np.ones(1)
    for _ in range(count):
        total = np.convolve(total, loss)
    return total


def nulls(tolerance: float, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Distributions of one loss on 0, 1/m .. 1 whose mean is `tolerance`: a coin, a constant's neighbours, random ones."""
    yield np.array([1 - tolerance, tolerance])
    low = math.floor(tolerance * 10)
    narrow = np.zeros(11)
    narrow[low], narrow[low + 1] = low + 1 - tolerance * 10, tolerance * 10 - low
    yield narrow
    for _ in range(4):
        chances = rng.dirichlet(np.full(6, 0.5))
        mean = chances @ np.linspace(0, 1, 6)
        end = np.eye(6)[5 if mean < tolerance else 0]
        share = (tolerance - mean) / (end @ np.linspace(0, 1, 6) - mean)
        yield (1 - share) * chances + share * end


def excess(p_value: PValue, tolerance: float, count: int, rng: np.random.Generator) -> float:
    """How far P(p <= u) exceeds u at most, over distributions whose mean is the tolerance and all u."""
    worst = -1.0
    for loss in nulls(tolerance, rng):
        assert loss @ np.linspace(0, 1, len(loss)) == pytest.approx(tolerance)
        risk = np.linspace(0, 1, (len(loss) - 1) * count + 1)
        p = p_value(risk, count, tolerance)
        assert (np.diff(p) >= -1e-12).all()  # so p <= p(r) where the mean loss is at most r
        worst = max(worst, float((np.cumsum(sums(loss, count)) - p).max()))
    return worst


@BOTH
@pytest.mark.parametrize("tolerance", [0.03, 0.1, 0.25, 0.5])
@pytest.mark.parametrize("count", [1, 7, 40, 150])
def test_a_p_value_is_at_most_u_with_chance_u(p_value: PValue, tolerance: float, count: int, seed: int) -> None:
    assert excess(p_value, tolerance, count, np.random.default_rng(seed)) <= 1e-9


def test_the_enumeration_finds_what_is_no_p_value(seed: int) -> None:
    assert excess(too_sharp, 0.5, 40, np.random.default_rng(seed)) > 0.01


@pytest.mark.parametrize("count", [1, 20, 333])
@pytest.mark.parametrize("tolerance", [0.02, 0.3, 0.9])
def test_hoeffding_bentkus_is_its_formula_and_never_the_looser_one(count: int, tolerance: float) -> None:
    risk = np.linspace(0, 1, 3 * count + 1)
    expected = []
    for r in risk:
        a, b = min(r, tolerance), tolerance
        kl = (a * math.log(a / b) if a else 0.0) + (1 - a) * math.log((1 - a) / (1 - b))
        bentkus = math.e * binom.cdf(math.ceil(count * r), count, tolerance)
        expected.append(min(math.exp(-count * kl), bentkus, 1.0))
    found = hoeffding_bentkus(risk, count, tolerance)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-12)
    loose = hoeffding(risk, count, tolerance)
    np.testing.assert_allclose(loose, [math.exp(-2 * count * max(0.0, tolerance - r) ** 2) for r in risk], rtol=1e-12)
    assert (found <= loose + 1e-12).all()


def test_settings_are_accepted_in_order_up_to_the_first_that_fails() -> None:
    """With 200 prompts, d = .2 and e = .05 Hoeffding accepts risks of at most .2 - sqrt(log(20) / 400) = .1135."""
    loss = np.tile(np.array([0.0, 0.05, 0.11, 0.12, 0.05, 0.3]), (200, 1))
    assert boldest(loss, 0.2, 0.05) == 2
    assert boldest(loss[:, :2], 0.2, 0.05) == 1
    assert boldest(loss[:, 3:], 0.2, 0.05) is None
    assert boldest(loss[:, 1:2], 0.2, 0.05) == 0
    assert boldest(loss[:10], 0.2, 0.05) is None  # too few prompts to tell
    assert boldest(loss, 0.2, 0.05, hoeffding_bentkus) == 4


@pytest.mark.parametrize(
    ("loss", "tolerance", "error", "sentence"),
    [
        (np.zeros((0, 3)), 0.1, 0.1, r"losses of shape \[0, 3\] are not those of prompts under settings, \[n, T\]"),
        (np.zeros(3), 0.1, 0.1, r"losses of shape \[3\] are not"),
        (np.full((2, 2), 1.5), 0.1, 0.1, "losses from 1.5 to 1.5 are not within 0 to 1"),
        (np.full((2, 2), -1.0), 0.1, 0.1, "losses from -1 to -1 are not within 0 to 1"),
        (np.full((2, 2), np.nan), 0.1, 0.1, "losses from nan to nan are not within 0 to 1"),
        (np.zeros((2, 2)), 0.0, 0.1, "tolerance=0 is not between 0 and 1"),
        (np.zeros((2, 2)), 0.1, 1.0, "error=1 is not between 0 and 1"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(loss: np.ndarray, tolerance: float, error: float, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        boldest(loss, tolerance, error)


# Tasks with a known risk: risks [T], safest first, and losses [n, T] drawn with them.
LADDER = np.concatenate((np.linspace(0.0, 0.19, 12), np.linspace(0.201, 0.23, 6), np.linspace(0.25, 0.6, 8)))
FLAT = np.full(100, 0.201)


def coins(risk: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """A prompt is right or wrong; what is wrong under a setting is so under all bolder ones."""
    return (rng.random((count, 1)) < risk).astype(float)


def shares(risk: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Wrong ones of 20 answers of a prompt that is easy or hard."""
    return rng.binomial(20, rng.choice([0.5, 1.5], (count, 1)) * risk) / 20


def strangers(risk: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Settings that have nothing to do with each other."""
    return (rng.random((count, len(risk))) < risk).astype(float)


Task = tuple[np.ndarray, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]]
TASKS: dict[str, Task] = {"coins": (LADDER, coins), "shares": (LADDER, shares), "strangers": (FLAT, strangers)}


def coverage(rule: Rule, task: Task, tolerance: float, error: float, seed: int) -> tuple[float, float]:
    """Share of resamples in which the chosen setting's true risk is within the tolerance; mean risk of what was chosen."""
    rng, (risk, draw) = np.random.default_rng(seed), task
    chosen = [rule(draw(risk, 150, rng), tolerance, error) for _ in range(RESAMPLES)]
    risks = np.array([0.0 if column is None else risk[column] for column in chosen])
    return float((risks <= tolerance).mean()), float(risks.mean())


@BOTH
@pytest.mark.parametrize("name", TASKS)
def test_the_risk_is_within_the_tolerance_in_the_share_of_resamples_that_is_promised(
    p_value: PValue, name: str, seed: int
) -> None:
    covered, risk = coverage(with_p_value(p_value), TASKS[name], 0.2, 0.15, seed)
    print(covered, risk)
    assert covered >= 1 - 0.15
    assert risk > 0.08 or name == "strangers"  # it does not hold by refusing everything


def test_hoeffding_bentkus_dares_more(seed: int) -> None:
    _, careful = coverage(with_p_value(hoeffding), TASKS["shares"], 0.2, 0.15, seed)
    _, sharp = coverage(with_p_value(hoeffding_bentkus), TASKS["shares"], 0.2, 0.15, seed)
    assert sharp > careful + 0.005


@pytest.mark.parametrize(
    ("rule", "name"), [(without_a_test, "coins"), (without_a_test, "shares"), (without_a_sequence, "strangers")]
)
def test_rules_without_the_guarantee_fail_the_same_test(rule: Rule, name: str, seed: int) -> None:
    covered, _ = coverage(rule, TASKS[name], 0.2, 0.15, seed)
    print(covered)
    assert covered < 0.7


@pytest.fixture(scope="module")
def risks() -> np.ndarray:
    """[P, T]: wrong early answers, as shares of each of 120 held-out prompts, of the tiny target under ever bolder margins."""
    recorded = record(load_checkpoint(HERE / "target"), split()[1][:120], {"margin": policy("margin:1")})
    bounds = torch.linspace(1, 0, 200) ** 2  # denser where a little makes many wrong
    return losses(recorded, [recorded.scores["margin"] >= bound for bound in bounds])


def real_coverage(rule: Rule, loss: np.ndarray, tolerance: float, error: float, seed: int) -> tuple[float, float]:
    """As `coverage`, the risk being the mean loss on the half of the prompts that was not calibrated on."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(RESAMPLES):
        ours, others = np.split(rng.permutation(len(loss)), 2)
        column = rule(loss[ours], tolerance, error)
        found.append(0.0 if column is None else loss[others, column].mean())
    return float((np.array(found) <= tolerance).mean()), float(np.mean(found))


@BOTH
def test_early_exits_of_the_tiny_target_keep_the_promise_on_prompts_that_were_not_calibrated_on(
    p_value: PValue, risks: np.ndarray, seed: int
) -> None:
    assert (np.diff(risks.mean(0)) >= -1e-9).mean() > 0.9  # bolder margins are wrong more often, as a rule
    covered, risk = real_coverage(with_p_value(p_value), risks, 0.2, 0.1, seed)
    print(covered, risk)
    assert covered >= 1 - 0.1
    assert risk > 0.01
    careless, _ = real_coverage(without_a_test, risks, 0.2, 0.1, seed)
    assert careless < 0.75
