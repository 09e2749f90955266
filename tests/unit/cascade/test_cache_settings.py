# SPDX-License-Identifier: Apache-2.0
"""The answer cache's settings: one sentence for each that cannot be used."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from pathlib import Path
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


@pytest.mark.parametrize(
    "given",
    [
        {"store": "postgres://user:secret@h"},
        {"semantic": 0.9, "embedder": "http://user:secret@h", "embedder_model": "m"},
    ],
)
def test_a_password_in_a_url_is_not_repeated_in_a_message(given: dict[str, Any]) -> None:
    with pytest.raises(SettingError) as refused:
        CacheSettings.parse(given)
    assert "secret" not in str(refused.value)


def test_a_password_is_not_in_what_a_log_may_show() -> None:
    shown = repr(CacheSettings.parse({"store": "redis://user:se@cret@h:1/0", "max_entries": 7}))
    assert "store='redis://...@h:1/0', max_entries=7" in shown
    assert "cret" not in shown


def test_the_documentation_has_every_setting_with_its_default() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "answer-cache.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*?)\|", text, re.MULTILINE))
    defaults = CacheSettings()
    assert list(rows) == [field.name for field in fields(CacheSettings)]
    for name, cell in rows.items():
        value, shown = getattr(defaults, name), cell.strip().strip("`")
        words = {math.inf: ".inf", False: "false", None: "", "": ""}
        wanted = words[value] if value in words else f"{value:.0f}" if isinstance(value, float) else str(value)
        assert shown == wanted, name
