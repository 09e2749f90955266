# SPDX-License-Identifier: Apache-2.0
"""What a user may ask for: the ``--plugin name:key=value`` grammar, and what every plugin's settings class has.

The classes themselves stand in settings.py and depth_settings.py. Everything is checked once, at start. Every error is one
sentence that names the flag, the value and what would be valid.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from types import UnionType
from typing import Any, ClassVar, Self, get_args, get_type_hints

FLAG = "--plugin"
ENVIRONMENT = "VLLM_SPEC_PLUGIN"


class SettingError(ValueError):
    """A setting that cannot be used; the message is the sentence a user reads."""


def setting(default: Any, doc: str, *, least: float | None = None, most: float | None = None) -> Any:
    """A field of a settings class: its default, one line for the documentation, its range (inclusive)."""
    return field(default=default, metadata={"doc": doc, "least": least, "most": most})


@dataclass(frozen=True)
class Settings:
    """Settings of one plugin. A subclass adds fields made with `setting` and may check combinations in `check`.

    A field of type `X | None` is None unless it was given.
    """

    name: ClassVar[str]

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Self:
        """Settings from keys and values, the values typed (JSON, Python) or text (the flag).

        Raises SettingError on an unknown key, a wrong type, a value out of range or a wrong combination.
        """
        known = {f.name: f for f in fields(cls)}
        types = get_type_hints(cls)
        values = {}
        for key, value in given.items():
            if key not in known:
                raise SettingError(
                    f"{FLAG} {cls.name}: there is no setting {key!r}{_hint(key, known)}; "
                    f"valid are {', '.join(known) or 'none'}"
                )
            values[key] = _typed(cls.name, key, value, types[key])
            _check_range(cls.name, key, values[key], known[key].metadata)
        settings = cls(**values)
        settings.check()
        return settings

    def check(self) -> None:
        """Raise SettingError when the values do not go together."""

    def as_dict(self) -> dict[str, Any]:
        """All values by key, with ``name``, but for None: what `parse_plugins` takes back."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"name": self.name, **{key: value for key, value in values.items() if value is not None}}

    def as_given(self) -> Any:
        """What `registry.resolve` takes back: plain data that JSON can carry."""
        return self.as_dict()

    @property
    def title(self) -> str:
        """What stands behind the flag in a sentence about all of it."""
        return self.name


Given = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]


def parse_plugins(value: Given, known: Mapping[str, type[Settings]]) -> list[Settings]:
    """Plugins as the flag, JSON, the environment or Python gives them -> the validated settings of each.

    ``lookahead`` | ``lookahead:window=7,ngram=5`` | ``{"name": "lookahead", "window": 7}`` (text or mapping); several as a
    list of these (text or sequence), or with `` & `` between them. Raises SettingError.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _read_json(value)
    elif isinstance(value, str) and not value.lstrip().startswith("{"):
        parts = value.split(" & ")
        value = parts if len(parts) > 1 else value
    if isinstance(value, (str, Mapping)):
        return [_parse_one(value, known)]
    if not isinstance(value, Sequence):
        raise SettingError(f'{FLAG} {value}: is not a list of plugins; write ["lookahead", {{"name": "medusa", ...}}]')
    return [settings for item in value for settings in parse_plugins(item, known)]


def _parse_one(value: str | Mapping[str, Any], known: Mapping[str, type[Settings]]) -> Settings:
    name, given = _split(value)
    if name not in known:
        raise SettingError(
            f"{FLAG} {name}: there is no plugin {name!r}{_hint(name, known)}; valid are {', '.join(known)}"
        )
    return known[name].parse(given)


def _split(value: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(value, str) and not value.lstrip().startswith("{"):
        name, colon, rest = value.strip().partition(":")
        if colon and not rest:
            raise SettingError(f"{FLAG} {value}: nothing follows the colon; write {name}:key=value,key=value")
        given: dict[str, Any] = {}
        for item in rest.split(",") if rest else ():
            key, equals, text = (part.strip() for part in item.partition("="))
            if not equals or not key:
                raise SettingError(f"{FLAG} {value}: {item!r} is not key=value; write {name}:key=value,key=value")
            if key in given:
                raise SettingError(f"{FLAG} {value}: {key!r} is given twice; give it once")
            given[key] = text
        return name, given

    if isinstance(value, str):
        value = _read_json(value)
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise SettingError(f'{FLAG} {value}: has no "name"; write {{"name": "lookahead", "window": 7}}')
    return value["name"], {key: item for key, item in value.items() if key != "name"}


def _read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise SettingError(
            f"{FLAG} {text}: is not valid JSON ({error.msg} at character {error.pos}); "
            f'write {{"name": "lookahead", "window": 7}}'
        ) from error


def _typed(plugin: str, key: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`: text is read, anything else must already be of that type."""
    if isinstance(kind, UnionType):  # None is what was not given
        kind = get_args(kind)[0]
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if isinstance(value, str) and kind is bool and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, str) and kind is int and value.removeprefix("-").isdecimal():
        return int(value)
    if kind is float and type(value) in (str, int):
        try:
            return float(value)
        except ValueError as error:
            raise SettingError(f"{FLAG} {plugin}: {key}={value} is not {words[kind]}") from error
    if type(value) is not kind:
        raise SettingError(f"{FLAG} {plugin}: {key}={value} is not {words[kind]}")
    return value


def _check_range(plugin: str, key: str, value: Any, limits: Mapping[str, Any]) -> None:
    least, most = limits["least"], limits["most"]
    if (least is not None and value < least) or (most is not None and value > most):
        raise SettingError(f"{FLAG} {plugin}: {key}={value} is out of range; valid are {least} to {most}")


def _hint(word: str, known: Mapping[str, Any]) -> str:
    close = get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
