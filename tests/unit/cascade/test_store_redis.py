# SPDX-License-Identifier: Apache-2.0
"""What only a Redis server can do to a cache."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import redis

from vllm_spec_plugins.cascade import store_redis
from vllm_spec_plugins.cascade.eviction import LEC
from vllm_spec_plugins.cascade.store import CacheError, Limits
from vllm_spec_plugins.cascade.store_redis import RedisStore

LIMITS = Limits(100, 1 << 20, 100)


def test_a_server_that_lost_its_scripts_gets_them_again(redis_url: str) -> None:
    store = RedisStore(redis_url, LEC(1e6), LIMITS)
    store.put("key", b"x", 1.0, 1.0)
    with redis.Redis.from_url(redis_url) as client:
        client.script_flush()
    assert store.get("key", 2.0) == b"x"
    store.close()


def test_vectors_come_page_by_page_and_all_of_them(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_redis, "PAGE", 3)
    store = RedisStore(redis_url, LEC(1e6), LIMITS)
    for number in range(10):
        store.put(f"key {number}", b"x", 1.0, 1.0, "g" * 64, bytes([number]) * 4)
    rows = store.vectors(0)
    assert [row.key for row in rows] == [f"key {number}" for number in range(10)]
    assert store.vectors(rows[3].revision) == rows[4:]
    store.close()


def test_caches_with_different_prefixes_do_not_meet_and_nothing_else_is_touched(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.set("mine", "1")
        one, other = (RedisStore(redis_url, LEC(1e6), LIMITS, prefix) for prefix in ("one:", "other:"))
        one.put("key", b"x", 1.0, 1.0)
        assert other.get("key", 2.0) is None
        one.close()
        other.close()
        assert {name.split(b":")[0] for name in client.keys("*")} == {b"mine", b"one", b"other"}
        assert client.get("mine") == b"1"


def test_a_server_that_is_not_there_is_one_sentence_without_the_password() -> None:
    with pytest.raises(CacheError) as refused:
        RedisStore("redis://:secret@127.0.0.1:1/0", LEC(1e6), LIMITS)
    assert str(refused.value).startswith("the answer cache 127.0.0.1:1/0 does not answer: ")
    assert "secret" not in str(refused.value)


def test_a_url_that_the_client_cannot_read_is_one_sentence() -> None:
    with pytest.raises(CacheError, match=r"not a URL that the Redis client reads"):
        RedisStore("redis://host:port/0", LEC(1e6), LIMITS)


def test_without_the_client_library_the_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_redis(name: str, *arguments: Any, **others: Any) -> Any:
        if name == "redis":
            raise ImportError(name)
        return real(name, *arguments, **others)

    monkeypatch.setattr(builtins, "__import__", without_redis)
    with pytest.raises(CacheError, match=r"vllm-spec-plugins\[redis\]"):
        RedisStore("redis://localhost", LEC(1e6), LIMITS)
