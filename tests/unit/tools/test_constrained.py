# SPDX-License-Identifier: Apache-2.0
"""Constrained answers: what counts as valid and as the same, and that every answer can end."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jsonschema
import pytest

from vllm_spec_plugins.tools import bench, constrained, load, measurements, speed
from vllm_spec_plugins.tools.load import Batch, Reply
from vllm_spec_plugins.tools.server import Counters

ANSWERS = [
    {"name": "a", "size": 1, "ready": True},
    {"kind": "class", "access": "public", "tags": ["fast"]},
    {"shape": [1, 2], "offset": -3, "last": 0},
    {"call": {"name": "f", "arguments": []}, "line": 9},
    {"error": "none"},
]


class FakeServer:
    def __init__(self, changed: dict[int, str]) -> None:
        self.changed = changed

    def pause(self) -> None: ...

    def resume(self) -> None: ...


def fake_send(server: Any, prompts: Sequence[str], *rest: Any) -> Batch:
    extra = rest[-1]
    assert [each["structured_outputs"]["json"] for each in extra] == [constrained.schema_of(i) for i in range(5)]
    texts = [server.changed.get(i, json.dumps(answer)) for i, answer in enumerate(ANSWERS)]
    replies = tuple(Reply(tuple(text.encode()), text, "stop") for text in texts)
    return Batch(replies, 1.0, Counters(10, 5))


def checked(monkeypatch: pytest.MonkeyPatch, changed: dict[int, str]) -> list[constrained.Outcome]:
    monkeypatch.setattr(constrained, "send", fake_send)
    servers: Any = [FakeServer({}), FakeServer(changed)]
    configurations = [speed.plugin("none"), speed.plugin("lookahead")]
    return constrained.check(configurations, servers, ["p"] * 5, max_tokens=8, concurrency=1, say=lambda _: None)


def test_valid_answers_of_plain_decoding_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    found = checked(monkeypatch, {})
    assert [(o.configuration, o.right, o.tokens_per_step) for o in found] == [
        ("--plugin none", True, 2.0),
        ("--plugin lookahead", True, 2.0),
    ] * 2


@pytest.mark.parametrize(
    ("index", "text", "valid"),
    [
        (0, '{"name": "a", "size": 1, "ready": fals', False),
        (1, '{"kind": "class", "access": "public", "tags": ["slow"]}', False),
        (4, '{"error": "another"}', True),
    ],
)
def test_what_is_invalid_and_what_differs_is_counted_apart(
    monkeypatch: pytest.MonkeyPatch, index: int, text: str, valid: bool
) -> None:
    _, mine, *_ = checked(monkeypatch, {index: text})
    assert mine.invalid == (() if valid else ((index, text),))
    assert [i for i, _ in mine.differing] == [index]
    assert not mine.right
    assert mine.as_dict()["valid"] == 4 + valid
    assert mine.as_dict()["identical"] == 4


@pytest.mark.parametrize("wrong", [True, False])
def test_an_invalid_answer_is_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: bool
) -> None:
    @contextlib.contextmanager
    def running(servers: Any) -> Iterator[None]:
        yield

    def serve(configurations: Any, model: Any, arguments: Sequence[str], *_: Any) -> list[FakeServer]:
        assert "--structured-outputs-config" in arguments
        changed = {2: "{}"} if wrong else {}
        servers = [FakeServer({}), FakeServer(changed)]
        for server in servers:
            server.command, server.log = [], ""  # type: ignore[attr-defined]
        return servers

    monkeypatch.setattr(constrained, "send", fake_send)
    monkeypatch.setattr(measurements, "running", running)
    monkeypatch.setattr(measurements, "serve", serve)
    assert bench.main(["json", "--prompts", "5"]) == int(wrong)
    assert ("4 of 5" in capsys.readouterr().out) == wrong


def unbounded(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Parts of `schema` that allow answers of any length."""
    bounds = {"string": {"maxLength"}, "array": {"maxItems"}, "integer": {"minimum", "maximum"}, "number": {"never"}}
    kind = schema.get("type")
    if kind is None and not {"enum", "const", "anyOf"} & schema.keys():
        yield schema
    if bounds.get(str(kind), set()) - schema.keys() or (kind == "object" and schema["additionalProperties"]):
        yield schema
    for part in [*schema.get("properties", {}).values(), *schema.get("anyOf", []), schema.get("items")]:
        if part is not None:
            yield from unbounded(part)


@pytest.mark.parametrize("name", constrained.SCHEMAS)
def test_every_schema_bounds_its_answers(name: str) -> None:
    schema = constrained.SCHEMAS[name]
    jsonschema.Draft202012Validator.check_schema(schema)
    assert list(unbounded(schema)) == []
    assert list(unbounded({"type": "array", "items": {"type": "string"}})) != []


def test_fields_of_single_requests_must_be_as_many_as_the_prompts() -> None:
    with pytest.raises(ValueError, match="shorter"):
        load.send(None, ["a", "b"], load.GREEDY, 1, 1, [{}])  # type: ignore[arg-type]
