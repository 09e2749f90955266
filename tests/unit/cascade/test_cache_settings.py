# SPDX-License-Identifier: Apache-2.0
"""The answer cache's settings: one sentence for each that cannot be used."""

from __future__ import annotations

import math
from typing import Any

import pytest

from vllm_spec_plugins.cascade.cache_settings import CacheSettings
from vllm_spec_plugins.config import SettingError


def test_defaults_are_valid_and_typed_values_are_taken() -> None:
    assert CacheSettings.parse({}) == CacheSettings()
    given = CacheSettings.parse({"half_life": 60, "max_age": math.inf, "semantic": None, "store": "redis://h/0"})
    assert given.half_life == 60.0
    assert given.in_redis
    assert not CacheSettings().in_redis


def test_an_embedder_of_either_kind_is_taken() -> None:
    served = {"semantic": 0.9, "embedder": "http://h:1", "embedder_model": "m", "embedder_key_env": "KEY"}
    assert CacheSettings.parse(served).semantic == 0.9
    assert CacheSettings.parse({"semantic": 1, "embedder": "sentence-transformers:m"}).semantic == 1.0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"evicton": "lru"}, ["'evicton'", "did you mean 'eviction'?", "valid are store, max_entries"]),
        ({"eviction": "mru"}, ["eviction=mru", "lec, lfu, lru"]),
        ({"max_entries": 0}, ["max_entries=0", "1 to"]),
        ({"max_entries": "9"}, ["max_entries=9", "whole number"]),
        ({"max_entries": True}, ["max_entries=True", "whole number"]),
        ({"max_entries": 2.5}, ["max_entries=2.5", "whole number"]),
        ({"half_life": 0}, ["half_life=0", "0.001 and more"]),
        ({"half_life": math.nan}, ["half_life=nan", "a number"]),
        ({"max_age": -1}, ["max_age=-1", "0.0 and more"]),
        ({"sampled": 1}, ["sampled=1", "true or false"]),
        ({"shared": None}, ["shared=None", "text"]),
        ({"store": ""}, ["store="]),
        ({"store": "postgres://h"}, ["store=postgres://", "redis://"]),
        ({"semantic": 0.9}, ["semantic=0.9", "embedder=None", "both"]),
        ({"embedder": "sentence-transformers:m"}, ["semantic=None", "both"]),
        ({"semantic": 1.1, "embedder": "sentence-transformers:m"}, ["semantic=1.1", "0.0 to 1.0"]),
        ({"semantic": 0.9, "embedder": "m"}, ["embedder=m", "http://", "sentence-transformers:NAME"]),
        ({"semantic": 0.9, "embedder": "http://h"}, ["embedder=http://h", "embedder_model=None"]),
        (
            {"semantic": 0.9, "embedder": "sentence-transformers:m", "embedder_model": "m"},
            ["embedder_model=m", "anything else has none"],
        ),
        ({"embedder_key_env": "KEY"}, ["embedder_key_env=KEY", "http://"]),
    ],
)
def test_what_cannot_be_used_is_one_sentence(given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(SettingError) as refused:
        CacheSettings.parse(given)
    message = str(refused.value)
    assert message.startswith("cache: ")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_password_in_a_url_is_not_repeated() -> None:
    with pytest.raises(SettingError) as refused:
        CacheSettings.parse({"store": "postgres://user:secret@h"})
    assert "secret" not in str(refused.value)
