# SPDX-License-Identifier: Apache-2.0
"""What requests may ask of a server that speculates: everything that they may ask of one that does not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
import regex

from vllm_spec_plugins.tools.load import GREEDY, Reply, Sampling, send
from vllm_spec_plugins.tools.server import MODEL, Server

Wanted = Callable[..., tuple[Reply, ...]]

SEEDED = Sampling("T=0.8, seeds", 0.8, seed=1)

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["alpha", "beta"]},
        "exact": {"type": "boolean"},
        "sizes": {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 2, "maxItems": 2},
    },
    "required": ["name", "exact", "sizes"],
    "additionalProperties": False,
}
# The same language, for a partial match: a request may run out of tokens on the way.
CONFORMING = regex.compile(
    r'\s*\{\s*"name"\s*:\s*"(alpha|beta)"\s*,\s*"exact"\s*:\s*(true|false)\s*,'
    r'\s*"sizes"\s*:\s*\[\s*[123]\s*,\s*[123]\s*\]\s*\}\s*'
)


def stream(server: Server, prompt: str, **request: Any) -> tuple[list[str], list[int], str | None]:
    """The pieces of one streamed completion, the tokens per piece and the reason of its end."""
    pieces, counts, reason = [], [], None
    with server.client() as client:
        chunks = client.completions.create(
            model=MODEL, prompt=prompt, stream=True, extra_body={"return_token_ids": True}, **request
        )
        for chunk in chunks:
            for choice in chunk.choices:
                pieces.append(choice.text)
                counts.append(len((choice.model_extra or {}).get("token_ids") or ()))
                reason = choice.finish_reason or reason
    return pieces, counts, reason


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_stream_carries_the_same_text_several_tokens_at_a_time(
    none: Server, lookahead: Server, prompts: list[str], wanted: Wanted, sampling: Sampling
) -> None:
    largest = 0
    for index, reply in enumerate(wanted(none, 4, sampling, 64)):
        pieces, counts, reason = stream(lookahead, prompts[index], max_tokens=64, **sampling.parameters(index))
        assert ("".join(pieces), sum(counts), reason) == (reply.text, len(reply.token_ids), reply.finish_reason)
        largest = max(largest, *counts)
    assert largest > 1


def test_a_chat_streams_the_same_text(none: Server, lookahead: Server) -> None:
    texts = []
    for server in (none, lookahead):
        with server.client() as client:
            messages: Any = [{"role": "user", "content": "for i in range(10): print(i)"}]
            chunks = client.chat.completions.create(
                model=MODEL, messages=messages, max_tokens=48, temperature=0.0, stream=True
            )
            texts.append("".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices))
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_logprobs_are_those_of_plain_decoding(
    none: Server, lookahead: Server, prompts: list[str], sampling: Sampling
) -> None:
    for index, prompt in enumerate(prompts[:4]):
        found = []
        for server in (none, lookahead):
            with server.client() as client:
                completion = client.completions.create(
                    model=MODEL, prompt=prompt, max_tokens=48, logprobs=4, **sampling.parameters(index)
                )
            logprobs = completion.choices[0].logprobs
            assert logprobs is not None
            found.append(logprobs)
        plainly, mine = found
        assert mine.tokens == plainly.tokens
        assert mine.token_logprobs == pytest.approx(plainly.token_logprobs, abs=1e-4)
        assert mine.top_logprobs is not None
        assert plainly.top_logprobs is not None
        for a, b in zip(mine.top_logprobs, plainly.top_logprobs, strict=True):
            # Keys differ only where two candidates are equally likely within rounding.
            assert sorted(a.values()) == pytest.approx(sorted(b.values()), abs=1e-4)


def test_logprobs_of_the_prompt_are_those_of_plain_decoding(
    none: Server, lookahead: Server, prompts: list[str]
) -> None:
    found = []
    for server in (none, lookahead):
        with server.client() as client:
            request: dict[str, Any] = {"max_tokens": 16, "temperature": 0.0, "echo": True, "logprobs": 1}
            choice = client.completions.create(model=MODEL, prompt=prompts[1], **request).choices[0]
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs is not None
        found.append((choice.text, choice.logprobs.token_logprobs))
    assert found[0][0] == found[1][0]
    assert found[0][1][0] is found[1][1][0] is None
    assert found[1][1][1:] == pytest.approx(found[0][1][1:], abs=1e-4)


PARAMETERS: dict[str, dict[str, Any]] = {
    "logit_bias": {"logit_bias": {"265": 4.0, "10": -100.0}},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "bad_words": {"bad_words": ["self", "the", "return"]},
    "min_tokens": {"min_tokens": 20, "stop_token_ids": [265, 10, 199]},
    "allowed_token_ids": {"allowed_token_ids": list(range(200, 1200))},
    # These leave a greedy request's tokens alone.
    "min_p": {"min_p": 0.1},
    "min_p+logit_bias+top_k": {"min_p": 0.05, "logit_bias": {"265": 2.0}, "top_k": 50},
    "n": {"n": 3},
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_sampling_parameters_are_accepted_and_mean_the_same(
    none: Server, speculating: Server, prompts: list[str], wanted: Wanted, name: str
) -> None:
    mine = send(speculating, prompts[:6], SEEDED, max_tokens=40, concurrency=4, extra=PARAMETERS[name])
    assert mine.replies == wanted(none, 6, SEEDED, 40, PARAMETERS[name])
    assert mine.counters.draft_tokens > 0
    # The parameter did something.
    assert mine.replies != wanted(none, 6, SEEDED, 40)


@pytest.mark.parametrize("name", list(PARAMETERS)[:5])
def test_sampling_parameters_mean_the_same_to_greedy_requests(
    none: Server, lookahead: Server, prompts: list[str], wanted: Wanted, name: str
) -> None:
    mine = send(lookahead, prompts[:6], GREEDY, max_tokens=40, concurrency=4, extra=PARAMETERS[name])
    assert mine.replies == wanted(none, 6, GREEDY, 40, PARAMETERS[name])
    assert mine.counters.draft_tokens > 0
    assert mine.replies != wanted(none, 6, GREEDY, 40)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_json_schema_is_kept_and_nothing_fails(
    none: Server, lookahead: Server, prompts: list[str], wanted: Wanted, sampling: Sampling
) -> None:
    schema = {"structured_outputs": {"json": SCHEMA}}
    mine = send(lookahead, prompts[:6], sampling, max_tokens=64, concurrency=4, extra=schema)
    assert mine.replies == wanted(none, 6, sampling, 64, schema)
    for reply in mine.replies:
        assert CONFORMING.fullmatch(reply.text, partial=reply.finish_reason == "length"), reply.text


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_constrained_answer_ends_where_its_grammar_does(
    none: Server, lookahead: Server, prompts: list[str], wanted: Wanted, sampling: Sampling
) -> None:
    """Without whitespace: a model that knows no JSON may go on with that for ever."""
    grammar = {
        "structured_outputs": {"regex": r'\{"name":"(alpha|beta)","exact":(true|false),"sizes":\[[123],[123]\]\}'}
    }
    mine = send(lookahead, prompts[:6], sampling, max_tokens=64, concurrency=4, extra=grammar)
    assert mine.replies == wanted(none, 6, sampling, 64, grammar)
    for reply in mine.replies:
        assert set(json.loads(reply.text)) == {"name", "exact", "sizes"}


def test_a_json_schema_holds_for_its_own_request_only(
    none: Server, speculating: Server, prompts: list[str], wanted: Wanted
) -> None:
    """Constrained and free requests in one batch: each gets what it gets alone."""
    free = wanted(none, 6, SEEDED, 48)
    for index, text in enumerate(_mixed(speculating, prompts[:6])):
        if index % 2:
            assert text == free[index].text
        else:
            assert CONFORMING.fullmatch(text, partial=True), text


def _mixed(server: Server, prompts: list[str]) -> list[str]:
    """All prompts at the same time, every second one constrained."""

    async def run() -> list[str]:
        async with server.async_client() as client:

            async def complete(index: int, prompt: str) -> str:
                constrained = {} if index % 2 else {"structured_outputs": {"json": SCHEMA}}
                completion = await client.completions.create(
                    model=MODEL, prompt=prompt, max_tokens=48, extra_body=constrained, **SEEDED.parameters(index)
                )
                return completion.choices[0].text

            return list(await asyncio.gather(*(complete(i, prompt) for i, prompt in enumerate(prompts))))

    return asyncio.run(run())


def test_a_request_given_up_midway_leaves_the_others_right(
    none: Server, lookahead: Server, prompts: list[str], wanted: Wanted
) -> None:
    with lookahead.client() as client:
        for prompt, reply in zip(prompts, wanted(none, 4, GREEDY, 48), strict=False):
            with client.completions.create(
                model=MODEL, prompt=prompt, max_tokens=200, temperature=0.0, stream=True
            ) as abandoned:
                next(iter(abandoned))
                text = client.completions.create(model=MODEL, prompt=prompt, max_tokens=48, temperature=0.0)
            assert text.choices[0].text == reply.text


def test_contrastive_search_is_asked_for_and_refused_over_http(
    none: Server, lookahead: Server, prompts: list[str]
) -> None:
    def ask(server: Server, contrastive: Any, **given: Any) -> str:
        request = {"temperature": 0.0, "max_tokens": 24, **given}
        extra = {} if contrastive is None else {"vllm_xargs": {"contrastive": contrastive}}
        with server.client() as client:
            return (
                client.completions.create(model=MODEL, prompt=prompts[0], extra_body=extra, **request).choices[0].text
            )

    greedy = ask(none, None)
    assert ask(lookahead, '{"alpha": 0}') == greedy
    assert ask(lookahead, '{"alpha": 0.6, "k": 5}') != greedy
    with pytest.raises(openai.BadRequestError, match=r"contrastive: the search draws nothing, so temperature=0\.5"):
        ask(lookahead, "{}", temperature=0.5)
    with pytest.raises(openai.BadRequestError, match=r"contrastive: 0\.6 is not an object"):
        ask(lookahead, 0.6)
    with pytest.raises(openai.BadRequestError, match="contrastive: --plugin none verifies no candidates"):
        ask(none, "{}")
