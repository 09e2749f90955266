# SPDX-License-Identifier: Apache-2.0
"""Which requests have one answer, and which may be kept."""

from __future__ import annotations

import math
from typing import Any

import pytest

from vllm_spec_plugins.cascade.cache_key import Key, Use, cacheable, canonical, tenant

CHAT: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}],
    "temperature": 0,
    "max_tokens": 8,
}
PROMPT: dict[str, Any] = {"model": "m", "prompt": "why?", "temperature": 0}


def key(request: dict[str, Any], *, api_key: str | None = "a", **others: str) -> Key:
    return Key.of(request, tenant=tenant(api_key), **others)


@pytest.mark.parametrize(
    "changed",
    [
        {"stream": True, "stream_options": {"include_usage": True}},
        {"user": "u", "metadata": {"a": "b"}, "request_id": "1"},
        {"temperature": 0.0},
        {"n": 1},
        {"top_p": None},
        dict(reversed(CHAT.items())),
    ],
)
def test_what_does_not_change_the_answer_does_not_change_the_key(changed: dict[str, Any]) -> None:
    assert key({**changed, **{k: v for k, v in CHAT.items() if k not in changed}, **changed}).digest == key(CHAT).digest


@pytest.mark.parametrize(
    "changed",
    [
        {"messages": CHAT["messages"][1:]},
        {"messages": [CHAT["messages"][0], {"role": "user", "content": "why? "}]},
        {"messages": [CHAT["messages"][0], {"role": "assistant", "content": "why?"}]},
        {"max_tokens": 9},
        {"seed": 0},
        {"temperature": 1e-9},
        {"logprobs": True},
        {"guided_choice": ["a"]},
        {"an_unknown_field": 0},
        {"model": "n"},
    ],
)
def test_what_may_change_the_answer_changes_the_key(changed: dict[str, Any]) -> None:
    assert key({**CHAT, **changed}).digest != key(CHAT).digest


def test_two_api_keys_two_endpoints_and_two_models_never_share_a_key() -> None:
    keys = [
        key(CHAT),
        key(CHAT, api_key="b"),
        key(CHAT, api_key=None),
        key(CHAT, endpoint="completions"),
        key(CHAT, model="cascade-0.8"),
        Key.of(CHAT, tenant=tenant("a", shared="team")),
    ]
    assert len({one.digest for one in keys}) == len(keys)
    assert len({one.group("e") for one in keys}) == len(keys)


def test_a_shared_name_makes_all_clients_one_and_cannot_be_guessed_as_an_api_key() -> None:
    assert tenant("a", "team") == tenant("b", "team") == tenant(None, "team")
    assert tenant("a", "team") != tenant("a", "other")
    assert tenant("team") != tenant("a", "team")
    assert tenant("") != tenant(None)


def test_an_api_key_stands_nowhere_in_a_key() -> None:
    assert "sk-secret" not in repr(key(CHAT, api_key="sk-secret"))


def test_parts_that_join_to_the_same_text_stay_apart() -> None:
    assert Key("t", "ab", "c").digest != Key("t", "a", "bc").digest


def test_keys_that_differ_in_their_text_alone_are_of_one_group() -> None:
    other = {**CHAT, "messages": [CHAT["messages"][0], {"role": "user", "content": "what for?"}]}
    assert key(CHAT).group("e") == key(other).group("e") != key(CHAT).group("f")
    assert (key(CHAT).text, key(other).text) == ("why?", "what for?")
    assert key(CHAT).group("e") != key({**CHAT, "max_tokens": 9}).group("e")
    earlier = {**CHAT, "messages": [{"role": "system", "content": "be long"}, CHAT["messages"][1]]}
    assert key(CHAT).group("e") != key(earlier).group("e")
    prompt = {**PROMPT, "prompt": "what for?"}
    assert key(PROMPT).group("e") == key(prompt).group("e")


@pytest.mark.parametrize(
    "request_",
    [
        {**PROMPT, "prompt": [1, 2, 3]},
        {**PROMPT, "prompt": ["a", "b"]},
        {**CHAT, "messages": [*CHAT["messages"], {"role": "assistant", "content": "because"}]},
        {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]},
        {**CHAT, "messages": []},
    ],
)
def test_a_request_without_one_last_text_has_no_semantic_key(request_: dict[str, Any]) -> None:
    assert key(request_).text is None


@pytest.mark.parametrize("value", [math.nan, math.inf, object(), {1, 2}])
def test_what_json_cannot_carry_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"JSON"):
        canonical({"a": value})


def test_booleans_and_numbers_stay_apart_in_canonical_json() -> None:
    assert canonical({"b": [1.0, True, None, 1.5], "a": "ü"}) == r'{"a":"\u00fc","b":[1,true,null,1.5]}'


@pytest.mark.parametrize("changed", [{"temperature": 0}, {"temperature": 0.0}, {"temperature": 0.7, "seed": 0}])
def test_a_deterministic_request_is_cached(changed: dict[str, Any]) -> None:
    assert cacheable({**CHAT, **changed}) == Use(True, True)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"temperature": 0.7}, "without a seed"),
        ({"temperature": None}, "without a seed"),
        ({"n": 2}, "n=2"),
        ({"best_of": 3}, "best_of=3"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"web_search_options": {"size": 1}}, "web_search_options"),
    ],
)
def test_any_other_request_is_neither_read_nor_kept(changed: dict[str, Any], reason: str) -> None:
    use = cacheable({**CHAT, **changed})
    assert (use.read, use.write) == (False, False)
    assert reason in use.reason


def test_sampled_requests_are_cached_when_asked_for_and_tools_when_they_cannot_be_called() -> None:
    assert cacheable({**CHAT, "temperature": 0.7}, sampled=True) == Use(True, True)
    assert not cacheable({**CHAT, "n": 2}, sampled=True).read
    assert cacheable({**CHAT, "tools": [{"type": "function"}], "tool_choice": "none"}).read


@pytest.mark.parametrize(
    ("headers", "read", "write"),
    [
        ({"Cache-Control": "no-cache"}, False, True),
        ({"cache-control": "private, No-Cache"}, False, True),
        ({"Cache-Control": "no-store"}, False, False),
        ({"Cache-Control": "no-cache, no-store"}, False, False),
        ({"Cache-Control": "max-age=0"}, False, True),
        ({"Cache-Control": "max-age=soon"}, False, True),
        ({"Pragma": "no-cache"}, False, True),
        ({"Pragma": "no-cache", "Cache-Control": "max-age=9"}, True, True),
        ({"Cache-Control": "only-if-cached"}, True, True),
        ({"Authorization": "Bearer no-cache"}, True, True),
    ],
)
def test_cache_control_is_honoured(headers: dict[str, str], read: bool, write: bool) -> None:
    use = cacheable(CHAT, headers)
    assert (use.read, use.write) == (read, write)
    assert bool(use.reason) is not read


def test_max_age_is_handed_on() -> None:
    assert cacheable(CHAT, {"Cache-Control": 'max-age="60"'}).max_age == 60
    assert cacheable(CHAT).max_age == math.inf
