# SPDX-License-Identifier: Apache-2.0
"""``--plugin cascade`` beside its cheap stage: what goes together, and what is refused."""

from dataclasses import replace

import pytest

from tests.unit.cascade.test_calibration import FOUND
from vllm_spec_plugins import registry
from vllm_spec_plugins.config import SettingError
from vllm_spec_plugins.depth_settings import CascadeSettings, SelfDraftSettings

SIZES = {"hidden_size": 1, "vocab_size": 5, "num_layers": 8}


def target(**given):
    return registry.Target(
        **{"max_model_len": 64, "lora": False, "shapes": dict, "draft": None, **SIZES, **given}  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    "given",
    [
        "cascade:rule=difference:0.1 & self-draft:exit_layer=4,nodes=9",
        ["self-draft:exit_layer=4,nodes=9", "cascade:rule=difference:0.1"],
        [{"name": "cascade", "rule": "difference:0.1"}, {"name": "self-draft", "exit_layer": 4, "nodes": 9}],
    ],
)
def test_it_takes_its_cheap_stage_from_beside_it_in_any_form_and_order(given):
    settings = registry.resolve(given)
    assert settings == CascadeSettings(rule="difference:0.1", source=SelfDraftSettings(exit_layer=4, nodes=9))
    assert registry.resolve(settings.as_given()) == settings
    method = registry.method_of(settings)
    assert method.shape(settings) == (9, 6) and method.slots(settings) == 9
    assert not method.rule(settings).lossless and str(method.rule(settings).rule) == "difference:0.1"
    assert [count.name for count in method.counts(settings)] == ["lossy_tokens"]


def test_drafts_are_declined_only_if_both_allow_it():
    for given, adapt in (
        ("cascade:adapt=false & self-draft:exit_layer=4", False),
        ("cascade & self-draft:exit_layer=4", True),
    ):
        assert registry.resolve(given).adapt is adapt


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("cascade", "cascade: has one plugin for its cheap stage, and there is none; write --plugin self-draft"),
        ("cascade & self-draft:exit_layer=4 & lookahead", "and there is self-draft, lookahead; write"),
        ("cascade & cascade & self-draft:exit_layer=4", "cascade: is given 2 times; give it once"),
        ("cascade & lookahead", "lookahead: has no model that could be the cheap stage of --plugin cascade"),
        ("cascade & none", "none: has no model that could be the cheap stage of --plugin cascade"),
        ("cascade & specinfer:model=a+b", "specinfer: has no model that could be the cheap stage"),
        ("cascade & self-draft:exit_layer=4,accept=typical", "self-draft: accepts by a rule of its own"),
        (
            "cascade:accept=typical & self-draft:exit_layer=4",
            "cascade: accept=typical contradicts the cascade's own rule",
        ),
        ("cascade:rule=chow & self-draft:exit_layer=4", "cascade: rule=chow is no deferral rule; valid are confidence"),
        ("cascade:rule=exit:margin:0.2 & specinfer:model=a", "rule=exit:margin:0.2 asks for layers to leave"),
        (
            "cascade:rule=exit:margin:0.2 & self-draft:exit_layer=4,exit=margin:0.1",
            "rule=exit:margin:0.2 judges the draft, and self-draft:exit=margin:0.1 stops it; leave one of them out",
        ),
        ("cascade:route=fast & self-draft:exit_layer=4", "route=fast is not valid; valid are auto, cheap, full"),
        ("cascade:quality=0.9 & self-draft:exit_layer=4", "quality=0.9 is promised by no file"),
        ("cascade:file=absent.json & self-draft:exit_layer=4", "file=absent.json cannot be used: it cannot be read"),
        (
            "cascade:file=a,rule=top:0 & self-draft:exit_layer=4",
            "rule=top:0 and file=a are given; leave one of them out",
        ),
        (
            "cascade:source=lookahead",
            "cascade: there is no setting 'source'; give the cheap stage a --plugin of its own",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_sentence(given, sentence):
    with pytest.raises(SettingError) as error:
        registry.resolve(given)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_brings_its_rule_where_all_that_it_rests_on_is_the_same(tmp_path):
    stage = registry.stage(SelfDraftSettings(exit_layer=4))
    found = replace(FOUND, plugin=stage, target=SIZES, route="auto")
    found.save(tmp_path / "cascade.json")
    given = f"self-draft:exit_layer=4 & cascade:file={tmp_path / 'cascade.json'}"
    settings = registry.resolve(given)
    assert str(settings.deferral()) == "difference:0.1"
    assert registry.resolve(f"{given},quality=0.95") == replace(settings, quality=0.95)
    registry.method_of(settings).check(settings, target())
    for wrong, sentence in (
        (f"{given},quality=0.96", "quality=0.96 is more than the 0.95 that file="),
        (f"{given},route=cheap", "route=cheap is not the route=auto that file="),
        (f"{given},easy=0.5", "easy=0.5 is not the easy=0.7 that file="),
        (given.replace("exit_layer=4", "exit_layer=3"), "and the cheap stage is {'name': 'self-draft'"),
        (
            given.replace("exit_layer=4", "skip=auto"),
            "promises nothing of self-draft:skip=auto, which changes while serving",
        ),
    ):
        with pytest.raises(SettingError) as error:
            registry.resolve(wrong)
        assert sentence in str(error.value)
    with pytest.raises(SettingError, match=r"was made for a model of .*; run vllm-spec tune cascade on this model"):
        registry.method_of(settings).check(settings, target(num_layers=9))


def test_a_policy_that_does_not_fit_the_part_is_refused():
    settings = registry.resolve("cascade:rule=exit:patience:9 & self-draft:exit_layer=4")
    with pytest.raises(SettingError, match=r"rule=exit:patience:9 cannot be used: patience:9 compares 9 exits"):
        registry.method_of(settings).check(settings, target())
