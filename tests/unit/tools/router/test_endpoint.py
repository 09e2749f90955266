# SPDX-License-Identifier: Apache-2.0
"""The router as an endpoint plugin, attached by vLLM's own code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.plugins import load_endpoint_plugins
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin, attach_endpoint_plugins

from tests.unit.tools.router.fakes import settings
from vllm_spec_plugins.cascade.config import CascadeConfigError
from vllm_spec_plugins.tools.router.endpoint import ENVIRONMENT, CascadeEndpoint


def attached(monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    """An application with a route of its own, as vLLM's, and the plugin."""
    app = FastAPI()

    @app.get("/v1/models")
    def models() -> str:
        return "vllm"

    monkeypatch.setattr("vllm.plugins.load_endpoint_plugins", lambda tasks: [CascadeEndpoint()])
    attach_endpoint_plugins(app, ("generate",))
    return app


def test_the_routes_stand_beside_the_servers_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cascade.yaml"
    file.write_text(json.dumps(settings(retry={"attempts": 1}).model_dump(exclude_none=True)))
    monkeypatch.setenv(ENVIRONMENT, str(file))
    assert isinstance(CascadeEndpoint(), EndpointPlugin)
    with TestClient(attached(monkeypatch)) as client:
        assert client.get("/v1/models").json() == "vllm"
        assert client.get("/cascade/v1/models").json()["data"][0]["id"] == "cascade"
        # No such hosts: the health checks, which the application's start began, found that out.
        health = client.get("/cascade/health")
        assert (health.status_code, health.json()["stages"]) == (503, {"small": False, "large": False})


def test_without_a_configuration_the_start_stops_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    with pytest.raises(CascadeConfigError, match=f"{ENVIRONMENT} is not set"):
        attached(monkeypatch)


def test_vllm_loads_no_endpoint_that_it_is_not_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.envs.VLLM_PLUGINS", None, raising=False)
    assert load_endpoint_plugins(("generate",)) == []
