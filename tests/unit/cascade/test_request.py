# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest

from vllm_spec_plugins.cascade.request import Reply, ReplyError, Request, RequestError


def chat(**body: Any) -> Request:
    return Request("r", "chat", {"model": "cascade", "messages": [{"role": "user", "content": "hi"}], **body}, "t", 0.5)


def completion(**body: Any) -> Request:
    return Request("r", "completions", {"model": "cascade", "prompt": "hi", **body}, "t", 0.5)


def test_what_an_upstream_is_asked_lacks_what_is_the_routers_business() -> None:
    request = chat(stream=True, stream_options={"include_usage": True}, request_id="mine", temperature=0.3)
    assert request.asking() == {"messages": request.body["messages"], "temperature": 0.3}
    assert chat(logprobs=False).with_logprobs()["logprobs"] is True
    assert completion().with_logprobs()["logprobs"] == 0
    assert completion(logprobs=3).with_logprobs()["logprobs"] == 3


def test_a_style_stands_behind_the_last_user_message_and_the_request_stays_as_it_is() -> None:
    messages = [
        {"role": "user", "content": "one"},
        {"role": "user", "content": [{"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "three"},
    ]
    request = chat(messages=messages)
    styled = request.in_style("Think.")["messages"]
    assert styled[1]["content"] == [{"type": "text", "text": "two"}, {"type": "text", "text": "Think."}]
    assert messages[1]["content"] == [{"type": "text", "text": "two"}]
    assert styled[0] == messages[0]
    assert request.question() == "one\ntwo\nthree"
    assert chat().in_style("Think.")["messages"][0]["content"] == "hi\n\nThink."
    assert completion().in_style("Think.")["prompt"] == "Think.\n\nhi"
    assert completion().in_style("")["prompt"] == "hi"


@pytest.mark.parametrize(
    ("request_", "act"),
    [
        (completion(prompt=[1, 2]), Request.question),
        (completion(echo=True), Request.with_logprobs),
        (chat(messages=[{"role": "system", "content": "x"}]), lambda request: request.in_style("Think.")),
    ],
)
def test_what_a_policy_cannot_read_is_refused_with_a_sentence(request_: Request, act: Any) -> None:
    with pytest.raises(RequestError, match="this cascade's policy"):
        act(request_)


def payload(**choice: Any) -> dict[str, Any]:
    whole = {"index": 0, "text": "a b", "finish_reason": "stop", **choice}
    return {"choices": [whole], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}


def test_a_whole_reply_is_read() -> None:
    reply = Reply.parse("completions", payload(logprobs={"token_logprobs": [None, -0.5, -1]}))
    assert (reply.texts, reply.judged_logprobs(), reply.input_tokens, reply.output_tokens) == (
        ("a b",),
        [(-0.5, -1.0)],
        3,
        2,
    )
    message = {"content": None, "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": "{}"}}]}
    spoken = Reply.parse("chat", payload(message=message, logprobs={"content": [{"logprob": -2.0}]}))
    assert spoken.texts == ('[{"arguments": "{}", "name": "f"}]',)
    assert spoken.judged_logprobs() == [(-2.0,)]


@pytest.mark.parametrize("reason", [None, "abort", "error"])
def test_an_answer_without_an_end_is_no_answer(reason: str | None) -> None:
    with pytest.raises(ReplyError, match="no end"):
        Reply.parse("completions", payload(finish_reason=reason))


@pytest.mark.parametrize("broken", [None, {}, {"choices": []}, {"choices": [3], "usage": {}}, [], "text"])
def test_what_is_no_reply_is_told_from_one(broken: Any) -> None:
    with pytest.raises(ReplyError):
        Reply.parse("chat", broken)


def test_an_answer_without_log_probabilities_cannot_be_judged_by_them() -> None:
    with pytest.raises(ReplyError, match="log-probabilities"):
        Reply.parse("completions", payload()).judged_logprobs()
