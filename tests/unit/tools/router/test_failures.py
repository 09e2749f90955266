# SPDX-License-Identifier: Apache-2.0
"""The router against upstreams that fail: an answer of another one, or a clear error, and nothing billed twice."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from tests.unit.tools.router.fakes import Behaviour, Client, Fakes, events, routed, settings, streamed, until
from vllm_spec_plugins.tools.router.network import Network
from vllm_spec_plugins.tools.router.service import Service

SMALL, LARGE = 14e-6, 140e-6


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("failure", ["drop", 500, 503, 429, 401, 404, "abort"])
def test_a_call_that_fails_is_made_again_elsewhere_and_not_billed(
    tmp_path: Path, failure: Behaviour, stream: bool
) -> None:
    if stream and failure == "drop":
        failure = "drop first"
    if stream and failure == "abort":
        failure = "error first"  # at the end of a stream its text was sent: see the tests of broken streams

    async def test(client: Client, fakes: Fakes) -> None:
        fakes.chance["small"] = 0.5
        fakes.behaviour["large1"] = [failure]
        fakes.text["large2"] = "whole"
        response = await client.chat(stream=stream)
        assert response.status_code == 200
        held = events(response)[-2]["cascade"] if stream else response.json()["cascade"]
        text = streamed(response) if stream else response.json()["choices"][0]["message"]["content"]
        assert text == "whole"
        assert held["attempts"] == 3
        assert held["cost"] == pytest.approx(SMALL + LARGE)
        assert fakes.hosts() == ["small", "large1", "large2"]
        found = lines(tmp_path / "l")
        assert [(e["upstream"], e["outcome"], e["billed"], e["answer"]) for e in found] == [
            ("small", "completed", True, False),
            ("large1", "failed", False, False),
            ("large2", "completed", True, True),
        ]
        ids = [request.headers["x-request-id"] for _, request in fakes.calls]
        assert ids == [e["attempt"] for e in found]
        assert len(set(ids)) == 3

    routed(test, ledger=str(tmp_path / "l"))


def test_a_stage_that_is_down_is_passed_over() -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        fakes.behaviour["small"] = ["drop"]
        answer = (await client.chat()).json()
        assert answer["cascade"]["stage"] == "large"
        assert answer["cascade"]["cost"] == pytest.approx(LARGE)
        assert fakes.hosts() == ["small"] * 3 + ["large1"]
        # Three failures in a row: the breaker keeps requests away.
        await client.chat()
        assert fakes.hosts().count("small") == 3

    routed(test)


@pytest.mark.parametrize("stream", [False, True])
def test_when_nobody_answers_the_error_says_so_and_nothing_is_billed(tmp_path: Path, stream: bool) -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        fakes.chance["small"] = 0.5
        fakes.behaviour["large1"] = fakes.behaviour["large2"] = [503]
        response = await client.chat(stream=stream)
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert "stage large gave no answer" in response.json()["error"]["message"]
        assert {(e["billed"], e["answer"]) for e in lines(tmp_path / "l")} == {(False, False)}
        assert client.service.cascade.ledger.billed("anonymous") == 0.0

    routed(test, ledger=str(tmp_path / "l"))


@pytest.mark.parametrize("failure", ["drop", "short", "no end", "error", "abort"])
def test_a_stream_that_breaks_after_its_first_text_ends_with_an_error_and_no_done(tmp_path: Path, failure: str) -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        fakes.chance["small"] = 0.5
        fakes.behaviour["large1"] = [failure]
        fakes.text["large1"] = "half an answer"
        found = events(await client.chat(stream=True))
        assert "this answer is not complete" in found[-1]["error"]["message"]
        assert "[DONE]" not in found
        assert all(choice["finish_reason"] is None for event in found[:-1] for choice in event["choices"])
        assert not any("cascade" in event for event in found)
        assert [(e["outcome"], e["billed"]) for e in lines(tmp_path / "l")] == [("completed", False), ("failed", False)]
        assert client.service.upstreams[1].running == 0
        assert all(body.closed for body in fakes.bodies)

    routed(test, ledger=str(tmp_path / "l"))


def test_what_an_upstream_refuses_about_the_request_is_the_clients_error_and_is_not_asked_again() -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        fakes.behaviour["small"] = [400]
        refused = await client.chat()
        assert refused.status_code == 400
        assert "status 400" in refused.json()["error"]["message"]
        assert fakes.hosts() == ["small"]
        assert client.service.upstreams[0].available

    routed(test, retry={"attempts": 5})


def test_an_upstream_that_takes_too_long_is_given_up() -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        fakes.behaviour["small"] = ["hang"]
        answer = (await client.chat()).json()
        assert answer["cascade"]["stage"] == "large"
        assert client.service.upstreams[0].running == 0

    routed(test, small={"timeout": 0.05}, retry={"attempts": 1})


def test_hedging_is_off_and_where_it_is_on_the_first_answer_is_the_one_paid_for(tmp_path: Path) -> None:
    async def slow(client: Client, fakes: Fakes) -> None:
        fakes.chance["small"] = 0.5
        fakes.behaviour["large1"] = ["hang"]
        fakes.text["large2"] = "quick"
        answer = (await client.chat()).json()
        assert answer["choices"][0]["message"]["content"] == "quick"
        assert answer["cascade"]["cost"] == pytest.approx(SMALL + LARGE)
        assert sorted((e["upstream"], e["outcome"], e["billed"]) for e in lines(tmp_path / "l")) == [
            ("large1", "cancelled", False),
            ("large2", "completed", True),
            ("small", "completed", True),
        ]
        assert client.service.upstreams[1].running == 0

    routed(slow, large={"hedge_after": 0.02}, ledger=str(tmp_path / "l"))

    async def off(client: Client, fakes: Fakes) -> None:
        fakes.chance["small"] = 0.5
        fakes.behaviour["large1"] = ["hang"]
        waiting = asyncio.create_task(client.chat())
        await until(lambda: fakes.running["large1"] == 1)
        await asyncio.sleep(0.1)
        assert fakes.hosts() == ["small", "large1"]
        fakes.go.set()
        assert (await waiting).status_code == 200

    routed(off)


def test_a_full_queue_is_answered_with_429_and_a_time_to_come_back() -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        fakes.behaviour["small"] = ["hang"]
        waiting = [asyncio.create_task(client.chat()) for _ in range(5)]
        (small, *_) = client.service.upstreams
        await until(lambda: (fakes.running["small"], small.waiting) == (2, 3))
        refused = await client.chat()
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert fakes.hosts() == ["small"] * 2  # nobody else is asked in its place
        fakes.go.set()
        assert [response.status_code for response in await asyncio.gather(*waiting)] == [200] * 5
        assert fakes.most["small"] == 2
        assert (client.service.upstreams[0].running, client.service.upstreams[0].waiting) == (0, 0)

    routed(test, small={"upstreams": [{"url": "http://small", "max_concurrency": 2, "max_queue": 3}]})


def test_a_wait_in_the_queue_ends() -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        fakes.behaviour["small"] = ["hang"]
        first = asyncio.create_task(client.chat())
        await until(lambda: fakes.running["small"] == 1)
        assert (await client.chat()).status_code == 429
        fakes.go.set()
        assert (await first).status_code == 200

    one = {"upstreams": [{"url": "http://small", "max_concurrency": 1}]}
    routed(test, small=one, health={"queue_timeout": 0.05})


def test_an_upstream_comes_back_when_its_health_does() -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        (small, *_) = client.service.upstreams
        fakes.behaviour["small"] = ["drop"]
        fakes.healthy["small"] = False
        await client.chat()
        assert not small.available
        fakes.behaviour["small"] = ["answer"]
        await small.check()
        assert (await client.chat()).json()["cascade"]["stage"] == "large"
        fakes.healthy["small"] = True
        await small.check()
        assert (await client.chat()).json()["cascade"]["stage"] == "small"

    routed(test, health={"cooldown": 1000, "interval": 1000})


def test_load_is_shared_between_a_stages_servers() -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        fakes.chance["small"] = 0.5
        fakes.behaviour["large1"] = fakes.behaviour["large2"] = ["hang"]
        waiting = [asyncio.create_task(client.chat()) for _ in range(8)]
        await until(lambda: fakes.running["large1"] + fakes.running["large2"] == 8)
        assert (fakes.running["large1"], fakes.running["large2"]) == (4, 4)
        fakes.go.set()
        assert {response.status_code for response in await asyncio.gather(*waiting)} == {200}

    routed(test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_calls_and_pays_nothing(tmp_path: Path, stream: bool) -> None:
    """Over a real socket: only there a client can leave."""

    async def run() -> None:
        fakes = Fakes()
        fakes.chance["small"] = 0.5
        fakes.behaviour["large1"] = ["hang"]
        service = Service(settings(ledger=str(tmp_path / "l")), transport=fakes.transport)
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            server = uvicorn.Server(uvicorn.Config(service.app(), log_level="warning"))
            serving = asyncio.create_task(server.serve([listening]))
            while not server.started:
                await asyncio.sleep(0.01)
            body = {"model": "cascade", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1/chat/completions"
            async with httpx.AsyncClient(timeout=60) as http:
                if stream:
                    async with http.stream("POST", url, json=body) as response:
                        async for _ in response.aiter_bytes():
                            break
                else:
                    asking = asyncio.create_task(http.post(url, json=body))
                    await until(lambda: fakes.running["large1"] == 1)
                    asking.cancel()
            await until(lambda: bool((tmp_path / "l").read_text()))
            found = lines(tmp_path / "l")
            assert [(e["outcome"], e["billed"]) for e in found] == [("completed", False), ("cancelled", False)]
            assert service.upstreams[1].running == 0
            assert service.upstreams[1].available
            server.should_exit = True
            await serving

    asyncio.run(run())


def test_500_requests_over_failing_upstreams_are_each_answered_rightly_or_refused_and_billed_at_most_once(
    tmp_path: Path, seed: int
) -> None:
    """Every kind of failure, at random; answers name the prompt that they are for."""
    rng = random.Random(seed)

    async def test(client: Client, fakes: Fakes) -> None:
        def plan(streams: bool) -> list[Behaviour]:
            kinds: list[Behaviour] = ["drop", "drop first", 500, 429, "abort", "short", "error"]
            return ["answer" if rng.random() < 0.7 else rng.choice(kinds) for _ in range(2000)]

        for host in ("small", "large1", "large2"):
            fakes.behaviour[host] = plan(False)
            fakes.text[host] = lambda body, host=host: f"{host[:5]}:{body['prompt']}"
        limit, answered, refused, broken = asyncio.Semaphore(32), [], 0, 0

        async def one(number: int) -> None:
            nonlocal refused, broken
            streams = number % 2 == 0
            async with limit:
                response = await client.complete(
                    prompt=f"p{number}", stream=streams, model=f"cascade-{0.95 if number % 3 else 0.5}"
                )
            if response.status_code != 200:
                refused += 1
                assert response.status_code == 503
                assert "gave no answer" in response.json()["error"]["message"]
                return
            if streams and events(response)[-1] != "[DONE]":
                broken += 1
                assert "not complete" in events(response)[-1]["error"]["message"]
                return
            text = streamed(response) if streams else response.json()["choices"][0]["text"]
            held = events(response)[-2]["cascade"] if streams else response.json()["cascade"]
            assert text == f"{held['stage'][:5]}:p{number}"
            answered.append((response.headers["x-request-id"], held["cost"]))

        await asyncio.gather(*(one(number) for number in range(500)))
        assert len(answered) + refused + broken == 500
        assert len(answered) > 300
        assert broken > 0
        found = lines(tmp_path / "l")
        assert len({e["attempt"] for e in found}) == len(found)
        billed: dict[str, float] = {}
        for e in found:
            if e["billed"]:
                billed[e["request"]] = billed.get(e["request"], 0.0) + e["cost"]
        assert billed == pytest.approx(dict(answered))
        assert sum(e["answer"] for e in found) == len(answered)
        assert client.service.cascade.ledger.billed("anonymous") == pytest.approx(sum(billed.values()))
        assert all(upstream.running == upstream.waiting == 0 for upstream in client.service.upstreams)

    routed(test, ledger=str(tmp_path / "l"), health={"failures": 50})


def test_a_server_that_dies_while_a_connection_is_made_is_a_failed_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """What httpx lets through then: anyio asks a connection that has no socket any more for its peer."""

    async def asked(name: str, of: object) -> None:
        network = Network(trust_env=False)

        async def connect(request: object) -> object:
            return getattr(of, name)

        monkeypatch.setattr(network._pool, "handle_async_request", connect)
        async with httpx.AsyncClient(transport=network, trust_env=False) as client:
            await client.get("http://upstream/health")

    with pytest.raises(httpx.ConnectError, match="closed when it was made"):
        asyncio.run(asked("getpeername", None))
    for name, of in (("getpeername", "a mistake of ours"), ("mistake", None)):
        with pytest.raises(AttributeError, match=name):
            asyncio.run(asked(name, of))
