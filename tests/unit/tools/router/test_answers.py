# SPDX-License-Identifier: Apache-2.0
"""The answer cache in front of a router: the real one, in a SQLite file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.tools.router.fakes import Client, Fakes, events, routed, settings, streamed
from vllm_spec_plugins.cascade.config import CascadeConfigError
from vllm_spec_plugins.tools.router.service import Service


def cache(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return {"store": str(tmp_path / "answers.sqlite"), **changes}


@pytest.mark.parametrize("kind", ["chat", "complete"])
def test_the_same_deterministic_request_is_answered_from_the_cache_whole_or_streamed(tmp_path: Path, kind: str) -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        fakes.text["small"] = "once"
        ask = getattr(client, kind)
        first = (await ask(temperature=0)).json()
        again = (await ask(temperature=0)).json()
        assert again["choices"] == first["choices"]
        assert again["usage"] == first["usage"]
        assert again["cascade"] == {"cached": True, "attempts": 0, "cost": 0.0, "threshold": 0.8}
        assert again["id"] != first["id"]
        stream = await ask(temperature=0, stream=True)
        assert streamed(stream) == "once"
        assert events(stream)[-2]["cascade"]["cached"]
        assert fakes.hosts() == ["small"]
        # Another threshold may give another answer.
        await ask(temperature=0, model="cascade-0.7")
        assert fakes.hosts() == ["small"] * 2

    routed(test, cache=cache(tmp_path))


@pytest.mark.parametrize("kind", ["chat", "complete"])
def test_an_answer_that_streamed_through_is_kept_and_a_broken_one_is_not(tmp_path: Path, kind: str) -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        ask = getattr(client, kind)
        fakes.chance["small"] = 0.5
        fakes.text["large1"] = "from large"
        fakes.behaviour["large1"] = ["drop", "answer"]
        assert "error" in events(await ask(temperature=0, stream=True))[-1]
        whole = await ask(temperature=0, stream=True)
        calls = len(fakes.calls)
        again = (await ask(temperature=0)).json()
        assert again["cascade"]["cached"]
        assert len(fakes.calls) == calls == 4
        choice = again["choices"][0]
        assert (choice["text"] if kind == "complete" else choice["message"]["content"]) == streamed(whole)
        assert choice["finish_reason"] == "stop"
        assert again["usage"]["completion_tokens"] == 2

    routed(test, cache=cache(tmp_path), large={"upstreams": [{"url": "http://large1"}]})


def test_sampled_requests_and_those_that_say_no_store_are_not_cached(tmp_path: Path) -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        await client.chat(temperature=0.7)
        await client.chat(temperature=0.7)
        assert len(fakes.calls) == 2
        await client.chat({"Cache-Control": "no-store"}, temperature=0)
        await client.chat(temperature=0)
        assert len(fakes.calls) == 4
        await client.chat({"Cache-Control": "no-cache"}, temperature=0)
        assert len(fakes.calls) == 5
        await client.chat(temperature=0)
        assert len(fakes.calls) == 5

    routed(test, cache=cache(tmp_path))


def test_clients_do_not_see_each_others_answers(tmp_path: Path) -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        for key, calls in (("ka", 1), ("kb", 2), ("ka", 2), ("kb", 2)):
            await client.chat({"Authorization": f"Bearer {key}"}, temperature=0)
            assert len(fakes.calls) == calls

    routed(test, {"CLIENTS": "a=ka,b=kb"}, client_keys_env="CLIENTS", cache=cache(tmp_path))


def test_an_answer_that_a_budget_cut_short_is_not_kept(tmp_path: Path) -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        fakes.chance["small"] = 0.5
        for _ in range(2):
            answer = (await client.complete(temperature=0, max_tokens=2)).json()
            assert answer["cascade"]["limited"]
        assert len(fakes.calls) == 2

    routed(test, cache=cache(tmp_path), budget={"per_request": 100e-6})


def test_a_cache_that_cannot_be_used_stops_the_start(tmp_path: Path) -> None:
    for given, words in (({"stor": "x"}, "no setting 'stor'"), (cache(tmp_path, eviction="x"), "eviction=x")):
        with pytest.raises(CascadeConfigError, match=words) as refused:
            Service(settings(cache=given), "c.yaml", {})
        assert str(refused.value).startswith("c.yaml: cache: ")
