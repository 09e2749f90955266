# SPDX-License-Identifier: Apache-2.0
"""Settings of the answer cache: what stands under ``cache:`` in a router's configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from types import NoneType
from typing import Any, Self, get_args, get_type_hints

from vllm_spec_plugins.cascade.eviction import POLICIES
from vllm_spec_plugins.config import SettingError, setting

REDIS = ("redis://", "rediss://", "unix://")
SENTENCE_TRANSFORMERS = "sentence-transformers:"

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True, repr=False)
class CacheSettings:
    """Made with `parse`, which checks everything once. Its text, which may be logged, has no password in it."""

    store: str = setting(
        "answers.sqlite", "a file (SQLite), or redis://..., rediss://..., unix://... for a Redis server"
    )
    max_entries: int = setting(100_000, "answers kept", least=1, most=1 << 31)
    max_bytes: int = setting(1 << 30, "bytes of all answers kept", least=1, most=1 << 50)
    eviction: str = setting(
        "lec", "lec: the least frequency x cost goes; lfu: the least frequency; lru: the oldest use"
    )
    half_life: float = setting(7 * 86400.0, "seconds after which a request counts half; .inf: never", least=1e-3)
    remembered: int = setting(4, "keys without an answer whose frequency is kept, per answer", least=0, most=1000)
    max_age: float = setting(math.inf, "seconds after which an answer is made again; .inf: never", least=0.0)
    shared: str = setting("", "one name for all clients: they see each other's answers; empty: by API key")
    version: str = setting(
        "", "any text; with another one older answers are not found, for instance after a model changed"
    )
    sampled: bool = setting(False, "cache sampled requests without a seed too: the first draw becomes everybody's")
    semantic: float | None = setting(
        None, "LOSSY: answer a question as one with at least this cosine similarity", least=0.0, most=1.0
    )
    embedder: str = setting(
        "", "for semantic: http(s)://HOST:PORT of an OpenAI-compatible server, or sentence-transformers:NAME"
    )
    embedder_model: str = setting("", "model name that the embedding server knows")
    embedder_key_env: str = setting("", "environment variable that holds the embedding server's API key")

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Self:
        """Settings from keys and typed values. Raises SettingError with one sentence."""
        known, types = {f.name: f for f in fields(cls)}, get_type_hints(cls)
        values = {}
        for key, value in given.items():
            if key not in known:
                close = get_close_matches(str(key), known, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise SettingError(f"cache: there is no setting {key!r}{hint}; valid are {', '.join(known)}")
            values[key] = _typed(key, value, types[key])
            _check_range(key, values[key], known[key].metadata)
        settings = cls(**values)
        settings._check()
        return settings

    def _check(self) -> None:
        if self.eviction not in POLICIES:
            raise SettingError(f"cache: eviction={self.eviction} is not valid; valid are {', '.join(POLICIES)}")
        if not self.store:
            raise SettingError("cache: store= names nothing; name a file or a URL that starts with " + ", ".join(REDIS))
        if "://" in self.store and not self.in_redis:
            scheme = self.store.partition("://")[0]
            raise SettingError(f"cache: store={scheme}://... is not valid; valid are a file and {', '.join(REDIS)}")
        if (self.semantic is None) != (not self.embedder):
            raise SettingError(
                f"cache: semantic={self.semantic} with embedder={self.embedder or None} does not go together; "
                f"give both, or neither"
            )
        remote = self.embedder.startswith(("http://", "https://"))
        if self.embedder and not remote and not self.embedder.startswith(SENTENCE_TRANSFORMERS):
            raise SettingError(
                f"cache: embedder={self.embedder} is not valid; valid are http://..., https://... and "
                f"{SENTENCE_TRANSFORMERS}NAME"
            )
        if remote != bool(self.embedder_model):
            raise SettingError(
                f"cache: embedder={self.embedder or None} with embedder_model={self.embedder_model or None} does not go "
                f"together; a server needs the model's name, anything else has none"
            )
        if remote and "@" in self.embedder:
            raise SettingError("cache: embedder=... has a user or password in it; name a variable in embedder_key_env")
        if self.embedder_key_env and not remote:
            raise SettingError(
                f"cache: embedder_key_env={self.embedder_key_env} belongs to an embedder at http://... or https://..."
            )

    def __repr__(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["store"] = re.sub(r"(?<=://).*@", "...@", self.store)
        return f"CacheSettings({', '.join(f'{name}={value!r}' for name, value in values.items())})"

    @property
    def in_redis(self) -> bool:
        return self.store.startswith(REDIS)


def _typed(key: str, value: Any, kind: Any) -> Any:
    """`value`, which must be of `kind`; a whole number is a number too."""
    allowed = get_args(kind) or (kind,)
    if value is None and NoneType in allowed:
        return None
    if type(value) is int and float in allowed:
        return float(value)
    if type(value) is not allowed[0] or (isinstance(value, float) and math.isnan(value)):
        raise SettingError(f"cache: {key}={value} is not {KINDS[allowed[0]]}")
    return value


def _check_range(key: str, value: Any, limits: Mapping[str, Any]) -> None:
    least, most = limits.get("least"), limits.get("most")
    if value is None or ((least is None or value >= least) and (most is None or value <= most)):
        return
    valid = f"{least} to {most}" if most is not None else f"{least} and more"
    raise SettingError(f"cache: {key}={value} is out of range; valid are {valid}")
