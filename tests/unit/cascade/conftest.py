# SPDX-License-Identifier: Apache-2.0
"""A real Redis server on a socket of its own, and both kinds of store."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from vllm_spec_plugins.cascade.eviction import POLICIES
from vllm_spec_plugins.cascade.store import Limits, Store
from vllm_spec_plugins.cascade.store_redis import RedisStore
from vllm_spec_plugins.cascade.store_sqlite import SQLiteStore

OpenStore = Callable[..., Store]


@pytest.fixture(scope="session")
def redis_server() -> Iterator[str]:
    """The URL of a server that keeps nothing on disk."""
    program = shutil.which("redis-server")
    assert program, "redis-server is not installed, and these tests need a real one: apt-get install redis-server"
    with tempfile.TemporaryDirectory(prefix="redis-") as folder:  # a socket's path has little room
        socket = Path(folder) / "s"
        arguments = ["--port", "0", "--unixsocket", str(socket), "--save", "", "--appendonly", "no", "--dir", folder]
        with subprocess.Popen([program, *arguments], stdout=subprocess.DEVNULL) as server:
            try:
                deadline = time.monotonic() + 30
                while not socket.exists():
                    assert server.poll() is None, f"redis-server ended with status {server.returncode}"
                    assert time.monotonic() < deadline, "redis-server made no socket within 30 s"
                    time.sleep(0.02)
                yield f"unix://{socket}"
            finally:
                server.kill()


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """The same, empty."""
    with redis.Redis.from_url(redis_server) as client:
        client.flushall()
    return redis_server


@pytest.fixture(params=["sqlite", "redis"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenStore]:
    """Opens the same place every time: policy, half-life and limits as given."""
    opened: list[Store] = []
    url = request.getfixturevalue("redis_url") if request.param == "redis" else ""

    def make(
        policy: str = "lec", half_life: float = 100.0, entries: int = 8, size: int = 1 << 20, remembered: int = 32
    ) -> Store:
        chosen, limits = POLICIES[policy](half_life), Limits(entries, size, remembered)
        opened.append(RedisStore(url, chosen, limits) if url else SQLiteStore(tmp_path / "answers", chosen, limits))
        return opened[-1]

    yield make
    for store in opened:
        store.close()
