# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest

from vllm_spec_plugins.cascade.config import CascadeConfigError, CascadeSettings, client_keys, load, parse, secret

SMALL = {
    "name": "small",
    "model": "a",
    "upstreams": [{"url": "http://one:8000/v1/", "api_key_env": "ONE"}],
    "input_price": 1,
    "output_price": 2.0,
}
LARGE = {**SMALL, "name": "large", "upstreams": [{"url": "https://two"}], "input_price": 10, "output_price": 20}
WHOLE: dict[str, Any] = {"stages": [SMALL, LARGE], "policy": {"kind": "confidence"}}


def test_a_configuration_is_read_with_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "policy: {kind: vote, samples: 6}\nstages:\n"
        "- {name: s, model: m, input_price: 0, output_price: 0, upstreams: [{url: 'http://h:1/v1'}]}\n"
        "- {name: t, model: m, input_price: 1, output_price: 1, upstreams: [{url: 'http://h:2'}, {url: 'http://h:3', name: x}]}\n"
    )
    settings = load(path)
    assert isinstance(settings, CascadeSettings)
    assert [[u.title for u in stage.upstreams] for stage in settings.stages] == [["h:1"], ["h:2", "x"]]
    assert settings.stages[0].upstreams[0].url == "http://h:1"
    assert settings.stages[0].hedge_after is None
    assert settings.threshold == 0.8


def stage(**changes: Any) -> dict[str, Any]:
    return {"stages": [{**SMALL, **changes}, LARGE]}


# change: what the sentence says
REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"tresh": 1}, ["no key 'tresh'", "valid are stages, policy, threshold"]),
    ({"threshold": 2}, ["threshold=2", "less than or equal to 1"]),
    ({"threshold": "0.5"}, ["threshold='0.5'", "valid number"]),
    ({"threshold": True}, ["threshold=True", "valid number"]),
    ({"policy": {"kind": "luck"}}, ["policy.kind='luck'", "valid are confidence, vote, scorer"]),
    ({"policy": {}}, ["policy.kind is missing", "valid are confidence"]),
    ({"policy": {"kind": "confidence", "statistic": "max"}}, ["policy.statistic='max'", "'mean', 'min' or 'quantile'"]),
    ({"policy": {"kind": "vote", "mean": 1}}, ["no key 'mean'", "valid are kind, samples"]),
    ({"policy": {"kind": "scorer"}}, ["model", "url"]),
    ({"policy": {"kind": "self_verification", "template": "ok?"}}, ["template='ok?'", "{question} and {answer}"]),
    ({"stages": [SMALL]}, ["stages", "at least 2"]),
    ({"stages": [SMALL, SMALL]}, ["'small' is given twice"]),
    ({"stages": [LARGE, SMALL]}, ["cheapest first", "'large'", "'small'"]),
    (stage(upstreams=[]), ["stages.0.upstreams=[]", "at least 1"]),
    (stage(upstreams=[{"url": "one:8000"}]), ["url='one:8000'", "http://host:port"]),
    (stage(upstreams=[{"url": "http://one"}, {"url": "http://one"}]), ["'one' is given twice"]),
    (stage(output_price=-1), ["stages.0.output_price=-1", "greater than or equal to 0"]),
    (stage(hedge_after=0), ["hedge_after=0", "greater than 0"]),
    ({"retry": {"attempts": 0}}, ["retry.attempts=0", "greater than or equal to 1"]),
]


@pytest.mark.parametrize(("change", "words"), REFUSED, ids=[" ".join(words) for _, words in REFUSED])
def test_a_wrong_value_is_one_sentence_that_names_it(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(CascadeConfigError) as refused:
        parse({**WHOLE, **change}, "c.yaml")
    sentence = str(refused.value)
    assert sentence.startswith("c.yaml: ")
    assert "\n" not in sentence
    for word in words:
        assert word in sentence


@pytest.mark.parametrize(
    "change",
    [
        stage(upstreams=[{"url": "http://me:hunter2@one"}]),
        stage(upstreams=[{"url": "http://one?key=hunter2"}]),
        stage(upstreams=[{"url": "http://one", "api_key": "hunter2"}]),
        stage(upstreams=[{"url": "http://one", "api_key_env": "sk-hunter2"}]),
        {"client_keys_env": "me=hunter2"},
    ],
)
def test_a_key_in_the_file_is_refused_and_not_repeated(change: dict[str, Any]) -> None:
    with pytest.raises(CascadeConfigError) as refused:
        parse({**WHOLE, **change})
    assert "_env" in str(refused.value)
    assert "hunter2" not in "".join(traceback.format_exception(refused.value))


@pytest.mark.parametrize(("text", "words"), [("a: [", "not YAML"), ("- 1", "not a mapping")])
def test_a_file_that_is_no_configuration_is_told(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "c").write_text(text)
    with pytest.raises(CascadeConfigError, match=words):
        load(tmp_path / "c")
    with pytest.raises(CascadeConfigError, match="cannot be read"):
        load(tmp_path / "absent")


def test_keys_come_from_the_environment_alone() -> None:
    assert secret(None, "k", {}) is None
    assert secret("ONE", "k", {"ONE": " abc "}) == "abc"
    assert client_keys("C", {"C": "a=k1, b=k2,a=k3"}) == {"k1": "a", "k2": "b", "k3": "a"}
    with pytest.raises(CascadeConfigError, match="k=ONE: the environment has no such variable"):
        secret("ONE", "k", {})
    for broken in ("key", "a=", "a=k,b=k"):
        with pytest.raises(CascadeConfigError, match="tenant=key,tenant=key") as refused:
            client_keys("C", {"C": broken})
        assert "=k," not in str(refused.value).replace("tenant=key,", "")
