# SPDX-License-Identifier: Apache-2.0
"""The answer cache in front of a cascade."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from vllm_spec_plugins.cascade.config import CascadeConfigError, CascadeSettings
from vllm_spec_plugins.cascade.request import Body, Request
from vllm_spec_plugins.config import SettingError

logger = logging.getLogger(__name__)

# Of the response, not of the answer.
OURS = ("id", "model", "cascade")


class Answers(Protocol):
    """What the router needs of a cache: that of cascade/cache.py."""

    def use(self, request: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Any: ...

    def key(
        self, request: Mapping[str, Any], api_key: str | None, *, model: str = "", endpoint: str = "chat"
    ) -> Any: ...

    def get(self, key: Any, *, max_age: float = math.inf) -> Any: ...

    def put(self, key: Any, answer: Any, cost: float | None = None) -> bool: ...

    def close(self) -> None: ...


def open_answers(settings: CascadeSettings, source: str) -> Answers | None:
    """The cache of a configuration, if it has one. Raises CascadeConfigError where it cannot be used."""
    if settings.cache is None:
        return None
    from vllm_spec_plugins.cascade.cache import CacheError, CacheSettings, open_cache  # type: ignore[import-not-found, unused-ignore]

    try:
        opened: Answers = open_cache(CacheSettings.parse(settings.cache))
    except (SettingError, CacheError) as error:
        raise CascadeConfigError(f"{source}: {error}") from error
    return opened


def fingerprint(settings: CascadeSettings) -> str:
    """All of a configuration that decides an answer, beside the threshold: the stages' models and the policy."""
    what = [[(stage.name, stage.model) for stage in settings.stages], settings.policy.model_dump_json()]
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Slot:
    """One request's place in the cache. A cache that fails is logged, and the request answered without it."""

    cache: Answers
    key: Any
    use: Any

    @classmethod
    def of(
        cls, cache: Answers, request: Request, tenant: str | None, headers: Mapping[str, str], cascade: str
    ) -> Slot | None:
        """None where the cache has no business with the request. `tenant`: None for clients without a key."""
        use = cache.use(request.body, headers)
        if not (use.read or use.write):
            return None
        model = f"{cascade} {request.threshold:g}"
        return cls(cache, cache.key(request.body, tenant, model=model, endpoint=request.kind), use)

    async def find(self) -> Body | None:
        """The response's JSON but for `OURS`."""
        from vllm_spec_plugins.cascade.cache import CacheError  # type: ignore[import-not-found, unused-ignore]

        if not self.use.read:
            return None
        try:
            found = await asyncio.to_thread(self.cache.get, self.key, max_age=self.use.max_age)
        except CacheError as error:
            logger.warning("the answer cache: %s", error)
            return None
        return None if found is None else dict(found.payload)

    async def keep(self, payload: Body, cost: float) -> None:
        """Put a response into the cache; `cost`: of the whole request."""
        from vllm_spec_plugins.cascade.cache import Answer, CacheError  # type: ignore[import-not-found, unused-ignore]

        if not self.use.write:
            return
        payload = {name: value for name, value in payload.items() if name not in OURS}
        usage = {name: count for name, count in payload["usage"].items() if isinstance(count, int)}
        try:
            await asyncio.to_thread(self.cache.put, self.key, Answer(payload, usage, cost))
        except CacheError as error:
            logger.warning("the answer cache: %s", error)
