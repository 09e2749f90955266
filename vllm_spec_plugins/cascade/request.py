# SPDX-License-Identifier: Apache-2.0
"""OpenAI requests and replies, as far as a cascade looks into them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["chat", "completions"]
Body = dict[str, Any]

# Reasons of an end that is none: the engine gave up, or was told to.
UNFINISHED = (None, "abort", "error")


class RequestError(ValueError):
    """A request that cannot be served as it is; the message is the sentence that the client reads."""


class ReplyError(ValueError):
    """A reply that is incomplete, or that a policy cannot judge."""


@dataclass(frozen=True)
class Request:
    """One request to the cascade.

    Attributes:
        id: names it in the ledger; attempts are id-0, id-1, ...
        body: what the client sent; never changed.
        threshold: the least score of an answer that is kept.
    """

    id: str
    kind: Kind
    body: Mapping[str, Any]
    tenant: str
    threshold: float

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.kind == "chat" else "/v1/completions"

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def wants_usage(self) -> bool:
        """The stream is to end with a chunk of usage."""
        return bool((self.body.get("stream_options") or {}).get("include_usage"))

    @property
    def max_tokens(self) -> int | None:
        """Most output tokens of one choice, if the request says so."""
        return self.body.get("max_completion_tokens") or self.body.get("max_tokens")

    def question(self) -> str:
        """All that the models are asked, as text. Raises RequestError when it is not text."""
        if self.kind == "completions":
            if not isinstance(prompt := self.body.get("prompt"), str):
                raise RequestError(
                    "prompt is not one text; this cascade's policy reads the prompt, write it as one string"
                )
            return prompt
        return "\n".join(text for message in self.body["messages"] for text in _texts(message.get("content")))

    def asking(self, **changes: Any) -> Body:
        """A body of our own: what the client asked for, with `changes`, and nothing that is the router's business."""
        ours = ("model", "stream", "stream_options", "request_id")
        return {**{key: value for key, value in self.body.items() if key not in ours}, **changes}

    def with_logprobs(self, **changes: Any) -> Body:
        """`asking` for the log-probability of every generated token as well."""
        given = self.body.get("logprobs")
        if self.kind == "completions":
            if self.body.get("echo"):
                raise RequestError(
                    "echo=true mixes the prompt into the answer that this cascade's policy judges; leave it out"
                )
            return self.asking(logprobs=0 if given is None else given, **changes)
        return self.asking(logprobs=True, **changes)

    def in_style(self, style: str, **changes: Any) -> Body:
        """`asking` with the instruction `style` behind the last user message, or in front of a plain prompt."""
        if not style:
            return self.asking(**changes)
        if self.kind == "completions":
            return self.asking(prompt=f"{style}\n\n{self.question()}", **changes)
        messages = [dict(message) for message in self.body["messages"]]
        users = [message for message in messages if message.get("role") == "user"]
        if not users:
            raise RequestError(
                "messages hold no user message; this cascade's policy adds an instruction to the last one"
            )
        content = users[-1].get("content")
        if isinstance(content, list):
            users[-1]["content"] = [*content, {"type": "text", "text": style}]
        else:
            users[-1]["content"] = f"{content}\n\n{style}"
        return self.asking(messages=messages, **changes)

    def plain(self, text: str, **changes: Any) -> Body:
        """A question of our own, by the same route."""
        what = {"messages": [{"role": "user", "content": text}]} if self.kind == "chat" else {"prompt": text}
        return {**what, **changes}


def _texts(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    parts = content if isinstance(content, list) else []
    return [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]


@dataclass(frozen=True)
class Reply:
    """One whole reply of an upstream.

    Attributes:
        payload: its JSON.
        texts: of each choice; tool calls as JSON behind the text.
        logprobs: of each choice's generated tokens; None where the reply has none.
        input_tokens, output_tokens: what is paid for.
    """

    kind: Kind
    payload: Mapping[str, Any]
    texts: tuple[str, ...]
    logprobs: tuple[tuple[float, ...] | None, ...]
    input_tokens: int
    output_tokens: int

    @classmethod
    def parse(cls, kind: Kind, payload: Any) -> Reply:
        """Raises ReplyError on anything but a complete answer."""
        try:
            choices, usage = payload["choices"], payload["usage"]
            if not choices or any(choice.get("finish_reason") in UNFINISHED for choice in choices):
                raise ReplyError("a choice of the reply has no end")
            counts = int(usage["prompt_tokens"]), int(usage.get("completion_tokens") or 0)
            texts = tuple(_chat_text(c["message"]) if kind == "chat" else str(c["text"]) for c in choices)
            logprobs = tuple(_logprobs(kind, choice.get("logprobs")) for choice in choices)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ReplyError(f"the reply is not one of the OpenAI interface ({error!r})") from error
        return cls(kind, payload, texts, logprobs, *counts)

    def judged_logprobs(self) -> list[tuple[float, ...]]:
        """`logprobs`, all of them. Raises ReplyError when some are missing."""
        if None in self.logprobs:
            raise ReplyError("the reply lacks the tokens' log-probabilities, which the cascade's policy judges by")
        return [each for each in self.logprobs if each is not None]

    def first_candidates(self) -> dict[str, float]:
        """Candidates for the first token of the first choice -> log-probability."""
        held = self.payload["choices"][0].get("logprobs") or {}
        if self.kind == "completions":
            return dict((held.get("top_logprobs") or [{}])[0])
        content = held.get("content") or [{}]
        return {each["token"]: each["logprob"] for each in content[0].get("top_logprobs", ())}

    def without_logprobs(self, choice: Mapping[str, Any]) -> Body:
        return {**choice, "logprobs": None}


def _chat_text(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls")
    functions = [call.get("function") for call in calls] if calls else None
    return (message.get("content") or "") + (json.dumps(functions, sort_keys=True) if functions else "")


def _logprobs(kind: Kind, held: Any) -> tuple[float, ...] | None:
    if held is None:
        return None
    values = [each["logprob"] for each in held["content"] or ()] if kind == "chat" else held["token_logprobs"]
    return tuple(float(value) for value in values if value is not None)
