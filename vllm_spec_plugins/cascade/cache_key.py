# SPDX-License-Identifier: Apache-2.0
"""Which requests have the same answer, and which answers may be kept at all."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

# Fields that say how an answer travels or who pays for it, not what it is. All others count, unknown ones too.
TRANSPORT = frozenset(
    {
        *("model", "stream", "stream_options", "user", "metadata", "store", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "priority", "request_id"),
    }
)

# What lets an answer act, or read the world as it is at that moment.
ACTING = ("tools", "functions", "web_search_options")


@dataclass(frozen=True)
class Key:
    """What an answer is found by.

    Attributes:
        tenant: who may see it; see `tenant`.
        model: everything that decides the answer beside the request: the model's name, a cascade's thresholds, a version.
        request: the fields that count, as canonical JSON.
        frame: `request` without `text`, or "" where there is no one text in it.
        text: the last message of the user, or the prompt: what a semantic key compares.
    """

    tenant: str
    model: str
    request: str
    frame: str = ""
    text: str | None = None

    @classmethod
    def of(cls, request: Mapping[str, Any], *, tenant: str, model: str = "", endpoint: str = "chat") -> Key:
        """The key of an OpenAI request body.

        Args:
            model: instead of the request's own.
            endpoint: requests to different ones never meet.

        Raises ValueError for what JSON cannot carry.
        """
        fields = {name: value for name, value in request.items() if name not in TRANSPORT and value is not None}
        if fields.get("n") == 1:
            del fields["n"]
        frame, text = _without_text(fields)
        return cls(
            tenant,
            model or str(request.get("model", "")),
            canonical([endpoint, fields]),
            canonical([endpoint, frame]) if text is not None else "",
            text,
        )

    @cached_property
    def digest(self) -> str:
        """64 hexadecimal digits: what a store knows of the key."""
        return _hash("exact", self.tenant, self.model, self.request)

    def group(self, embedder: str) -> str:
        """64 hexadecimal digits that are equal for keys which differ in their text alone."""
        return _hash("group", self.tenant, self.model, self.frame, embedder)


def tenant(api_key: str | None, shared: str = "") -> str:
    """Who asks: the API key's hash; all clients without a key are one; with a `shared` name, all clients together are."""
    if shared:
        return _hash("shared", shared)
    return _hash("anonymous") if api_key is None else _hash("key", api_key)


def canonical(value: Any) -> str:
    """JSON in which equal values have equal text: sorted names, no blanks, 0 for 0.0. Raises ValueError for NaN and infinity."""
    try:
        return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"the request is not JSON: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def _without_text(fields: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The fields with the text taken out, and the text; None where it is not one piece of text."""
    messages = fields.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[-1], Mapping):
        last = messages[-1]
        if last.get("role") == "user" and isinstance(last.get("content"), str):
            return {**fields, "messages": [*messages[:-1], {**last, "content": None}]}, last["content"]
    if messages is None and isinstance(fields.get("prompt"), str):
        return {**fields, "prompt": None}, fields["prompt"]
    return dict(fields), None


def _hash(*parts: str) -> str:
    # JSON keeps the parts apart whatever they contain.
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Use:
    """What the cache may do for one request.

    Attributes:
        read: answer it from the cache.
        write: keep its answer.
        max_age: seconds; an older answer does not do.
        reason: why not, in a few words; "" where both are allowed.
    """

    read: bool
    write: bool
    max_age: float = math.inf
    reason: str = ""


def cacheable(request: Mapping[str, Any], headers: Mapping[str, str] | None = None, *, sampled: bool = False) -> Use:
    """What the cache may do for an OpenAI request body with these HTTP headers.

    Only one answer that is the same every time is cached: temperature=0 or a seed, n=1, no tools. `sampled` takes the first
    condition away. `Cache-Control` as in RFC 9111, section 5.2.1: no-cache and max-age=0 ask for a new answer, which replaces the
    old one; max-age=n for one no older than n seconds; no-store keeps the request away from the cache.
    """
    for name in ACTING:
        if request.get(name) and request.get("tool_choice") != "none":
            return Use(False, False, reason=f"{name} may act")
    for name in ("n", "best_of"):
        if request.get(name) not in (None, 1):
            return Use(False, False, reason=f"{name}={request[name]}")
    if not sampled and request.get("temperature") != 0 and request.get("seed") is None:
        return Use(False, False, reason="sampled without a seed")
    return _asked(headers or {})


def _asked(headers: Mapping[str, str]) -> Use:
    """What the client's headers leave."""
    given: dict[str, str] = {}
    for name, value in headers.items():
        before = given.get(name.lower())
        given[name.lower()] = value if before is None else f"{before},{value}"
    asked = given.get("cache-control", given.get("pragma", ""))  # Pragma counts where there is no Cache-Control
    directives = dict(_directive(part) for part in asked.lower().split(",") if part.strip())
    if "no-store" in directives:
        return Use(False, False, reason="no-store")
    if "no-cache" in directives:
        return Use(False, True, reason="no-cache")
    if "max-age" not in directives:
        return Use(True, True)
    age = directives["max-age"]
    # What is not a number of seconds cannot be met: a new answer is always right.
    seconds = float(age) if age.isdecimal() else 0.0
    return Use(seconds > 0, True, seconds, "" if seconds > 0 else "max-age=0")


def _directive(part: str) -> tuple[str, str]:
    name, _, value = part.partition("=")
    return name.strip(), value.strip().strip('"')
