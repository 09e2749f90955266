# SPDX-License-Identifier: Apache-2.0
"""The ``--plugin`` grammar: what is accepted, and the sentence for what is not."""

from __future__ import annotations

from typing import Any

import pytest

import vllm_spec_plugins
from vllm_spec_plugins import choices, registry
from vllm_spec_plugins.config import LookaheadSettings, MedusaSettings, NoneSettings, SettingError
from vllm_spec_plugins.tree import from_choices


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


@pytest.mark.parametrize(
    "value",
    [
        "medusa:model=heads,choices=0/0.0/0.1/1",
        "medusa:choices=0/0.0/0.1/1,model=heads,nodes=4,depth=2,ranks=2,min_chance=0",
        '{"name": "medusa", "model": "heads", "choices": [[0], [0, 0], [0, 1], [1]]}',
        {"name": "medusa", "model": "heads", "choices": ((0,), (0, 0), (0, 1), (1,))},
    ],
)
def test_a_fixed_tree_may_be_written_in_several_ways_and_decides_what_describes_it(value: Any) -> None:
    settings = registry.resolve(value)
    assert settings == MedusaSettings(model="heads", nodes=4, depth=2, ranks=2, min_chance=0.0, choices="0/0.0/0.1/1")
    assert registry.resolve(settings.as_dict()) == settings


@pytest.mark.parametrize("preset", choices.PRESETS)
def test_every_preset_is_a_tree_in_its_own_order(preset: str) -> None:
    settings = registry.resolve(f"medusa:model=heads,choices={preset}")
    assert isinstance(settings, MedusaSettings)
    assert registry.resolve(settings.as_dict()) == settings
    assert registry.method_of(settings).shape(settings) == (63, max(map(len, settings.paths)))
    assert choices.text(settings.paths) == choices.PRESETS[preset]
    rows = {(): 0} | {path: row for row, path in enumerate(settings.paths, start=1)}
    assert from_choices(settings.paths).parents == tuple(rows[path[:-1]] for path in settings.paths)


def test_a_name_alone_takes_the_defaults() -> None:
    assert registry.resolve("lookahead") == LookaheadSettings()
    assert registry.resolve("none") == NoneSettings()


def test_settings_survive_the_way_to_another_process() -> None:
    settings = registry.resolve("lookahead:window=3,prompt_pool=false,min_chance=0.25")
    assert registry.resolve(settings.as_dict()) == settings
    assert settings == LookaheadSettings(window=3, prompt_pool=False, min_chance=0.25)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("lookahed", "there is no plugin 'lookahed' (did you mean 'lookahead'?); valid are none, lookahead"),
        ("lookahead:windw=3", "there is no setting 'windw' (did you mean 'window'?); valid are adapt, window, ngram"),
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
        ("medusa", "medusa: model is missing; write medusa:model=FOLDER_OR_HUB_ID"),
        ("medusa:model=heads,depth=0", "medusa: depth=0 is out of range; valid are 1 to 16"),
        ("medusa:model=heads,ranks=65", "medusa: ranks=65 is out of range; valid are 1 to 64"),
        ("medusa:choices=0/1", "medusa: model is missing"),
        (
            "medusa:model=heads,choices=vicuna",
            "choices=vicuna is neither paths of ranks as 0/0.0/1 nor one of mc_sim_7b_63",
        ),
        ("medusa:model=heads,choices=0/0.-1", "choices=0/0.-1 is neither paths of ranks"),
        ("medusa:model=heads,choices=0/0.0.0", "choices=0/0.0.0 has 0.0.0 without 0.0, which it hangs below"),
        ("medusa:model=heads,choices=0/1/0", "choices=0/1/0 has 0 twice; give every path once"),
        ("medusa:model=heads,choices=0/64", "choices=0/64 has ranks=65; valid are at most 64"),
        ("medusa:model=heads,choices=0/1,nodes=3", "nodes=3 contradicts choices=0/1, from which nodes=2 follows"),
        ("medusa:model=heads,choices=0/1,min_chance=0.1", "min_chance=0.1 contradicts choices=0/1"),
        (
            {"name": "medusa", "model": "heads", "choices": []},
            "choices=[] is no list of paths of ranks as [[0], [0, 0], [1]]",
        ),
        ({"name": "medusa", "model": "heads", "choices": [[0], [True]]}, "is no list of paths of ranks"),
        ({"name": "medusa", "model": "heads", "choices": 3}, "choices=3 is no list of paths of ranks"),
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
