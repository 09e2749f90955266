# SPDX-License-Identifier: Apache-2.0
"""The ``--plugin`` grammar: what is accepted, and the sentence for what is not."""

from __future__ import annotations

from typing import Any

import pytest

import vllm_spec_plugins
from vllm_spec_plugins import registry
from vllm_spec_plugins.config import LookaheadSettings, NoneSettings, SettingError


@pytest.mark.parametrize(
    "value",
    [
        "lookahead:window=7,ngram=5,guesses=7",
        " lookahead:window=7, ngram=5 ,guesses=7",
        '{"name": "lookahead", "window": 7, "ngram": 5, "guesses": 7}',
        {"name": "lookahead", "window": 7, "ngram": 5, "guesses": 7},
    ],
)
def test_one_request_may_be_written_in_several_ways(value: Any) -> None:
    assert registry.resolve(value) == LookaheadSettings(window=7, ngram=5, guesses=7)


def test_a_name_alone_takes_the_defaults() -> None:
    assert registry.resolve("lookahead") == LookaheadSettings()
    assert registry.resolve("none") == NoneSettings()


def test_settings_survive_the_way_to_another_process() -> None:
    settings = registry.resolve("lookahead:window=3,prompt_pool=false,min_chance=0.25")
    assert registry.resolve(settings.as_dict()) == settings
    assert settings == LookaheadSettings(window=3, prompt_pool=False, min_chance=0.25)


def test_a_lossy_rule_is_asked_for_by_name_with_its_own_settings() -> None:
    assert registry.method_of(default := registry.resolve("lookahead")).rule(default).lossless
    settings = registry.resolve("medusa:model=H,accept=typical,eps=.2")
    assert registry.resolve(settings.as_dict()) == settings
    assert registry.resolve(default.as_dict()) == default
    rule: Any = registry.method_of(settings).rule(settings)
    assert (rule.name, rule.lossless, rule.eps, rule.delta) == ("typical", False, 0.2, 0.3)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("lookahed", "there is no plugin 'lookahed' (did you mean 'lookahead'?); valid are none, lookahead"),
        (
            "lookahead:windw=3",
            "there is no setting 'windw' (did you mean 'window'?); valid are adapt, accept, eps",
        ),
        ("lookahead:window=many", "lookahead: window=many is not a whole number"),
        ("lookahead:window=1.5", "lookahead: window=1.5 is not a whole number"),
        ("lookahead:min_chance=often", "lookahead: min_chance=often is not a number"),
        ("lookahead:prompt_pool=yes", "lookahead: prompt_pool=yes is not true or false"),
        ("lookahead:window=65", "lookahead: window=65 is out of range; valid are 0 to 64"),
        ("lookahead:ngram=1", "lookahead: ngram=1 is out of range; valid are 2 to 16"),
        ("lookahead:guesses=0", "lookahead: guesses=0 is out of range; valid are 1 to 32"),
        ("lookahead:window", "'window' is not key=value"),
        ("lookahead:", "nothing follows the colon"),
        ("lookahead:window=1,window=2", "'window' is given twice"),
        ("lookahead:prompt_pool=false", "window=0 with prompt_pool=false leaves nothing to draft from"),
        ("jacobi:mode=serial", "jacobi: mode=serial is not valid; valid are parallel, blocks, hybrid"),
        ("jacobi:mode=hybrid", "mode=hybrid needs parallel_tokens>=1"),
        ("jacobi:parallel_tokens=9", "mode=parallel with parallel_tokens=9 does not go together"),
        ("lookahead:accept=typicaly", "lookahead: accept=typicaly is not valid; valid are walk, typical"),
        ("lookahead:eps=.1", "eps=0.1 with accept=walk does not go together; eps belongs to accept=typical"),
        ("jacobi:accept=walk,delta=.3", "delta=0.3 with accept=walk does not go together"),
        ("medusa:model=heads,accept=typical,eps=2", "medusa: eps=2.0 is out of range; valid are 0.0 to 1.0"),
        ("medusa:model=heads,accept=typical,delta=x", "medusa: delta=x is not a number"),
        ("none:accept=typical", "there is no setting 'accept'; valid are none"),
        ("medusa", "medusa: model is missing; write medusa:model=FOLDER_OR_HUB_ID"),
        ("medusa:model=heads,depth=0", "medusa: depth=0 is out of range; valid are 1 to 16"),
        ("medusa:model=heads,ranks=65", "medusa: ranks=65 is out of range; valid are 1 to 64"),
        ("lookahead:nodes=0", "lookahead: nodes=0 is out of range; valid are 1 to 128"),
        ("lookahead:min_chance=1.5", "lookahead: min_chance=1.5 is out of range; valid are 0.0 to 1.0"),
        ("none:window=3", "there is no setting 'window'; valid are none"),
        ('{"name": "lookahead", "window": }', "is not valid JSON"),
        ('{"window": 3}', 'has no "name"'),
        ({"name": "lookahead", "window": "3x"}, "window=3x is not a whole number"),
        ({"name": "lookahead", "window": True}, "window=True is not a whole number"),
        ({"name": "lookahead", "prompt_pool": 1}, "prompt_pool=1 is not true or false"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(value: Any, sentence: str) -> None:
    with pytest.raises(SettingError) as refusal:
        registry.resolve(value)
    message = str(refusal.value)
    assert sentence in message
    assert message.startswith("--plugin ")
    assert "\n" not in message


def test_engine_args_carry_validated_settings_beside_what_else_the_config_holds() -> None:
    given = vllm_spec_plugins.engine_args("lookahead", window=7, additional_config={"other": 1})
    assert given["additional_config"]["other"] == 1
    assert registry.resolve(given["additional_config"]["spec_plugins"]) == LookaheadSettings(window=7)
    with pytest.raises(SettingError, match="there is no setting 'columns'"):
        vllm_spec_plugins.engine_args("lookahead", columns=7)


def test_every_setting_has_a_line_of_documentation() -> None:
    from dataclasses import fields

    for method in registry.METHODS.values():
        assert method.settings.__doc__
        assert all(field.metadata["doc"] for field in fields(method.settings))


def test_the_registry_refuses_a_name_twice_and_a_rule_that_lacks_what_the_engine_asks_for() -> None:
    known = registry.METHODS["lookahead"]
    with pytest.raises(ValueError, match="registered already"):
        registry.register(known)

    class Nameless(NoneSettings):
        name = "nameless"

    broken: Any = lambda _: object()  # noqa: E731
    with pytest.raises(ValueError, match="its rule lacks name, lossless, needs_target"):
        registry.register(registry.Method(Nameless, proposer=None, rule=broken))
    assert "nameless" not in registry.METHODS
