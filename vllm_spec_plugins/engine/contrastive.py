# SPDX-License-Identifier: Apache-2.0
"""Contrastive search for the requests that ask for it: candidates as the root's children, one tree pass per token.

The candidates behind a token are the likeliest tokens by the logits of its row. They are verified as children of the root
in the next step, whose rows give what the rule asks for: their hidden states, and with the chosen one's logits the next
candidates. The chosen token is computed once more, as the next root. A step in which the candidates are not known yet (the
end of a prompt, also of one computed again after preemption), or were not all scheduled, emits nothing: its last token is
taken for not computed, and the next step has it for its root again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_spec_plugins.config import FLAG
from vllm_spec_plugins.engine.settings import settings_of
from vllm_spec_plugins.registry import method_of
from vllm_spec_plugins.tree.accept import Acceptance
from vllm_spec_plugins.tree.contrastive import candidates, choose, directions

KEY = "contrastive"
DEFAULTS = {"alpha": 0.6, "k": 4}


def wants(params: SamplingParams | None) -> bool:
    """Whether a request is one of contrastive search."""
    return params is not None and params.extra_args is not None and KEY in params.extra_args


def admit(request: EngineCoreRequest, config: VllmConfig) -> None:
    """Check what a request of contrastive search asks for, and set what follows from it.

    Raises VLLMValidationError (HTTP 400) with one sentence. Afterwards its extra_args hold {"alpha": float, "k": int}, it
    reads nothing from the prefix cache (which has no hidden states), and it ends k tokens before the context does.
    """
    params = request.sampling_params
    if params is None or not wants(params):
        return
    assert params.extra_args is not None and params.max_tokens is not None
    alpha, k = _parse(params.extra_args[KEY])
    for what, instead in (*_engine_refusals(config, k), *_request_refusals(request, params)):
        raise VLLMValidationError(f"{KEY}: {what}; {instead}")
    prompt, longest = len(request.prompt_token_ids or ()), config.model_config.max_model_len
    if prompt + k >= longest:
        raise VLLMValidationError(
            f"{KEY}: a prompt of {prompt} tokens and {k} candidates leave no token of the context of {longest} for an "
            f"answer; use a shorter prompt"
        )
    params.extra_args = {**params.extra_args, KEY: {"alpha": alpha, "k": k}}
    params.max_tokens = min(params.max_tokens, longest - k - prompt)
    params.skip_reading_prefix_cache = True


def _parse(given: Any) -> tuple[float, int]:
    """alpha and k, from an object or (HTTP's `vllm_xargs` carries no objects) its JSON text."""
    form = f'use {{"alpha": {DEFAULTS["alpha"]}, "k": {DEFAULTS["k"]}}}, or that as JSON text'
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:  # also of numbers too long and brackets too deep
            raise VLLMValidationError(f"{KEY}: {given!r:.80} is not JSON ({error}); {form}") from error
    if not isinstance(given, dict):
        raise VLLMValidationError(f"{KEY}: {given!r:.80} is not an object; {form}")
    if unknown := sorted(map(str, given.keys() - DEFAULTS.keys())):
        raise VLLMValidationError(f"{KEY}: unknown key {', '.join(unknown):.80}; valid keys are alpha and k")
    alpha, k = (given.get(key, value) for key, value in DEFAULTS.items())
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise VLLMValidationError(f"{KEY}: alpha={alpha!r:.80} is not a number from 0 to 1")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise VLLMValidationError(f"{KEY}: k={k!r:.80} is not an integer of at least 1")
    return float(alpha), k


def _engine_refusals(config: VllmConfig, k: int) -> Iterator[tuple[str, str]]:
    """(what does not work on this engine, what would), for everything that does not hold."""
    settings, scheduler, model = settings_of(config), config.scheduler_config, config.model_config
    assert settings is not None
    method = method_of(settings)
    if method.proposer is None:
        yield f"{FLAG} {settings.title} verifies no candidates", f"start the server with {FLAG} lookahead, for one"
        return
    nodes = config.num_speculative_tokens
    if k > nodes:
        yield f"k={k} is more than the {nodes} nodes of {FLAG} {settings.title}", f"use a k of at most {nodes}"
    if k > model.get_vocab_size():
        yield f"k={k} is more than the {model.get_vocab_size()} tokens of the vocabulary", "use a smaller k"
    if scheduler.async_scheduling:
        yield "asynchronous scheduling is not supported", "start the server with --no-async-scheduling"
    if config.lora_config is not None:
        yield "LoRA adapters are not supported", "start the server without --enable-lora"
    if config.parallel_config.enable_batch_sharded_sampling:
        yield "batch-sharded sampling is not supported", "start the server without it"
    if model.logits_processors:
        yield "custom logits processors are not supported", "start the server without --logits-processors"
    budget = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
    threshold = scheduler.long_prefill_token_threshold
    for flag, most in (("--max-num-batched-tokens", budget), ("--long-prefill-token-threshold", threshold)):
        if 0 < most <= k:
            yield f"k={k} candidates and their root do not fit into {flag} {most}", f"use a k of at most {most - 1}"


def _request_refusals(request: EngineCoreRequest, params: SamplingParams) -> Iterator[tuple[str, str]]:
    """(what does not go together with contrastive search, what would)."""
    if params.temperature > 0:
        yield f"the search draws nothing, so temperature={params.temperature} means nothing", "set temperature to 0"
    penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
    refused = {
        "presence_penalty, frequency_penalty or repetition_penalty": penalties != (0.0, 0.0, 1.0),
        "bad_words": bool(params.bad_words),
        "logit_bias": bool(params.logit_bias),
        "allowed_token_ids": params.allowed_token_ids is not None,
        "min_tokens": params.min_tokens > 0,
        "structured outputs": params.structured_outputs is not None,
        "logprobs": params.logprobs is not None or params.logprob_token_ids is not None,
        "prompt_logprobs": params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None,
        "thinking_token_budget": params.thinking_token_budget is not None,
        "prompt embeddings": request.prompt_embeds is not None,
        "a prompt that comes in pieces": request.resumable,
    }
    for name, given in refused.items():
        if given:
            yield f"{name} cannot be combined with contrastive search", "leave one of them out"


@dataclass(eq=False)
class Search:
    """What is known of one request.

    Attributes:
        alpha, k: as asked for.
        context: [L, H] float32, `directions` of its tokens' rows; those of computed tokens are filled.
        tokens, p: [k] int64 and float32, the candidates behind its last token; None = not known yet.
    """

    alpha: float
    k: int
    context: Tensor
    tokens: Tensor | None = None
    p: Tensor | None = None


class Searches:
    """The requests of contrastive search on this worker, by request slot."""

    def __init__(self) -> None:
        self.by_slot: dict[int, Search] = {}

    def add(
        self,
        slot: int,
        params: SamplingParams | None,
        computed: int,
        length: int,
        hidden_size: int,
        device: torch.device,
    ) -> None:
        """A request of at most `length` tokens moves into `slot`, with `computed` tokens in the K/V cache."""
        self.by_slot.pop(slot, None)
        if params is None or params.extra_args is None or not wants(params):
            return
        assert computed == 0, "a request of contrastive search came with tokens whose hidden states are not known"
        context = torch.empty(length, hidden_size, dtype=torch.float32, device=device)
        self.by_slot[slot] = Search(context=context, **params.extra_args[KEY])

    def remove(self, slot: int) -> None:
        self.by_slot.pop(slot, None)

    def others(self, slots: np.ndarray) -> np.ndarray | None:
        """[n] int64: which requests of the batch, of `slots` [B], are none of these; None = the batch has none of these."""
        searching = np.array([slot in self.by_slot for slot in slots.tolist()]) if self.by_slot else np.zeros(0, bool)
        return np.flatnonzero(~searching) if searching.any() else None

    def store(self, tokens: Tensor, slots: np.ndarray) -> None:
        """Write the candidates of the requests in `slots` [B] into trees `tokens` [B, N], of which they have no node."""
        for b, slot in enumerate(slots.tolist()):
            search = self.by_slot.get(slot)
            if search is not None and search.tokens is not None:
                tokens[b, : search.k] = search.tokens

    def decide(
        self,
        compute_logits: Callable[[Tensor], Tensor],
        hidden: Tensor,
        batch: InputBatch,
        output: SamplerOutput,
        acceptance: Acceptance | None,
    ) -> None:
        """Put the search's choice in the place of what the sampler drew, for its requests of the batch.

        Args:
            compute_logits: [n, H] -> [n, V], the head of the model.
            hidden: [T, H], the last hidden states of the batch's rows, after the final norm.
            output: the sampler's; changed in place.
            acceptance: the rule's choice, if some request had drafts; changed in place.
        """
        decided: list[Search] = []
        chosen: list[Tensor] = []  # the row whose logits give the next candidates
        for b, slot in enumerate(batch.idx_mapping_np.tolist()):
            search = self.by_slot.get(slot)
            if search is None:
                continue
            drafts = 0 if batch.num_draft_tokens_per_req is None else int(batch.num_draft_tokens_per_req[b])
            first, behind = int(batch.query_start_loc_np[b]), int(batch.query_start_loc_np[b + 1]) - drafts
            begin = int(batch.num_computed_tokens_np[b])
            end = begin + behind - first
            search.context[begin:end] = directions(hidden[first:behind])
            if end < batch.prefill_len_np[b]:
                continue
            row = torch.full((), behind - 1, dtype=torch.int64, device=hidden.device)
            token: Tensor | int = -1
            if search.tokens is not None and search.p is not None and drafts == search.k:
                rows = hidden[behind : behind + search.k]
                index = choose(search.p, rows, search.context[:end], search.alpha)
                row, token = behind + index, search.tokens[index]
            emits = int(isinstance(token, Tensor))
            output.sampled_token_ids[b] = -1
            output.sampled_token_ids[b, 0] = token
            output.num_sampled[b], output.num_rejected[b] = emits, drafts + 1 - emits
            if acceptance is not None:  # its `emitted` is what the sampler put out
                acceptance.path[b], acceptance.num_accepted[b], acceptance.num_emitted[b] = 0, 0, emits
            decided.append(search)
            chosen.append(row)
        if decided:
            most = max(search.k for search in decided)
            tokens, p = candidates(compute_logits(hidden[torch.stack(chosen)]), most)
            for line, search in enumerate(decided):
                search.tokens, search.p = tokens[line, : search.k], p[line, : search.k]


def hold_back(scheduler: Any, step: SchedulerOutput, output: ModelRunnerOutput) -> None:
    """Requests of contrastive search that computed their last token and emitted nothing have that token as their root again.

    The counterpart in the worker is `num_rejected` in `Searches.decide`.
    """
    for request_id, tokens in zip(output.req_ids, output.sampled_token_ids, strict=False):
        if tokens:
            continue
        request = scheduler.requests.get(request_id)
        if request is None or request.is_finished() or request.is_prefill_chunk or not wants(request.sampling_params):
            continue
        request.num_computed_tokens -= 1 + len(step.scheduled_spec_decode_tokens.get(request_id, ()))
