# SPDX-License-Identifier: Apache-2.0
"""A cascade's requests in the engine: what they ask for, and the room that cheap stretches leave to the others."""

from __future__ import annotations

import json
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.outputs import DraftTokenIds

from vllm_spec_plugins.cascade.routes import ROUTES, Routes
from vllm_spec_plugins.config import FLAG, Settings
from vllm_spec_plugins.depth_settings import CascadeSettings
from vllm_spec_plugins.engine import contrastive
from vllm_spec_plugins.engine.scheduling import TreeDraftTokenIds
from vllm_spec_plugins.engine.settings import settings_of

KEY = "cascade"
FORM = 'use {"route": "cheap"} or {"threshold": 0.1}, or that as JSON text'


def routes(settings: Settings, max_requests: int, device: torch.device) -> Routes | None:
    """The routes of an engine with these settings; None: it is no cascade."""
    if not isinstance(settings, CascadeSettings):
        return None
    return Routes(settings.deferral(device), max_requests, settings.route, settings.easy, device)


def admit(request: EngineCoreRequest, config: VllmConfig) -> None:
    """Check what a request asks of the cascade. Raises VLLMValidationError (HTTP 400) with one sentence.

    Afterwards its extra_args hold {"route": str, "threshold": float or None}.
    """
    params = request.sampling_params
    if params is None or params.extra_args is None or KEY not in params.extra_args:
        return
    settings = settings_of(config)
    if not isinstance(settings, CascadeSettings):
        raise VLLMValidationError(
            f"{KEY}: this engine serves no cascade; start the server with {FLAG} cascade beside the cheap stage's {FLAG}"
        )
    if contrastive.wants(params):
        raise VLLMValidationError(f"{KEY}: cannot be combined with {contrastive.KEY}; leave one of them out")
    params.extra_args = {**params.extra_args, KEY: _parse(params.extra_args[KEY], settings)}


def _parse(given: Any, settings: CascadeSettings) -> dict[str, Any]:
    """Route and threshold, from an object or (HTTP's `vllm_xargs` carries no objects) its JSON text."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise VLLMValidationError(f"{KEY}: {given!r:.80} is not JSON ({error}); {FORM}") from error
    if not isinstance(given, dict):
        raise VLLMValidationError(f"{KEY}: {given!r:.80} is not an object; {FORM}")
    if unknown := sorted(map(str, given.keys() - {"route", "threshold"})):
        raise VLLMValidationError(f"{KEY}: unknown key {', '.join(unknown):.80}; valid keys are route and threshold")
    route, bound = given.get("route", settings.route), given.get("threshold")
    if route not in ROUTES:
        raise VLLMValidationError(f"{KEY}: route={route!r:.80} is not valid; valid are {', '.join(ROUTES)}")
    if bound is None:
        return {"route": route, "threshold": None}
    if isinstance(bound, bool) or not isinstance(bound, (int, float)):
        raise VLLMValidationError(f"{KEY}: threshold={bound!r:.80} is not a number")
    if route == "full":
        raise VLLMValidationError(
            f"{KEY}: threshold={bound!r:.80} means nothing with route=full; leave one of them out"
        )
    try:
        settings.deferral().at(bound)
    except (ValueError, OverflowError) as error:
        raise VLLMValidationError(f"{KEY}: threshold={error!s:.200}") from error
    return {"route": route, "threshold": float(bound)}


def _asked(params: SamplingParams | None) -> dict[str, Any]:
    """What an admitted request asks of the cascade; {} if nothing."""
    extra = None if params is None else params.extra_args
    asked: dict[str, Any] = (extra or {}).get(KEY, {})
    return asked


def add(found: Routes, slot: int, params: SamplingParams | None) -> None:
    """A request moves into `slot`."""
    given = _asked(params)
    if contrastive.wants(params):  # chooses by itself
        given = {"route": "full"}
    found.add(slot, given.get("route"), given.get("threshold"))


def make_room(scheduler: Any, drafts: DraftTokenIds) -> None:
    """While a request of route `full` runs, the others' trees together hold at most `cheap_nodes` nodes: each is cut to an
    equal share, from its end.
    """
    settings = _settings(scheduler)
    if settings is None or settings.cheap_nodes == 0 or not isinstance(drafts, TreeDraftTokenIds):
        return
    running = {request.request_id: _is_full(request, settings) for request in scheduler.running}
    cheap = [i for i, request in enumerate(drafts.req_ids) if running.get(request) is False]
    if not cheap or not any(running.values()):
        return
    share = settings.cheap_nodes // len(cheap)
    for i in cheap:
        drafts.draft_token_ids[i] = drafts.draft_token_ids[i][:share]
        drafts.gain[i] = min(drafts.gain[i], share)


def _is_full(request: Any, settings: CascadeSettings) -> bool:
    params = request.sampling_params
    return bool(contrastive.wants(params) or _asked(params).get("route", settings.route) == "full")


def _settings(scheduler: Any) -> CascadeSettings | None:
    """Read once: it is asked in every step."""
    if not hasattr(scheduler, "_spec_cascade"):
        settings = settings_of(scheduler.vllm_config)
        scheduler._spec_cascade = settings if isinstance(settings, CascadeSettings) else None
    found: CascadeSettings | None = scheduler._spec_cascade
    return found
