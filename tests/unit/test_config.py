# SPDX-License-Identifier: Apache-2.0
"""The ``--plugin`` grammar: what is accepted, and the sentence for what is not."""

from __future__ import annotations

import argparse
import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest

import vllm_spec_plugins
from vllm_spec_plugins import choices, registry
from vllm_spec_plugins.config import SettingError
from vllm_spec_plugins.settings import LookaheadSettings, MedusaSettings, MixSettings, NoneSettings
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
        ('["lookahead", 3]', 'is not a list of plugins; write ["lookahead", '),
        ('["lookahead"', "is not valid JSON"),
        (3, "is not a list of plugins"),
        ("mix", "mix: mixes two plugins or more, and there is none; write --plugin lookahead --plugin medusa"),
        ("lookahead & mix:nodes=24", "mix: mixes two plugins or more, and there is lookahead; write"),
        ([], "mix: mixes two plugins or more, and there is none"),
        ("mix:sources=lookahead", "mix: there is no setting 'sources'; give each plugin a --plugin of its own"),
        ("mix:nodes=129 & lookahead", "mix: nodes=129 is out of range; valid are 0 to 128"),
        (
            "lookahead & skipdecode:speedup=2",
            "skipdecode: leaves out layers and proposes nothing, so it cannot be mixed (lookahead, skipdecode); serve it",
        ),
        ("skipdecode", "skipdecode: neither speedup nor both of max_layers and min_layers are given; write"),
        (
            "skipdecode:speedup=2,min_layers=3",
            "speedup=2 chooses min_layers, which is given too; leave one of them out",
        ),
        ("skipdecode:max_layers=4,min_layers=6", "warmup=1, min_layers=6, max_layers=4 do not go together"),
        (
            "skipdecode:speedup=2,levels=4,max_tokens=3",
            "levels=4 are more than the 3 places of max_tokens; use levels=3",
        ),
        ("skipdecode:speedup=2,levels=1", "levels=1 is no schedule; use levels=0 or 2 to 64"),
        ("lookahead & none", "none: has nothing to mix with the others (lookahead, none); leave it out"),
        ("lookahead & lookahead:guesses=3", "lookahead: is given 2 times; give it once"),
        ("lookahead & medusa:model=a & mix & mix:nodes=9", "mix: is given 2 times; give it once"),
        ("lookahead & medusa", "medusa: model is missing"),
        ("lookahead & lookahed", "there is no plugin 'lookahed' (did you mean 'lookahead'?)"),
        (
            "lookahead:window=4 & medusa:model=a",
            "lookahead: with window=4 goes on from the draws at all rows of its own tree, which a mixture cuts and "
            "moves, so it cannot be mixed (lookahead, medusa); use window=0",
        ),
        ("lookahead & jacobi", "jacobi: goes on from the draws at all rows of its own tree"),
        (
            "lookahead:nodes=9 & medusa:model=a,nodes=10 & mix:nodes=20",
            "mix: nodes=20 is more than the 19 that lookahead, medusa propose together; use nodes=19 or less",
        ),
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


@pytest.mark.parametrize(
    "value",
    [
        ["lookahead:guesses=3", "medusa:model=heads", "mix:nodes=24"],
        ["lookahead:guesses=3 & medusa:model=heads", "mix:nodes=24"],
        ["mix:nodes=24", {"name": "lookahead", "guesses": 3}, "medusa:model=heads"],
        "lookahead:guesses=3 & medusa:model=heads & mix:nodes=24",
        '["lookahead:guesses=3", {"name": "medusa", "model": "heads"}, {"name": "mix", "nodes": 24}]',
    ],
)
def test_several_plugins_may_be_written_in_several_ways(value: Any) -> None:
    mixed = registry.resolve(value)
    assert mixed == MixSettings(nodes=24, sources=(LookaheadSettings(guesses=3), MedusaSettings(model="heads")))
    assert registry.resolve(mixed.as_given()) == mixed
    assert registry.resolve(json.dumps(mixed.as_given())) == mixed
    assert registry.method_of(mixed).shape(mixed) == (24, 16)


def test_a_list_of_one_plugin_is_that_plugin() -> None:
    assert registry.resolve(["lookahead:guesses=3"]) == LookaheadSettings(guesses=3)


def test_a_folder_with_an_ampersand_needs_json() -> None:
    settings = registry.resolve({"name": "medusa", "model": "/R & D/heads"})
    assert settings == MedusaSettings(model="/R & D/heads")
    assert registry.resolve(json.dumps([settings.as_dict(), "lookahead"])).sources[0] == settings
    with pytest.raises(SettingError, match="there is no plugin 'D/heads'"):
        registry.resolve("medusa:model=/R & D/heads")


def test_the_tree_of_a_mixture_is_as_large_as_its_largest_source_unless_said() -> None:
    mixed = registry.resolve("lookahead:nodes=9,draft_length=6 & medusa:model=heads,nodes=20")
    assert registry.method_of(mixed).shape(mixed) == (20, 6)


@pytest.mark.parametrize(
    ("value", "adapt"),
    [
        ("lookahead & medusa:model=a", True),
        ("lookahead:adapt=false & medusa:model=a", False),
        ("lookahead & medusa:model=a,adapt=false", False),
        ("lookahead & medusa:model=a & mix:adapt=false", False),
    ],
)
def test_drafts_are_declined_only_if_every_plugin_lets_them(value: str, adapt: bool) -> None:
    mixed = registry.resolve(value)
    assert isinstance(mixed, MixSettings)
    assert mixed.adapt is adapt


def test_a_method_with_an_acceptance_rule_of_its_own_is_not_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deferring:
        name, lossless, needs_target = "deferring", False, False

    method = dataclasses.replace(registry.METHODS["medusa"], rule=lambda _: Deferring())
    monkeypatch.setitem(registry.METHODS, "medusa", method)
    with pytest.raises(SettingError, match=r"medusa: accepts by a rule of its own, so it cannot be mixed"):
        registry.resolve("lookahead & medusa:model=a")


def test_engine_args_take_several_plugins() -> None:
    given = vllm_spec_plugins.engine_args("lookahead", {"name": "medusa", "model": "heads"}, additional_config={"a": 1})
    assert given["additional_config"]["a"] == 1
    mixed = registry.resolve(given["additional_config"]["spec_plugins"])
    assert mixed == MixSettings(sources=(LookaheadSettings(), MedusaSettings(model="heads")))
    with pytest.raises(SettingError, match="nodes could belong to any of 2 plugins; write them with their plugin"):
        vllm_spec_plugins.engine_args("lookahead", "medusa:model=heads", nodes=24)
    with pytest.raises(SettingError, match="mixes two plugins or more, and there is none"):
        vllm_spec_plugins.engine_args()


def test_the_flag_may_be_given_several_times(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_spec_plugins.engine import flag

    parser = flag.add_to(argparse.ArgumentParser())
    expected = MixSettings(nodes=20, sources=(LookaheadSettings(), MedusaSettings(model="heads")))
    for argv in (
        ["--plugin", "lookahead", "--plugin", "medusa:model=heads", "--plugin", "mix:nodes=20"],
        ["--plugin", "lookahead & medusa:model=heads", "--plugin", '{"name": "mix", "nodes": 20}'],
    ):
        engine_args = flag.read(SimpleNamespace(additional_config={"other": 1}), parser.parse_args(argv))
        assert engine_args.additional_config["other"] == 1
        assert flag._asked_for(engine_args) == expected
    monkeypatch.setenv("VLLM_SPEC_PLUGIN", flag.to_environment(expected))
    assert flag._asked_for(SimpleNamespace(additional_config=None)) == expected


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
