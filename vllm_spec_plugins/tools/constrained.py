# SPDX-License-Identifier: Apache-2.0
"""Are constrained answers right? Requests with JSON schemas through real servers: valid, and plain decoding's."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jsonschema

from vllm_spec_plugins.tools.identity import first_difference
from vllm_spec_plugins.tools.load import GREEDY, SAMPLED, Batch, Reply, send
from vllm_spec_plugins.tools.server import Server, only
from vllm_spec_plugins.tools.speed import NONE, Configuration

# Without limits on whitespace a model that knows no JSON may go on with that for ever.
ARGUMENTS = (
    "--structured-outputs-config",
    json.dumps({"backend": "xgrammar", "disable_any_whitespace": True}),
)


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _array(items: dict[str, Any], least: int, most: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


_NAME: dict[str, Any] = {"type": "string", "maxLength": 12}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": 9999}

# Every length is bounded: whatever the model, an answer ends.
SCHEMAS: dict[str, dict[str, Any]] = {
    "flat": _object(name=_NAME, size=_COUNT, ready={"type": "boolean"}),
    "enums": _object(
        kind={"enum": ["function", "method", "class", "module"]},
        access={"enum": ["public", "private", "protected"]},
        tags=_array({"enum": ["fast", "safe", "pure", "async"]}, 1, 5),
    ),
    "numbers": _object(
        shape=_array(_COUNT, 1, 4), offset={"type": "integer", "minimum": -128, "maximum": 127}, last={"const": 0}
    ),
    "nested": _object(
        call=_object(name=_NAME, arguments=_array(_object(name=_NAME, kind={"enum": ["int", "str", "list"]}), 0, 3)),
        line=_COUNT,
    ),
    "choice": {"anyOf": [_object(error=_NAME), _object(result=_array(_NAME, 1, 3))]},
}


def schema_of(index: int) -> dict[str, Any]:
    """The schema of request number `index`: they take turns."""
    return list(SCHEMAS.values())[index % len(SCHEMAS)]


@dataclass(frozen=True)
class Outcome:
    """One configuration's answers.

    Attributes:
        invalid: (request's index, its text) of every answer that its schema does not allow.
        differing: (request's index, first differing token's index) of every answer that is not the reference's.
    """

    configuration: str
    sampling: str
    requests: int
    tokens: int
    tokens_per_step: float
    invalid: tuple[tuple[int, str], ...]
    differing: tuple[tuple[int, int], ...]

    @property
    def right(self) -> bool:
        return not self.invalid and not self.differing

    def as_dict(self) -> dict[str, Any]:
        return {
            **vars(self),
            "valid": self.requests - len(self.invalid),
            "identical": self.requests - len(self.differing),
        }


def is_valid(text: str, schema: dict[str, Any]) -> bool:
    """Whether `text` is JSON that `schema` allows."""
    try:
        jsonschema.validate(json.loads(text), schema)
    except (json.JSONDecodeError, jsonschema.ValidationError):
        return False
    return True


def outcome(name: str, sampling: str, mine: Batch, reference: Sequence[Reply]) -> Outcome:
    pairs = list(enumerate(zip(mine.replies, reference, strict=True)))
    return Outcome(
        configuration=name,
        sampling=sampling,
        requests=len(mine.replies),
        tokens=mine.counters.generated,
        tokens_per_step=mine.counters.tokens_per_step,
        invalid=tuple((i, a.text) for i, (a, _) in pairs if not is_valid(a.text, schema_of(i))),
        differing=tuple((i, first_difference(a.token_ids, b.token_ids)) for i, (a, b) in pairs if a != b),
    )


def check(
    configurations: Sequence[Configuration],
    servers: Sequence[Server],
    prompts: Sequence[str],
    *,
    max_tokens: int,
    concurrency: int,
    say: Callable[[str], None],
) -> list[Outcome]:
    """Every configuration against ``--plugin none``, which must be among them: greedy, and sampled with seeds."""
    asked = [{"structured_outputs": {"json": schema_of(index)}} for index in range(len(prompts))]
    found = []
    for sampling in (GREEDY, SAMPLED):
        batches: dict[str, Batch] = {}
        for configuration, server in zip(configurations, servers, strict=True):
            say(f"{sampling.name}: {configuration.name}")
            with only(server, servers):
                batches[configuration.name] = send(server, prompts, sampling, max_tokens, concurrency, asked)
        reference = batches[NONE].replies
        found += [outcome(name, sampling.name, batch, reference) for name, batch in batches.items()]
    return found
