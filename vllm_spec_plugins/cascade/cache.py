# SPDX-License-Identifier: Apache-2.0
"""The answer cache: a request's answer, where one that was given before is still right."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vllm_spec_plugins.cascade.cache_key import Key, Use, cacheable, tenant
from vllm_spec_plugins.cascade.cache_settings import CacheSettings
from vllm_spec_plugins.cascade.eviction import POLICIES
from vllm_spec_plugins.cascade.semantic import Embedder, Semantic, embedder
from vllm_spec_plugins.cascade.store import CacheError, Limits, Store

__all__ = ["Answer", "Cache", "CacheError", "CacheSettings", "Key", "Stats", "Use", "cacheable", "open_cache", "tenant"]


@dataclass(frozen=True)
class Answer:
    """A response body and what it took.

    Attributes:
        payload: the body, as JSON has it.
        usage: tokens, by name.
        cost: of making it, in any unit that is the same for all answers of a cache; >= 0.
        created: when it was made, seconds since the epoch; 0 until it is put into a cache.
        similarity: of the question that it was made for, if found by a semantic key; None if that was the same question.
    """

    payload: Mapping[str, Any]
    usage: Mapping[str, int]
    cost: float
    created: float = 0.0
    similarity: float | None = None


@dataclass
class Stats:
    """What one opened cache did, and what its store holds. `saved` is the cost of the answers that were found."""

    hits: int = 0
    semantic_hits: int = 0
    misses: int = 0
    puts: int = 0
    declined: int = 0  # answers that the others were worth more than
    saved: float = 0.0
    entries: int = 0
    bytes: int = 0


class Cache:
    """Answers by exact key, then by the meaning of the question if the settings say so.

    Every method may be called from any thread, and blocks for the store's or embedder's answer: from asyncio,
    ``await asyncio.to_thread(cache.get, key)``. All but `key` and `use` raise CacheError when there is none; the request can then
    be answered as if there were no cache.

    Args:
        settings: validated.
        store: of the answers.
        semantic: of near questions, or None.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        settings: CacheSettings,
        store: Store,
        semantic: Semantic | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.settings, self._store, self._semantic, self._clock = settings, store, semantic, clock
        self._lock, self._stats = threading.Lock(), Stats()

    def key(self, request: Mapping[str, Any], api_key: str | None, *, model: str = "", endpoint: str = "chat") -> Key:
        """`Key.of` for the client with this API key, under the settings' `shared` and `version`."""
        named = model or str(request.get("model", ""))
        if self.settings.version:
            named = json.dumps([named, self.settings.version])
        return Key.of(request, tenant=tenant(api_key, self.settings.shared), model=named, endpoint=endpoint)

    def use(self, request: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Use:
        """`cacheable` under the settings' `sampled`."""
        return cacheable(request, headers, sampled=self.settings.sampled)

    def get(self, key: Key, *, max_age: float = math.inf) -> Answer | None:
        """The answer, no older than `max_age` seconds, or None. Counts as one request for `key` either way."""
        now = self._clock()
        oldest = now - min(max_age, self.settings.max_age)
        answer = _unpack(self._store.get(key.digest, now))
        if answer is not None and answer.created < oldest:
            answer = None
        if answer is None and self._semantic is not None and key.text is not None:
            answer = self._near(key, self._semantic, now, oldest)
        with self._lock:
            if answer is None:
                self._stats.misses += 1
            else:
                self._stats.hits += answer.similarity is None
                self._stats.semantic_hits += answer.similarity is not None
                self._stats.saved += answer.cost
        return answer

    def _near(self, key: Key, semantic: Semantic, now: float, oldest: float) -> Answer | None:
        """The answer to the nearest question that is still there and young enough; it counts as asked for."""
        assert key.text is not None
        for similarity, digest in semantic.near(key.group(semantic.embedder.name), key.text):
            if digest == key.digest:
                continue
            answer = _unpack(self._store.get(digest, now))
            if answer is not None and answer.created >= oldest:
                return replace(answer, similarity=similarity)
        return None

    def put(self, key: Key, answer: Answer, cost: float | None = None) -> bool:
        """Keep `answer`, or replace what is under its key; False: there is no room that it is worth.

        Args:
            cost: of making it again, where that is not the answer's own.

        Raises ValueError for a cost that is not a finite number >= 0, and for a payload that is not JSON.
        """
        cost = answer.cost if cost is None else cost
        if not (cost >= 0 and math.isfinite(cost)):
            raise ValueError(f"an answer's cost is a finite number of at least 0, not {cost}")
        now = self._clock()
        data = _pack(replace(answer, cost=cost, created=now, similarity=None))
        group, vector = "", b""
        if self._semantic is not None and key.text is not None:
            group = key.group(self._semantic.embedder.name)
            vector = self._semantic.vector(key.text).tobytes()
        kept = self._store.put(key.digest, data, cost, now, group, vector)
        with self._lock:
            self._stats.puts += kept
            self._stats.declined += not kept
        return kept

    def stats(self) -> Stats:
        """A copy."""
        entries, size = self._store.size()
        with self._lock:
            return replace(self._stats, entries=entries, bytes=size)

    def close(self) -> None:
        """Let go of files and connections."""
        self._store.close()


def open_cache(
    settings: CacheSettings, *, clock: Callable[[], float] = time.time, embed: Embedder | None = None
) -> Cache:
    """The cache that `settings` describe; `embed` instead of the embedder that they name. Raises SettingError, CacheError."""
    policy = POLICIES[settings.eviction](settings.half_life)
    limits = Limits(settings.max_entries, settings.max_bytes, settings.remembered * settings.max_entries)
    if settings.semantic is not None and embed is None:
        embed = embedder(settings)
    store: Store
    if settings.in_redis:
        from vllm_spec_plugins.cascade.store_redis import RedisStore

        store = RedisStore(settings.store, policy, limits)
    else:
        from vllm_spec_plugins.cascade.store_sqlite import SQLiteStore

        store = SQLiteStore(Path(settings.store), policy, limits)
    semantic = Semantic(embed, settings.semantic, store) if settings.semantic is not None and embed else None
    return Cache(settings, store, semantic, clock)


def _pack(answer: Answer) -> bytes:
    try:
        return json.dumps(asdict(answer), allow_nan=False, separators=(",", ":")).encode()
    except TypeError as error:
        raise ValueError(f"the answer is not JSON: {error}") from error


def _unpack(data: bytes | None) -> Answer | None:
    return None if data is None else Answer(**json.loads(data))
