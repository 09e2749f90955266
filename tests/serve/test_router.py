# SPDX-License-Identifier: Apache-2.0
"""The router over two real servers, one of which is killed and started again while requests run."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.conftest import ARGUMENTS, IN_CORE
from vllm_spec_plugins.tools.load import GREEDY, PROMPTS, TARGET, load_prompts, send
from vllm_spec_plugins.tools.server import MODEL, Server, free_port, running

REQUESTS = int(os.environ.get("ROUTER_REQUESTS", "500"))
TOGETHER = 32
TOKENS = 8
LONG = 500  # of an answer that is under way for seconds
PRICES = {"small": (1e-6, 2e-6), "large": (10e-6, 20e-6)}

# What draws out every path: the small model's answer kept, judged, and never kept.
MODELS = ("cascade-0", "cascade", "cascade-1")


@dataclass
class Setting:
    """Two servers, a router in a process of its own, and what each server says to each prompt."""

    small: Server
    large: Server
    url: str
    ledger: Path
    log: Path
    prompts: list[str]
    wanted: dict[str, list[str]]

    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.ledger.read_text().splitlines()]


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("router")
    arguments = [*ARGUMENTS, "--max-num-seqs", str(TOGETHER), "--max-model-len", "1024"]
    small = Server("small", TARGET.parent / "draft", arguments, folder / "small.log", IN_CORE)
    large = Server("large", TARGET, arguments, folder / "large.log", IN_CORE)
    stages = [
        {
            "name": server.name,
            "model": MODEL,
            "upstreams": [{"url": server.url, "name": server.name}],
            "input_price": PRICES[server.name][0] * 1e6,
            "output_price": PRICES[server.name][1] * 1e6,
        }
        for server in (small, large)
    ]
    health = {"interval": 0.5, "cooldown": 1.0}
    policy = {"kind": "confidence"}
    file, ledger, log = folder / "cascade.yaml", folder / "ledger", folder / "router.log"
    # JSON is YAML.
    file.write_text(
        json.dumps({"stages": stages, "policy": policy, "threshold": 0.5, "health": health, "ledger": str(ledger)})
    )
    with running([small, large]):
        prompts = load_prompts(PROMPTS, 24)
        wanted = {
            server.name: [reply.text for reply in send(server, prompts, GREEDY, TOKENS, concurrency=8).replies]
            for server in (small, large)
        }
        port = free_port()
        command = [sys.executable, "-P", "-m", "vllm_spec_plugins.tools.cli", "router"]
        with log.open("wb") as output:
            router = subprocess.Popen(
                [*command, "--config", str(file), "--port", str(port)], stdout=output, stderr=output
            )
        try:
            url = f"http://127.0.0.1:{port}"
            _await(url, router, log)
            yield Setting(small, large, url, ledger, log, prompts, wanted)
        finally:
            router.terminate()
            router.wait(60)


def _await(url: str, router: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while True:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            assert router.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def read(response: httpx.Response) -> tuple[str, dict[str, Any] | None, bool]:
    """Text, the cascade object and whether a stream says that it is complete."""
    if not response.headers["content-type"].startswith("text/event-stream"):
        answer = response.json()
        return answer["choices"][0]["text"], answer["cascade"], True
    *events, last = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    parsed = [json.loads(event) for event in events]
    text = "".join(choice["text"] for event in parsed for choice in event["choices"])
    return text, next((event["cascade"] for event in parsed if "cascade" in event), None), last == "[DONE]"


def test_every_request_is_answered_rightly_while_a_server_is_killed_and_started_again(routed: Setting) -> None:
    """The stage in front is the one that dies: the stage behind answers for it, in place of a clear error."""
    outcomes: list[tuple[int, httpx.Response]] = []

    async def run() -> None:
        places = asyncio.Semaphore(TOGETHER)
        began = asyncio.Event()

        async def one(number: int) -> None:
            async with places:
                if number == REQUESTS // 3 + TOGETHER // 2:
                    began.set()
                body = {
                    "model": MODELS[number % 3],
                    "prompt": routed.prompts[number % len(routed.prompts)],
                    "max_tokens": TOKENS,
                    "temperature": 0,
                    "stream": number % 2 == 0,
                }
                outcomes.append((number, await http.post("/v1/completions", json=body)))

        async def crash() -> None:
            await began.wait()
            await asyncio.to_thread(routed.small.kill)
            routed.small.start()

        async with httpx.AsyncClient(
            base_url=routed.url, timeout=300, limits=httpx.Limits(max_connections=TOGETHER)
        ) as http:
            first, last = range(REQUESTS * 4 // 5), range(REQUESTS * 4 // 5, REQUESTS)
            await asyncio.gather(crash(), *(one(number) for number in first))
            # The others come when the server does.
            await asyncio.to_thread(routed.small.wait)
            while not (await http.get("/health")).json()["stages"]["small"]:
                await asyncio.sleep(0.1)
            await asyncio.gather(*(one(number) for number in last))

    asyncio.run(run())
    assert len(outcomes) == REQUESTS
    answered: dict[str, float] = {}
    by_stage: dict[bool, list[str]] = {False: [], True: []}
    for number, response in outcomes:
        # Nothing else was down, so no error is due, however clear.
        assert response.status_code == 200, response.text
        text, held, complete = read(response)
        assert complete
        assert held is not None
        assert text == routed.wanted[held["stage"]][number % len(routed.prompts)]
        assert held["stage"] == "large" or number % 3 != 2
        answered[response.headers["x-request-id"]] = held["cost"]
        by_stage[number >= REQUESTS * 4 // 5].append(held["stage"])
    # Both stages answer, before and after.
    assert set(by_stage[False]) == set(by_stage[True]) == {"small", "large"}

    entries = routed.entries()
    assert len({entry["attempt"] for entry in entries}) == len(entries)
    billed: dict[str, float] = {}
    for entry in entries:
        price = PRICES[entry["stage"]]
        cost = price[0] * entry["input_tokens"] + price[1] * entry["output_tokens"]
        assert entry["cost"] == pytest.approx(cost)
        assert entry["billed"] is (entry["outcome"] == "completed")
        if entry["billed"]:
            assert 0 < entry["output_tokens"] <= TOKENS
            billed[entry["request"]] = billed.get(entry["request"], 0.0) + cost
    assert billed == pytest.approx(answered)
    answers = [entry["request"] for entry in entries if entry["answer"]]
    assert len(answers) == len(set(answers)) == REQUESTS
    # The kill hit calls that were under way.
    assert {entry["stage"] for entry in entries if entry["outcome"] == "failed"} == {"small"}
    log = routed.log.read_text()
    assert "upstream small is taken for down" in log
    assert "upstream small is up again" in log


def test_streams_whose_server_dies_end_with_an_error_and_are_not_billed(routed: Setting) -> None:
    """Last: the server stays dead."""
    before = len(routed.entries())

    async def run() -> list[str]:
        reading = asyncio.Semaphore(0)

        async def one(number: int) -> str:
            body = {"model": "cascade-1", "prompt": routed.prompts[number], "max_tokens": LONG, "stream": True}
            text = ""
            async with http.stream("POST", "/v1/completions", json={**body, "ignore_eos": True}) as response:
                assert response.status_code == 200
                async for piece in response.aiter_text():
                    if not text:
                        reading.release()
                    text += piece
            return text

        async with httpx.AsyncClient(base_url=routed.url, timeout=300) as http:
            streams = [asyncio.create_task(one(number)) for number in range(3)]
            for _ in streams:
                await reading.acquire()
            routed.large.kill()
            return list(await asyncio.gather(*streams))

    for text in asyncio.run(run()):
        *begun, last = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line]
        assert begun
        assert all(choice["finish_reason"] is None for event in begun for choice in event["choices"])
        assert "this answer is not complete" in last["error"]["message"]
    entries = routed.entries()[before:]
    assert sorted((entry["stage"], entry["outcome"]) for entry in entries) == [
        *[("large", "failed")] * 3,
        *[("small", "completed")] * 3,
    ]
    assert not any(entry["billed"] or entry["answer"] for entry in entries)
    refused = httpx.post(
        f"{routed.url}/v1/completions", json={"model": "cascade-1", "prompt": "x", "max_tokens": 1}, timeout=60
    )
    assert refused.status_code == 503
    assert "stage large gave no answer" in refused.json()["error"]["message"]
