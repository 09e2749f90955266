# SPDX-License-Identifier: Apache-2.0
"""An engine on the CPU whose own part of every step believes that it runs on another device.

vLLM's part stays what it is. Where its tensors are handed to this package's code they are disguised (tests/no_sync.py), memory
shared; what vLLM calls, and what it is called with, gets the host's again. So tokens come out, and whatever the code would have
waited for on a GPU raises.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any

import pytest
import torch

from tests.no_sync import DEVICE, DeviceTensor, Synchronised, device, hosted, no_sync, on_device, on_host
from vllm_spec_plugins import compiled

BATCH = (
    "idx_mapping", "expanded_idx_mapping", "expanded_local_pos", "query_start_loc", "seq_lens", "input_ids", "positions",
    "logits_indices", "cu_num_logits",
)  # fmt: skip


class There:
    """An object of vLLM's, its tensors in disguise: attributes, theirs (`.gpu`), and lists of such objects."""

    def __init__(self, inner: Any, **own: Any) -> None:
        object.__setattr__(self, "_inner", inner)
        object.__setattr__(self, "_own", own)

    def __getattr__(self, name: str) -> Any:
        if name in self._own:
            return self._own[name]
        value = getattr(self._inner, name)
        if name == "gpu":
            return on_device(value)
        if isinstance(value, list) and value and hasattr(value[0], "gpu"):
            return [There(each) for each in value]
        return There(value) if hasattr(value, "gpu") else value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._inner, name, value)


class Steps:
    """How often each stage ran, and the first steps in which what is made once may be made."""

    def __init__(self, warm: int) -> None:
        self.warm = warm
        self.ran: dict[str, int] = {}
        self.accepted = 0  # requests and steps in which a node was accepted

    def __call__(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` there: strict from the `warm`-th time on; what it returns is the host's again."""

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.ran[stage] = self.ran.get(stage, 0) + 1
            given, named = on_device(args), {name: on_device(each) for name, each in kwargs.items()}
            with ExitStack() as stack:
                stack.enter_context(torch.inference_mode())
                stack.enter_context(device())
                if self.ran[stage] > self.warm:
                    stack.enter_context(no_sync())
                return on_host(function(*given, **named))

        return run


def with_loops(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of the host, computed as the CPU lane computes it."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        before, compiled.use_loops = compiled.use_loops, True
        try:
            return hosted(function)(*args, **kwargs)
        finally:
            compiled.use_loops = before

    return run


def disguise(monkeypatch: pytest.MonkeyPatch, warm: int = 3) -> Steps:
    """Engines that are made from now on run this package's stages there."""
    from vllm.v1.worker.gpu.spec_decode import utils

    from vllm_spec_plugins.engine import drafter, model_state, sampler, speculator, state

    steps = Steps(warm)
    monkeypatch.setattr(compiled, "use_loops", False)

    def batch_of(batch: Any) -> Any:
        return There(batch, **{name: on_device(getattr(batch, name)) for name in BATCH})

    make = speculator.TreeSpeculator.__init__

    def init(self: Any, vllm_config: Any, at: Any, req_states: Any, settings: Any) -> None:
        with torch.inference_mode(), device():
            make(self, vllm_config, DEVICE, There(req_states, device=DEVICE), settings)

    monkeypatch.setattr(speculator.TreeSpeculator, "__init__", init)
    propose = steps("propose", speculator.TreeSpeculator.propose)

    def proposed(self: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        return propose(self, batch_of(input_batch), *args, **kwargs)

    monkeypatch.setattr(speculator.TreeSpeculator, "propose", proposed)
    handler = speculator.TreeDraftsHandler
    hand = steps("set_draft_tokens", handler.set_draft_tokens)
    monkeypatch.setattr(handler, "set_draft_tokens", lambda self, batch, drafts: hand(self, batch_of(batch), drafts))
    for module in (speculator, utils):
        monkeypatch.setattr(module, "async_copy_to_np", lambda tensor: on_host(tensor).clone().numpy())
    monkeypatch.setattr(DeviceTensor, "record_stream", lambda self, stream: None)
    for kind, name in ((state.TreeState, "begin_step"), (state.TreeState, "add_request")):
        monkeypatch.setattr(kind, name, steps(name, getattr(kind, name)))

    # The model state: positions, metadata, K/V commit.
    positions = steps("tree_positions", model_state.tree_positions)
    monkeypatch.setattr(
        model_state, "tree_positions", lambda given, trees, batch: positions(given, trees, batch_of(batch))
    )
    made = model_state.TreeStep
    monkeypatch.setattr(model_state, "TreeStep", lambda trees: made(on_host(trees)))
    kind = model_state.TreeModelState
    bound, post = kind.initialize_kv_cache, steps("postprocess_state", kind.postprocess_state)

    def initialize(self: Any, kv_cache_config: Any, block_tables: Any) -> None:
        with torch.inference_mode(), device():
            bound(self, kv_cache_config, block_tables)
            self._block_tables = There(block_tables)
            for move in self._commits:
                move.caches = on_device(move.caches)
            for each in self.speculator.drafters:
                each.table, each.caches = on_device(each.table), on_device(each.caches)
                each._commit.caches = each.caches

    monkeypatch.setattr(kind, "initialize_kv_cache", initialize)
    monkeypatch.setattr(kind, "postprocess_state", post)

    # The verifier, and what it asks of vLLM's sampler.
    verify = steps("verify", sampler.TreeVerifier.__call__)

    def verified(self: Any, logits: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        own = self.sampler
        names = ("apply_sampling_params", "_sample_random")
        states = There(own.sampling_states, get_top_k_top_p=hosted(own.sampling_states.get_top_k_top_p))
        self.sampler = There(
            own, sampling_states=states, req_states=There(own.req_states), **{n: hosted(getattr(own, n)) for n in names}
        )
        try:
            out = verify(self, logits, batch_of(input_batch), *args, **kwargs)
            steps.accepted += int((out.num_sampled > 1).sum())
            return out
        finally:
            self.sampler = own

    monkeypatch.setattr(sampler.TreeVerifier, "__call__", verified)
    for name in ("get_num_sampled_and_rejected", "compute_topk_scores"):
        monkeypatch.setattr(sampler, name, hosted(getattr(sampler, name)))
    for name in ("likeliest", "confidence"):
        monkeypatch.setattr(sampler, name, with_loops(getattr(sampler, name)))

    # Draft models' forward passes.
    monkeypatch.setattr(drafter.PagedDraft, "_run", hosted(drafter.PagedDraft._run))
    monkeypatch.setattr(drafter.LoadedDraft, "_known", hosted(drafter.LoadedDraft._known))
    load = drafter.LoadedDraft.load

    def loaded(self: Any, target: Any) -> None:
        load(self, target)
        self.model.compute_logits = hosted(self.model.compute_logits)

    monkeypatch.setattr(drafter.LoadedDraft, "load", loaded)
    return steps


__all__ = ["Synchronised", "disguise"]
