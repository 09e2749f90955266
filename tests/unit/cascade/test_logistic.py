# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from vllm_spec_plugins.cascade.logistic import BITS, FIGURES, READ, Logistic, figures, fit, ngrams


def test_ngrams_are_the_same_for_the_same_text_and_alike_for_like_text() -> None:
    one, same, near, far = map(ngrams, ("Sort a list", "sort a list", "Sort a long list", "Prove the theorem"))
    assert one.shape == (1 << BITS,)
    assert np.array_equal(one, same)
    assert np.linalg.norm(one) == pytest.approx(1.0)
    assert one @ near > 0.5 > abs(one @ far)
    assert not ngrams("").any()


def test_of_a_long_prompt_both_ends_are_read() -> None:
    middle = "x " * READ
    assert np.array_equal(ngrams("start " + middle + " end"), ngrams("start " + middle * 2 + " end"))
    assert not np.array_equal(ngrams("start " + middle + " end"), ngrams("start " + middle + " other"))


def test_figures_are_finite_for_every_answer() -> None:
    for logprobs in ([], [0.0], [-9999.0], [-0.1, -2.0]):
        found = figures("question", logprobs)
        assert found.shape == (len(FIGURES),)
        assert np.isfinite(found).all()


def test_the_fit_finds_the_weights_that_labels_were_drawn_with(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(20_000, 3)) * [1.0, 10.0, 0.1] + [0.0, 5.0, 1.0]
    logit = 1.5 * x[:, 0] - 0.1 * (x[:, 1] - 5.0) + 0.5
    good = rng.random(len(x)) < 1 / (1 + np.exp(-logit))
    model = fit(x, good, 1e-6, standardise=True)
    weights = model.weights / model.scale
    # Standard errors are below 0.03 (bias, first), 0.003 (second) and 0.2 (third); five of them.
    assert weights == pytest.approx([1.5, -0.1, 0.0], abs=1.0)
    assert abs(weights[0] - 1.5) < 0.15
    assert abs(weights[1] + 0.1) < 0.015
    predicted = np.array([model(row) for row in x[:2000]])
    assert np.abs(predicted - 1 / (1 + np.exp(-logit[:2000]))).max() < 0.06


def test_the_fit_is_a_stationary_point_of_the_penalised_loss(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, good = rng.normal(size=(50, 8)), rng.random(50) < 0.4
    good[:2] = [True, False]
    model = fit(x, good, 0.1, standardise=False)
    chance = np.array([model(row) for row in x])
    assert np.abs(x.T @ (chance - good) / 50 + 0.1 * model.weights).max() < 1e-5
    assert abs((chance - good).mean()) < 1e-5


def test_a_figure_that_never_changes_has_no_say(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = np.stack([rng.normal(size=200), np.full(200, 0.1) + np.tile([0.0, 1e-17], 100), np.full(200, 1.9)], 1)
    model = fit(x, x[:, 0] > 0.3, 1e-3, standardise=True)
    again = Logistic.from_dict(model.as_dict(), 3)
    assert np.abs(again.weights[1:]).max() < 1e-9
    assert again(np.array([1.0, 0.1, 1.9])) == pytest.approx(model(np.array([1.0, 0.1, 1.9])), abs=1e-4)


def test_labels_of_one_kind_teach_nothing() -> None:
    with pytest.raises(ValueError, match="all 4 recorded answers are good"):
        fit(np.eye(4), np.ones(4), 0.1, standardise=False)


def test_a_model_survives_its_file() -> None:
    model = Logistic(np.array([0.25, -1.5]), 0.5, np.zeros(2), np.ones(2))
    again = Logistic.from_dict(model.as_dict(), 2)
    assert again(np.array([1.0, 2.0])) == pytest.approx(model(np.array([1.0, 2.0])))
