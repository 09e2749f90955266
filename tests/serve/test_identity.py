# SPDX-License-Identifier: Apache-2.0
"""The output of a server that speculates is the output of one that does not, whatever a request asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vllm_spec_plugins.tools.load import GREEDY, Reply, Sampling, send
from vllm_spec_plugins.tools.server import MODEL, Server

Wanted = Callable[..., tuple[Reply, ...]]
SEEDED = Sampling("T=0.8, top-p 0.95, seeds", 0.8, top_p=0.95, seed=77)


@pytest.fixture(scope="session")
def greedy(plain: Server, prompts: list[str]) -> tuple[Reply, ...]:
    """Plain vLLM's greedy completions."""
    return send(plain, prompts, GREEDY, max_tokens=64, concurrency=4).replies


@pytest.fixture(scope="session")
def seeded(none: Server, prompts: list[str]) -> tuple[Reply, ...]:
    """Sampled completions of the same runner without speculation."""
    return send(none, prompts, SEEDED, max_tokens=64, concurrency=4).replies


def test_greedy_output_of_the_other_runner_is_the_same(
    none: Server, prompts: list[str], greedy: tuple[Reply, ...]
) -> None:
    batch = send(none, prompts, GREEDY, max_tokens=64, concurrency=4)
    assert batch.replies == greedy
    assert batch.counters.draft_tokens == 0
    assert batch.counters.steps == batch.counters.generated


def test_greedy_output_equals_plain_vllms_in_fewer_steps(
    speculating: Server, prompts: list[str], greedy: tuple[Reply, ...]
) -> None:
    batch = send(speculating, prompts, GREEDY, max_tokens=64, concurrency=4)
    assert batch.replies == greedy
    assert batch.counters.accepted > 0
    assert batch.counters.tokens_per_step > 1.2


def test_seeded_output_equals_that_of_the_same_runner_without_speculation(
    speculating: Server, prompts: list[str], seeded: tuple[Reply, ...]
) -> None:
    batch = send(speculating, prompts, SEEDED, max_tokens=64, concurrency=4)
    assert batch.replies == seeded
    assert batch.counters.accepted > 0


def test_another_seed_gives_another_text(speculating: Server, prompts: list[str], seeded: tuple[Reply, ...]) -> None:
    other = Sampling("another seed", 0.8, top_p=0.95, seed=78)
    assert send(speculating, prompts[:4], other, max_tokens=64, concurrency=4).replies != seeded[:4]


def test_max_tokens_inside_an_accepted_path_cuts_there(
    speculating: Server, prompts: list[str], greedy: tuple[Reply, ...]
) -> None:
    cut_inside = 0
    for most in (2, 3, 5, 9, 14):
        batch = send(speculating, prompts, GREEDY, max_tokens=most, concurrency=4)
        assert [reply.token_ids for reply in batch.replies] == [reply.token_ids[:most] for reply in greedy]
        # Each step yields its accepted drafts and one token more, unless its path was cut.
        cut_inside += batch.counters.steps + batch.counters.accepted - batch.counters.generated
    assert cut_inside > 0


def test_a_stop_token_inside_an_accepted_path_ends_the_request(
    plain: Server, speculating: Server, prompts: list[str], greedy: tuple[Reply, ...], wanted: Wanted
) -> None:
    cut_inside = 0
    for place in (13, 25, 40):
        stop = {"stop_token_ids": sorted({reply.token_ids[place] for reply in greedy})}
        batch = send(speculating, prompts, GREEDY, max_tokens=64, concurrency=4, extra=stop)
        assert batch.replies == wanted(plain, len(prompts), GREEDY, 64, stop)
        assert all(reply.finish_reason == "stop" for reply in batch.replies)
        cut_inside += batch.counters.steps + batch.counters.accepted - batch.counters.generated
    assert cut_inside > 0


@pytest.mark.parametrize("included", [False, True])
def test_a_stop_string_ends_the_text_where_it_does_without_speculation(
    plain: Server, lookahead: Server, prompts: list[str], greedy: tuple[Reply, ...], included: bool
) -> None:
    with plain.client() as reference, lookahead.client() as client:
        for prompt, reply in list(zip(prompts, greedy, strict=True))[:6]:
            middle = len(reply.text) // 2
            request: dict[str, Any] = {
                "model": MODEL,
                "prompt": prompt,
                "max_tokens": 64,
                "temperature": 0.0,
                "stop": [reply.text[middle : middle + 5]],
                "extra_body": {"include_stop_str_in_output": included},
            }
            mine = client.completions.create(**request).choices[0]
            wanted = reference.completions.create(**request).choices[0]
            assert (mine.text, mine.finish_reason) == (wanted.text, "stop")
            assert mine.text.endswith(request["stop"][0]) is included


def test_requests_that_run_into_the_models_length_end_there(
    plain: Server, lookahead: Server, prompts: list[str]
) -> None:
    lengths = []
    with plain.client() as reference, lookahead.client() as client:
        for prompt in prompts[:3]:
            request: dict[str, Any] = {
                "model": MODEL,
                "messages": [{"role": "user", "content": prompt}],
                "temperature": 0.0,
                "extra_body": {"ignore_eos": True},
            }
            mine, wanted = client.chat.completions.create(**request), reference.chat.completions.create(**request)
            assert mine.choices[0].message.content == wanted.choices[0].message.content
            assert mine.usage is not None
            lengths.append(mine.usage.total_tokens)
    assert lengths == [256] * 3
