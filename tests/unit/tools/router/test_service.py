# SPDX-License-Identifier: Apache-2.0
"""The router against upstreams that answer: stages, policies, streams, budgets, keys."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from tests.unit.tools.router.fakes import Client, Fakes, events, routed, settings, streamed
from vllm_spec_plugins.cascade.config import CascadeConfigError
from vllm_spec_plugins.tools.router.service import Service

# Of the fakes' 10 tokens in and 2 out.
SMALL, LARGE = 14e-6, 140e-6


def test_a_confident_answer_of_the_cheap_stage_is_the_cascades() -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        fakes.text["small"] = "from small"
        response = await client.chat()
        answer = response.json()
        assert response.status_code == 200
        assert answer["choices"][0]["message"]["content"] == "from small"
        assert answer["choices"][0]["logprobs"] is None  # the policy's, not the client's
        assert answer["model"] == "cascade"
        assert answer["usage"]["completion_tokens"] == 2
        held = answer["cascade"]
        assert held["score"] == pytest.approx(0.9)
        assert (held["stage"], held["model"], held["attempts"]) == ("small", "s", 1)
        assert held["cost"] == pytest.approx(SMALL)
        assert fakes.hosts() == ["small"]
        assert answer["id"] == f"chatcmpl-{response.headers['x-request-id']}"

    routed(test)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["chat", "complete"])
def test_an_answer_below_the_threshold_is_handed_on_and_both_calls_are_accounted(kind: str, stream: bool) -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        fakes.chance["small"] = 0.5
        fakes.text["large1"] = fakes.text["large2"] = "from large"
        response = await getattr(client, kind)(
            stream=stream, stream_options={"include_usage": True} if stream else None
        )
        if stream:
            found = events(response)
            assert found[-1] == "[DONE]"
            assert streamed(response) == "fromlarge"  # the fakes stream word by word
            held, usage = found[-2]["cascade"], found[-2]["usage"]
            assert {event["model"] for event in found[:-1]} == {"cascade"}
        else:
            held, usage = response.json()["cascade"], response.json()["usage"]
        assert (held["stage"], held["attempts"]) == ("large", 2)
        assert held["cost"] == pytest.approx(SMALL + LARGE)
        assert usage["prompt_tokens"] == 10
        assert fakes.hosts() == ["small", "large1"]

    routed(test)


def test_the_threshold_is_in_the_models_name() -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        fakes.chance["small"] = 0.5
        for model, stage in (
            ("cascade", "large"),
            ("cascade-0.4", "small"),
            ("cascade-0.6", "large"),
            ("cascade-0", "small"),
        ):
            answer = (await client.complete(model=model)).json()
            assert (answer["cascade"]["stage"], answer["model"]) == (stage, model)
        for model in ("cascade-2", "cascade-x", "cascade-nan", "gpt", None, 3):
            refused = await client.complete(model=model)
            assert refused.status_code == 404
            assert "cascade-X with a threshold X from 0 to 1" in refused.json()["error"]["message"]
        listed = (await client.get("/v1/models")).json()
        assert [each["id"] for each in listed["data"]] == ["cascade", "cascade-0.8"]

    routed(test)


@pytest.mark.parametrize("kind", ["chat", "complete"])
def test_a_judged_answer_streams_out_whole(kind: str) -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        fakes.text["small"] = "a b\u2028c"
        response = await getattr(client, kind)(stream=True, stream_options={"include_usage": True}, n=2)
        found = events(response)
        assert response.headers["content-type"].startswith("text/event-stream")
        assert found[-1] == "[DONE]"
        assert [event["choices"][0]["index"] for event in found[:-2]] == [0, 0, 1, 1]
        assert [event["choices"][0]["finish_reason"] for event in found[:-2]] == [None, "stop"] * 2
        assert streamed(response) == "a b\u2028c" * 2
        assert found[-2]["usage"]["total_tokens"] == 12
        assert found[-3]["cascade"] == found[-2]["cascade"]
        plain = await getattr(client, kind)(stream=True)
        assert not any(event.get("usage") for event in events(plain)[:-1])
        assert events(plain)[-2]["cascade"]["stage"] == "small"

    routed(test)


def test_text_with_line_separators_streams_through() -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        fakes.chance["small"] = 0.1
        fakes.text["large1"] = "a\u2028b\x85c"
        assert streamed(await client.chat(stream=True)) == "a\u2028b\x85c"

    routed(test)


def test_log_probabilities_are_the_clients_if_it_asked_for_them() -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        answer = (await client.complete(logprobs=1)).json()
        assert len(answer["choices"][0]["logprobs"]["token_logprobs"]) == 2
        answer = (await client.complete()).json()
        assert answer["choices"][0]["logprobs"] is None

    routed(test)


def test_a_vote_asks_in_two_styles_and_pays_for_every_sample() -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        fakes.text["small"] = lambda body: "4" if "step by step" in body["prompt"] else "5" if body["seed"] else "4."
        answer = (await client.complete(temperature=0)).json()
        assert answer["choices"][0]["text"] == "4."
        assert answer["cascade"]["score"] == 0.75
        assert answer["cascade"]["cost"] == pytest.approx(4 * SMALL)
        assert answer["cascade"]["attempts"] == 4
        answer = (await client.complete(temperature=0, model="cascade-0.8")).json()
        assert answer["cascade"]["stage"] == "large"

    routed(test, policy={"kind": "vote"}, threshold=0.7)


def test_a_stage_verifies_itself_by_one_more_call() -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        # The fakes' log-probabilities hold neither yes nor no: not verified.
        answer = (await client.chat()).json()
        assert answer["cascade"]["stage"] == "large"
        assert answer["cascade"]["attempts"] == 3
        question = json.loads(fakes.calls[1][1].content)["messages"][0]["content"]
        assert "hi" in question
        assert "text" in question

    routed(test, policy={"kind": "self_verification"})


def test_a_scorer_of_ones_own_is_asked_with_its_own_key_alone() -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        answer = (await client.chat()).json()
        assert answer["cascade"]["stage"] == "small"
        assert answer["cascade"]["score"] == 0.9
        assert [(h, r.headers.get("authorization")) for h, r in fakes.calls] == [
            ("small", None),
            ("scorer", "Bearer sc"),
        ]

    policy = {"kind": "scorer", "url": "http://scorer/score", "api_key_env": "SCORER"}
    routed(test, {"SCORER": "sc"}, policy=policy)


def test_an_answer_that_cannot_be_judged_is_handed_on_and_counted() -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        answer = (await client.chat()).json()
        assert answer["cascade"]["stage"] == "large"
        assert 'vllm_spec_router_unjudged_total{stage="small"} 1.0' in (await client.get("/metrics")).text

    # The fakes answer this path as a model would: no score.
    routed(test, policy={"kind": "scorer", "url": "http://small/v1/completions"})


def test_a_classifier_sends_the_prompt_to_one_stage_and_streams_its_answer(tmp_path: Path) -> None:
    file = tmp_path / "m"
    constant = {"weights": 0.0, "mean": 0.0, "scale": 1.0, "bias": 0.0}
    file.write_text(json.dumps({"policy": "classifier", "models": {"small": constant}}))

    async def test(client: Client, fakes: Fakes) -> None:
        assert streamed(await client.chat(model="cascade-0.5", stream=True)) == "text"
        assert (await client.chat(model="cascade-0.6")).json()["cascade"]["stage"] == "large"
        assert fakes.hosts() == ["small", "large1"]

    routed(test, policy={"kind": "classifier", "model": str(file)})


def test_a_budget_per_request_keeps_the_cheap_answer() -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        fakes.chance["small"] = 0.5
        answer = (await client.complete(max_tokens=2)).json()
        assert (answer["cascade"]["stage"], answer["cascade"]["limited"]) == ("small", True)
        assert fakes.hosts() == ["small"]

    routed(test, budget={"per_request": SMALL + LARGE - 1e-9})


def test_a_request_that_no_stage_may_answer_is_refused() -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        refused = await client.complete(max_tokens=1000)
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "insufficient_quota")
        assert not fakes.calls

    routed(test, budget={"per_request": 1e-3})


def test_a_tenants_budget_is_its_own_and_is_used_up(tmp_path: Path) -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        a, b = {"Authorization": "Bearer ka"}, {"Authorization": "Bearer kb"}
        statuses = [(await client.complete(a, max_tokens=2)).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]
        assert (await client.complete(b, max_tokens=2)).status_code == 200
        lines = [json.loads(line) for line in (tmp_path / "ledger").read_text().splitlines()]
        assert [(line["tenant"], line["billed"], line["answer"]) for line in lines] == [
            ("a", True, True),
            ("a", True, True),
            ("b", True, True),
        ]
        assert len({line["attempt"] for line in lines}) == 3

    budget = {"per_tenant": 2.2 * SMALL}
    environment = {"CLIENTS": "a=ka,b=kb"}
    routed(test, environment, budget=budget, client_keys_env="CLIENTS", ledger=str(tmp_path / "ledger"))


def test_clients_need_a_key_where_keys_are_configured() -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "Basic ka"}, {"Authorization": "ka"}):
            refused = await client.chat(headers)
            assert refused.status_code == 401
            assert (await client.get("/v1/models", headers)).status_code == 401
        assert not fakes.calls
        assert (await client.chat({"Authorization": "bearer ka"})).status_code == 200

    routed(test, {"CLIENTS": "a=ka"}, client_keys_env="CLIENTS")


@pytest.mark.parametrize("stream", [False, True])
def test_each_upstream_sees_its_own_key_alone_and_no_log_line_or_answer_shows_one(
    caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    keys = {"SMALL": "key-of-small", "LARGE": "key-of-large1", "CLIENTS": "a=key-of-client"}

    async def test(client: Client, fakes: Fakes) -> None:
        fakes.chance["small"] = 0.5
        fakes.behaviour["small"] = [500, 400, "answer"]
        fakes.behaviour["large1"] = [401, "drop", "answer"]
        headers = {"Authorization": "Bearer key-of-client", "X-Api-Key": "mine", "Cookie": "mine"}
        shown = [(await client.chat(headers, stream=stream)).text for _ in range(6)]
        shown += [
            (await client.get("/metrics")).text,
            (await client.get("/health")).text,
            repr(client.service.upstreams),
        ]
        own = {"small": "Bearer key-of-small", "large1": "Bearer key-of-large1", "large2": None}
        assert set(fakes.hosts()) == set(own)
        for host, request in fakes.calls:
            assert request.headers.get("authorization") == own[host]
            assert "key-of-client" not in str(request.headers.raw)
            assert "mine" not in str(request.headers.raw)
        for text in (*shown, caplog.text):
            assert "key-of" not in text
        assert "***" in shown[0]  # the fakes repeat the key in what they say of the request

    large = {"upstreams": [{"url": "http://large1", "api_key_env": "LARGE"}, {"url": "http://large2"}]}
    small = {"upstreams": [{"url": "http://small", "api_key_env": "SMALL"}]}
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, "httpx"):
        routed(test, keys, large=large, small=small, client_keys_env="CLIENTS")
    assert "http://small/v1/chat/completions" in caplog.text


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {"messages": "hi"}, "messages"),
        ("/v1/completions", {}, "prompt is missing"),
        ("/v1/completions", {"prompt": "x", "n": "two"}, "n='two'"),
        ("/v1/completions", {"prompt": "x", "echo": True}, "echo"),
        ("/v1/completions", {"prompt": "x", "stream_options": 1}, "stream_options"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_before_any_call(path: str, body: dict[str, Any], words: str) -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        refused = await client.post(path, model="cascade", **body)
        assert refused.status_code == 400
        assert words in refused.json()["error"]["message"]
        assert not fakes.calls

    routed(test)


@pytest.mark.parametrize("body", [b"", b"[", b'{"model": NaN}', b'{"temperature": Infinity}', b"[]"])
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        refused = await client.send("/v1/completions", body)
        assert refused.status_code == 400
        assert "JSON" in refused.json()["error"]["message"]

    routed(test)


@pytest.mark.parametrize("stream", [False, True])
def test_half_a_surrogate_pair_travels_as_it_came_and_is_no_failure_of_an_upstream(stream: bool) -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        fakes.chance["small"] = 0.1
        sent = json.dumps({"model": "cascade", "prompt": "\ud800", "stream": stream}).encode()
        assert (await client.send("/v1/completions", sent)).status_code == 200
        assert {json.loads(request.content)["prompt"] for _, request in fakes.calls} == {"\ud800"}

    routed(test)


def test_health_and_metrics_say_what_is_up() -> None:
    async def test(client: Client, fakes: Fakes) -> None:
        await client.chat()
        fakes.healthy["small"] = False
        for upstream in client.service.upstreams:
            await upstream.check()
        health = await client.get("/health")
        assert (health.status_code, health.json()) == (200, {"stages": {"small": False, "large": True}})
        metrics = (await client.get("/metrics")).text
        assert 'vllm_spec_router_upstream_up{upstream="small"} 0.0' in metrics
        assert 'vllm_spec_router_requests_total{outcome="answered",stage="small"} 1.0' in metrics
        (cost,) = re.findall(r'vllm_spec_router_cost_total{stage="small",upstream="small"} (\S+)', metrics)
        assert float(cost) == pytest.approx(SMALL)
        fakes.healthy["large1"] = fakes.healthy["large2"] = False
        for upstream in client.service.upstreams:
            await upstream.check()
        assert (await client.get("/health")).status_code == 503

    routed(test)


def test_a_key_or_a_ledger_that_cannot_be_used_stops_the_start(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"client_keys_env": "CLIENTS"}, "client_keys_env=CLIENTS"),
        ({"small": {"upstreams": [{"url": "http://s", "api_key_env": "S"}]}}, "stages.0.upstreams.0.api_key_env=S"),
        ({"ledger": str(tmp_path / "absent" / "ledger")}, "ledger="),
        ({"policy": {"kind": "classifier", "model": str(tmp_path / "absent")}}, "policy.model="),
    ]
    for changes, words in cases:
        with pytest.raises(CascadeConfigError) as refused:
            Service(settings(**changes), "c.yaml", {})
        assert str(refused.value).startswith("c.yaml: ")
        assert words in str(refused.value)
