# SPDX-License-Identifier: Apache-2.0
"""Hooks fit or nothing is replaced."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from vllm_spec_plugins.hook import ABSENT, Hook, HookMismatch, apply, remove, shape

SOURCE = """
FLAG = False
def add(a, b=1): return a + b
class Thing:
    @classmethod
    def make(cls, size): return (cls.__name__, size)
    @property
    def half(self): return 5
    def run(self): return "original"
"""


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    module = ModuleType("hooked.target")
    exec(SOURCE, module.__dict__)
    monkeypatch.setitem(sys.modules, "hooked.target", module)
    monkeypatch.setitem(sys.modules, "hooked", ModuleType("hooked"))
    from vllm_spec_plugins import hook

    before = dict(hook._applied)
    yield module
    hook._applied.clear()
    hook._applied.update(before)


def hook(path: str, signature: str | None, replacement: Callable[[Any], Any]) -> Hook:
    return Hook(f"hooked.target:{path}", "for the test", signature, "never", replacement)


def twice(original: Callable[..., int]) -> Callable[..., int]:
    def add(a: int, b: int = 1) -> int:
        return 2 * original(a, b)

    return add


def test_a_function_is_replaced_and_put_back(target: ModuleType) -> None:
    hooks = [hook("add", "(a, b=1)", twice)]
    apply(hooks)
    assert target.add(1, 2) == 6
    apply(hooks)  # applying again does not wrap again
    assert target.add(1, 2) == 6
    remove(hooks)
    assert target.add(1, 2) == 3


def test_classmethods_and_properties_stay_what_they_are(target: ModuleType) -> None:
    def make(original: Any) -> Any:
        return lambda cls, size: original(cls, size + 1)

    apply([hook("Thing.make", "(cls, size)", make), hook("Thing.half", "(self)", lambda original: lambda self: 7)])
    assert target.Thing.make(1) == ("Thing", 2)
    assert target.Thing().half == 7


def test_a_value_is_checked_by_its_type(target: ModuleType) -> None:
    apply([hook("FLAG", "bool", lambda _: True)])
    assert target.FLAG is True


def test_an_attribute_can_be_added_where_there_is_none(target: ModuleType) -> None:
    added = [hook("extra", ABSENT, lambda original: (original, "new"))]
    apply(added)
    assert target.extra == (None, "new")
    remove(added)
    assert not hasattr(target, "extra")


@pytest.mark.parametrize(
    "wrong",
    [
        hook("add", "(a, b, c)", twice),
        hook("add", ABSENT, twice),
        hook("gone", "(a)", twice),
        hook("Thing.gone.further", "(a)", twice),
        hook("FLAG", "int", lambda _: 1),
    ],
)
def test_one_hook_that_does_not_fit_stops_all_of_them(target: ModuleType, wrong: Hook) -> None:
    with pytest.raises(HookMismatch) as caught:
        apply([hook("Thing.run", "(self)", lambda original: lambda self: "replaced"), wrong])
    assert target.Thing().run() == "original"
    sentence = str(caught.value)
    assert wrong.target in sentence
    assert str(wrong.signature) in sentence
    assert "0.32.0" in sentence
    assert "\n" not in sentence


def test_code_of_another_package_is_not_replaced_silently(target: ModuleType) -> None:
    foreign: dict[str, Any] = {"__name__": "somebody.else"}
    exec("def add(a, b=1): return 0", foreign)
    target.add = foreign["add"]  # type: ignore[attr-defined]
    with pytest.raises(HookMismatch, match=r"a replacement from somebody\.else"):
        apply([hook("add", "(a, b=1)", twice)])


def test_a_hook_that_somebody_replaced_afterwards_is_noticed(target: ModuleType) -> None:
    hooks = [hook("add", "(a, b=1)", twice)]
    apply(hooks)
    target.add = lambda a, b=1: 0  # type: ignore[attr-defined]
    with pytest.raises(HookMismatch, match="the replacement this package installed"):
        apply(hooks)


def test_two_hooks_on_one_target_are_refused(target: ModuleType) -> None:
    apply([hook("add", "(a, b=1)", twice)])
    with pytest.raises(HookMismatch):
        apply([hook("add", "(a, b=1)", lambda original: original)])


def test_the_recorded_shape_has_no_annotations() -> None:
    def function(a: int, *, b: str = "x") -> None: ...

    assert shape(function) == "(a, *, b='x')"
