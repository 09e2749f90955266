# SPDX-License-Identifier: Apache-2.0
"""A process that asks a store for answers and puts them there until it is killed; says on stdout what was acknowledged."""

from __future__ import annotations

import sys

from vllm_spec_plugins.cascade.eviction import LEC
from vllm_spec_plugins.cascade.store import Limits, Store
from vllm_spec_plugins.cascade.store_redis import RedisStore
from vllm_spec_plugins.cascade.store_sqlite import SQLiteStore


def answer(key: str) -> bytes:
    return key.encode() * 40


def main(place: str, name: str, count: int, entries: int) -> None:
    limits = Limits(entries, 1 << 30, 100)
    kind = RedisStore if place.startswith("unix://") else SQLiteStore
    store: Store = kind(place, LEC(1e6), limits)
    for number in range(count):
        key = f"{name} {number}"
        found = store.get(key, number)
        assert found in (None, answer(key)), "an answer of another key"
        assert store.put(key, answer(key), 1.0 + number, number)
        print(key, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
