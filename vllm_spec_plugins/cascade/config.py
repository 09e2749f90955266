# SPDX-License-Identifier: Apache-2.0
"""The file of ``vllm-spec router --config``: read and checked once, every error one sentence."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator


class CascadeConfigError(ValueError):
    """A configuration that cannot be used; the message is the sentence a user reads."""


class Table(BaseModel):
    """A mapping of the file: no other keys, no conversion between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            for key in given:
                if key not in cls.model_fields:
                    raise ValueError(f"there is no key {key!r}; valid are {', '.join(cls.model_fields)}")
        return given


Count = Annotated[int, Field(ge=1, le=100_000)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Cost = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Share = Annotated[float, Field(ge=0, le=1)]


def _http(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("it is not a URL; valid are http://host:port and https://host:port")
    if parts.username or parts.password or parts.query:
        raise ValueError("it holds credentials or a query; name the variable that holds the key in api_key_env")
    return url.rstrip("/")


class UpstreamSettings(Table):
    """One vLLM server. `api_key_env` names the environment variable with its key; no key is ever in this file."""

    url: str
    name: str | None = None
    api_key_env: Variable | None = None
    max_concurrency: Count = 64
    max_queue: Annotated[int, Field(ge=0, le=100_000)] = 256

    @field_validator("url")
    @classmethod
    def _url(cls, url: str) -> str:
        return _http(url).removesuffix("/v1")

    @property
    def title(self) -> str:
        return self.name or urlsplit(self.url).netloc


class StageSettings(Table):
    """One model and the servers that serve it. Prices are per million tokens, in any one currency."""

    name: str
    model: str
    upstreams: Annotated[list[UpstreamSettings], Field(min_length=1)]
    input_price: Cost
    output_price: Cost
    timeout: Seconds = 300.0
    hedge_after: Seconds | None = None


class ConfidenceSettings(Table):
    kind: Literal["confidence"]
    statistic: Literal["mean", "min", "quantile"] = "mean"
    quantile: Share = 0.1


class VoteSettings(Table):
    kind: Literal["vote"]
    samples: Annotated[int, Field(ge=2, le=64)] = 4
    temperature: Annotated[float, Field(gt=0, le=2)] = 0.8
    styles: Annotated[list[str], Field(min_length=2, max_length=2)] = [
        "",
        "Think step by step, and write the answer alone on the last line.",
    ]
    answer_pattern: str | None = None


class ScorerSettings(Table):
    kind: Literal["scorer"]
    model: str | None = None
    url: str | None = None
    api_key_env: Variable | None = None
    timeout: Seconds = 10.0

    @model_validator(mode="after")
    def _one(self) -> ScorerSettings:
        if (self.model is None) == (self.url is None):
            raise ValueError("a scorer has one of model (a file of `vllm-spec tune router`) and url (an HTTP scorer)")
        if self.api_key_env is not None and self.url is None:
            raise ValueError("api_key_env is the key for a scorer's url, and there is no url")
        return self

    @field_validator("url")
    @classmethod
    def _url(cls, url: str | None) -> str | None:
        return None if url is None else _http(url)


class VerificationSettings(Table):
    kind: Literal["self_verification"]
    template: str = (
        "Question:\n{question}\n\nProposed answer:\n{answer}\n\nIs the proposed answer correct? Reply with yes or no: "
    )
    max_characters: Count = 16_000

    @field_validator("template")
    @classmethod
    def _fields(cls, template: str) -> str:
        if "{question}" not in template or "{answer}" not in template:
            raise ValueError("it lacks a placeholder; valid is a text with {question} and {answer}")
        return template


class ClassifierSettings(Table):
    kind: Literal["classifier"]
    model: str


PolicySettings = Annotated[
    ConfidenceSettings | VoteSettings | ScorerSettings | VerificationSettings | ClassifierSettings,
    Field(discriminator="kind"),
]


class RetrySettings(Table):
    """Calls of one stage for one answer, and the wait before each further one: `backoff`, doubling, up to `most`."""

    attempts: Annotated[int, Field(ge=1, le=10)] = 3
    backoff: Annotated[float, Field(ge=0, le=60)] = 0.1
    most: Seconds = 2.0


class HealthSettings(Table):
    """GET /health every `interval`; `failures` failed calls in a row shut an upstream out for `cooldown`."""

    interval: Seconds = 5.0
    timeout: Seconds = 2.0
    failures: Count = 3
    cooldown: Seconds = 5.0
    connect_timeout: Seconds = 2.0
    queue_timeout: Seconds = 30.0


class BudgetSettings(Table):
    """Costs, in the currency of the prices. `assumed_tokens`: what an answer without max_tokens is taken to need."""

    per_request: Cost | None = None
    per_tenant: Cost | None = None
    window: Seconds = 86_400.0
    assumed_tokens: Count = 512


class CascadeSettings(Table):
    """The whole file; stages stand cheapest first."""

    stages: Annotated[list[StageSettings], Field(min_length=2)]
    policy: PolicySettings
    threshold: Share = 0.8
    client_keys_env: Variable | None = None
    retry: RetrySettings = RetrySettings()
    health: HealthSettings = HealthSettings()
    budget: BudgetSettings = BudgetSettings()
    ledger: str | None = None
    cache: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _distinct(self) -> CascadeSettings:
        names = [stage.name for stage in self.stages]
        titles = [upstream.title for stage in self.stages for upstream in stage.upstreams]
        for what, given in (("stage", names), ("upstream", titles)):
            twice = {name for name in given if given.count(name) > 1}
            if twice:
                raise ValueError(f"{what} names are distinct, and {min(twice)!r} is given twice; name each")
        prices = [(stage.input_price, stage.output_price) for stage in self.stages]
        for cheap, dear, one, other in zip(prices, prices[1:], names, names[1:], strict=False):
            if cheap[0] > dear[0] and cheap[1] > dear[1]:
                raise ValueError(f"stages stand cheapest first, and {one!r} costs more than {other!r} behind it")
        return self


def parse(given: Any, source: str = "cascade") -> CascadeSettings:
    """Settings from plain data. Raises CascadeConfigError, naming `source`, the key, the value and what is valid."""
    if not isinstance(given, Mapping):
        raise CascadeConfigError(
            f"{source}: is not a mapping; valid keys are {', '.join(CascadeSettings.model_fields)}"
        )
    try:
        return CascadeSettings.model_validate(given)
    except ValidationError as error:
        # Not chained: the original shows values as they were given.
        raise CascadeConfigError(f"{source}: {_sentence(error)}") from None


def load(path: Path) -> CascadeSettings:
    """Settings from a YAML file; as `parse`, also where the file cannot be read."""
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CascadeConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CascadeConfigError(f"{path}: is not YAML ({' '.join(str(error).split())})") from error
    return parse(given, str(path))


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    # A union's member stands in the location as the value of its kind: no key of the file.
    where = [str(part) for part in first["loc"] if not (part in _KINDS and "policy" in first["loc"])]
    key = ".".join(where)
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if first["type"] == "missing":
        return f"{key} is missing"
    if first["type"] == "union_tag_invalid":
        return f"{key}.kind={first['input'].get('kind')!r} is no policy; valid are {', '.join(_KINDS)}"
    if first["type"] == "union_tag_not_found":
        return f"{key}.kind is missing; valid are {', '.join(_KINDS)}"
    if isinstance(first["input"], Mapping | BaseModel):
        return f"{key}: {message}" if key else message
    if key.endswith("_env"):  # somebody wrote a key here, it seems
        return f"{key}: its value is not the name of an environment variable; valid are letters, digits and _"
    shown = repr(first["input"])
    if "://" in shown:  # without credentials
        shown = re.sub(r"(?<=://)[^/]*@", "***@", shown).partition("?")[0]
    return f"{key}={shown}: {message}"


_KINDS = ("confidence", "vote", "scorer", "self_verification", "classifier")


def secret(variable: str | None, key: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """The API key in `variable`, None where none is named. Raises CascadeConfigError where it is named and not set."""
    if variable is None:
        return None
    value = environment.get(variable, "").strip()
    if not value:
        raise CascadeConfigError(f"{key}={variable}: the environment has no such variable; set it to the key")
    if not value.isascii() or not value.isprintable():
        raise CascadeConfigError(f"{key}={variable}: its value is no key; valid are printable ASCII characters")
    return value


def client_keys(variable: str | None, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Key -> tenant, from "tenant=key,tenant=key" in `variable`; empty where none is named."""
    text = secret(variable, "client_keys_env", environment)
    found: dict[str, str] = {}
    for part in text.split(",") if text else ():
        tenant, equals, key = (piece.strip() for piece in part.partition("="))
        if not (tenant and equals and key) or key in found:
            raise CascadeConfigError(
                f"client_keys_env={variable}: its value is not tenant=key,tenant=key with a key of each one's own"
            )
        found[key] = tenant
    return found
