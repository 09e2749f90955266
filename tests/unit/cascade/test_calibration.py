# SPDX-License-Identifier: Apache-2.0
"""The boldest rule that keeps a promise, and its file."""

import json

import numpy as np
import pytest

from vllm_spec_plugins.cascade.calibration import Calibrated, calibrate
from vllm_spec_plugins.cascade.rules import deferral_rule

FOUND = Calibrated(
    "difference:0.1", 0.95, 0.1, 200, 64, 0.02, {"name": "self-draft", "exit_layer": 4}, {"num_layers": 8}, "cheap", 0.7
)


@pytest.mark.parametrize(
    ("text", "boldness"), [("difference:0", [-1.0, 0.0, 0.2, 0.6]), ("confidence:1", [2.0, 0.9, 0.6, 0.2])]
)
def test_the_boldest_bound_within_the_promise_is_found_whichever_way_bounds_go(text, boldness):
    rule = deferral_rule(text)
    risks = dict(zip(boldness, (0.0, 0.01, 0.02, 0.2), strict=True))
    losses = {bound: [risk] * 400 for bound, risk in reversed(risks.items())}
    assert calibrate(losses, rule, quality=0.95, error=0.1) == rule.at(boldness[2])
    assert calibrate(losses, rule, quality=0.7, error=0.1) == rule.at(boldness[3])
    few = {bound: risk[:2] for bound, risk in losses.items()}
    assert calibrate(few, rule, quality=0.95, error=0.1) is None


def test_a_rule_that_is_too_bold_is_chosen_no_more_often_than_promised():
    """Losses of 60 prompts, 400 times: the true risks are .01, .05 and .15, the promise is .1 with an error of .2."""
    rng, rule, bold = np.random.default_rng(11), deferral_rule("difference:0"), 0
    for _ in range(400):
        losses = {bound: rng.binomial(20, risk, 60) / 20 for bound, risk in ((-1.0, 0.01), (0.0, 0.05), (0.5, 0.101))}
        found = calibrate(losses, rule, quality=0.9, error=0.2)
        bold += found is not None and found.bound == 0.5
    assert 0 <= bold / 400 <= 0.2


def test_the_file_brings_back_what_was_written(tmp_path):
    file = tmp_path / "cascade.json"
    FOUND.save(file, figures=[1, 2])
    assert Calibrated.load(str(file)) == FOUND
    assert json.loads(file.read_text())["figures"] == [1, 2]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "it is not JSON"),
        ("[]", "it holds no object"),
        ("{}", "its 'rule' is None, not str"),
        ('{"rule": 3}', "its 'rule' is 3, not str"),
    ],
)
def test_a_file_of_another_kind_says_what_is_wrong(text, sentence, tmp_path):
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        Calibrated.load(str(file))
    with pytest.raises(ValueError, match="it cannot be read"):
        Calibrated.load(str(tmp_path / "absent.json"))
