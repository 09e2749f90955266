# SPDX-License-Identifier: Apache-2.0
"""Every place where this package reaches into vLLM: target, reason, check, and what has to happen for it to go.

`FLAG_HOOKS` stand in every process that parses arguments; they do nothing until ``--plugin`` is given. `ENGINE_HOOKS`
are applied when it is. Each replacement falls through to vLLM's own code for an engine without a plugin, so that both
kinds can live in one process. The CPU lane has its own table in cpu/hooks.py.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

from vllm_spec_plugins.engine import activation, flag
from vllm_spec_plugins.engine.settings import is_tree_method, settings_of
from vllm_spec_plugins.hook import Hook
from vllm_spec_plugins.registry import method_of


def _add_cli_args(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(original)
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return flag.add_to(original(parser))

    return add_cli_args


def _from_cli_args(original: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    @functools.wraps(original)
    def from_cli_args(cls: Any, args: argparse.Namespace) -> Any:
        return flag.read(original(cls, args), args)

    return from_cli_args


def _create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        return flag.create_config(self, functools.partial(original, self, *args, **kwargs))

    return create_engine_config


def _use_v2_model_runner(original: Callable[[Any], bool]) -> Callable[[Any], bool]:
    from vllm import envs
    from vllm.platforms import current_platform

    def use_v2_model_runner(self: Any) -> bool:
        if settings_of(self) is not None:
            return True
        # The CPU lane has told vLLM that there is Triton. Another engine of this process gets what it gets without.
        return original(self) and (envs.VLLM_USE_V2_MODEL_RUNNER is True or not current_platform.is_cpu())

    return use_v2_model_runner


def _num_lookahead_tokens(original: Callable[[Any], int]) -> Callable[[Any], int]:
    def num_lookahead_tokens(self: Any) -> int:
        settings = settings_of(self)
        if settings is None or not is_tree_method(self.speculative_config):
            return original(self)
        return method_of(settings).slots(settings)

    return num_lookahead_tokens


def _init_speculator(original: Callable[..., Any]) -> Callable[..., Any]:
    def init_speculator(vllm_config: Any, device: Any, req_states: Any) -> Any:
        settings = settings_of(vllm_config)
        if settings is None:
            return original(vllm_config, device, req_states)
        from vllm_spec_plugins.engine.speculator import TreeSpeculator

        return TreeSpeculator(vllm_config, device, req_states, settings)

    return init_speculator


def _resolve_model_state_cls(original: Callable[..., Any]) -> Callable[..., Any]:
    def resolve_model_state_cls(vllm_config: Any, model: Any) -> Any:
        cls = original(vllm_config, model)
        settings = settings_of(vllm_config)
        if settings is not None and method_of(settings).schedule is not None:
            from vllm_spec_plugins.engine.skipdecode import with_schedule

            return with_schedule(cls)
        if settings is None or vllm_config.speculative_config is None:
            return cls
        from vllm_spec_plugins.engine.model_state import with_trees

        return with_trees(cls)

    return resolve_model_state_cls


def _drafts_handler(original: type) -> type:
    from vllm_spec_plugins.engine.speculator import TreeDraftsHandler

    assert issubclass(TreeDraftsHandler, original)
    return TreeDraftsHandler


def _validate_spec_decode(original: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    def _validate_spec_decode(self: Any, speculative_config: Any) -> None:
        if not is_tree_method(speculative_config):
            original(self, speculative_config)

    return _validate_spec_decode


def _process_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        if settings_of(self.vllm_config) is not None:
            from vllm_spec_plugins.engine import cascade, contrastive, salts

            contrastive.admit(request, self.vllm_config)
            salts.admit(request, self.vllm_config)
            cascade.admit(request, self.vllm_config)
        return request

    return process_inputs


def _sample(original: Callable[[Any, Any, Any, Any], Any]) -> Callable[[Any, Any, Any, Any], Any]:
    def sample(self: Any, hidden_states: Any, input_batch: Any, grammar_output: Any) -> Any:
        sampled = original(self, hidden_states, input_batch, grammar_output)
        state = getattr(self.req_states, "tree_state", None)  # of an engine with a plugin
        if state is not None and state.searches.by_slot:
            acceptance = state.verified and state.verified.acceptance
            state.searches.decide(self.model.compute_logits, hidden_states, input_batch, sampled[0], acceptance)
        return sampled

    return sample


def _add_request(original: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    def add_request(self: Any, request: Any) -> None:
        if settings_of(self.vllm_config) is not None:
            from vllm_spec_plugins.engine import salts

            salts.mark(self, request)
        original(self, request)

    return add_request


def _extra_keys(original: Callable[..., Any]) -> Callable[..., Any]:
    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[Any, int]:
        keys, mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
        salt = getattr(request, "_spec_salt", None)  # of an engine with a schedule of layers
        if salt is not None and end_token_idx > request.num_prompt_tokens:
            keys = (*(keys or ()), salt)
        return keys, mm_idx

    return generate_block_hash_extra_keys


def _schedule(original: Callable[..., Any]) -> Callable[..., Any]:
    def schedule(self: Any, throttle_prefills: bool = False) -> Any:
        step = original(self, throttle_prefills)
        if is_tree_method(self.vllm_config.speculative_config):
            from vllm_spec_plugins.engine import scheduling

            scheduling.scheduled(self, step)
        return step

    return schedule


def _update_draft_token_ids(original: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    def update_draft_token_ids(self: Any, draft_token_ids: Any) -> None:
        if is_tree_method(self.vllm_config.speculative_config):
            from vllm_spec_plugins.engine import cascade, grammar, metrics, scheduling

            metrics.keep_counts(self, draft_token_ids)
            cascade.make_room(self, draft_token_ids)
            scheduling.decline(self, draft_token_ids)
            grammar.remember_parents(self, draft_token_ids)
        original(self, draft_token_ids)

    return update_draft_token_ids


def _update_draft_token_ids_in_output(original: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
    def update_draft_token_ids_in_output(self: Any, draft_token_ids: Any, scheduler_output: Any) -> None:
        if is_tree_method(self.vllm_config.speculative_config):
            from vllm_spec_plugins.engine import grammar

            grammar.remember_parents(self, draft_token_ids)
        original(self, draft_token_ids, scheduler_output)

    return update_draft_token_ids_in_output


def _validate_tokens(original: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    def validate_tokens(self: Any, request: Any, spec_tokens: Any) -> Any:
        if is_tree_method(self.vllm_config.speculative_config) and request.use_structured_output:
            from vllm_spec_plugins.engine import grammar

            return grammar.without_invalid_end(self, request, spec_tokens)
        return original(self, request, spec_tokens)

    return validate_tokens


def _grammar_bitmask(original: Callable[[Any, Any, Any, Any], Any]) -> Callable[[Any, Any, Any, Any], Any]:
    def grammar_bitmask(
        self: Any, requests: Any, structured_output_request_ids: Any, scheduled_spec_decode_tokens: Any
    ) -> Any:
        if is_tree_method(self.vllm_config.speculative_config):
            from vllm_spec_plugins.engine import grammar

            return grammar.bitmask(self, requests, structured_output_request_ids, scheduled_spec_decode_tokens)
        return original(self, requests, structured_output_request_ids, scheduled_spec_decode_tokens)

    return grammar_bitmask


def _update_from_output(original: Callable[..., Any]) -> Callable[..., Any]:
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        ours = is_tree_method(self.vllm_config.speculative_config)
        if ours:
            from vllm_spec_plugins.engine import exchange, scheduling

            scheduling.ran(self, scheduler_output, model_runner_output)
            exchange.keep(self, model_runner_output)
        outputs = original(self, scheduler_output, model_runner_output)
        if ours:
            from vllm_spec_plugins.engine.contrastive import hold_back
            from vllm_spec_plugins.engine.metrics import count_steps_without_drafts, send_counts

            hold_back(self, scheduler_output, model_runner_output)
            count_steps_without_drafts(self.num_spec_tokens, scheduler_output, outputs)
            send_counts(self, outputs)
        return outputs

    return update_from_output


def _execute_model(original: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def execute_model(self: Any, scheduler_output: Any) -> Any:
        if is_tree_method(self.vllm_config.speculative_config):
            self.model_runner.lora_state._spec_drafts = scheduler_output.scheduled_spec_decode_tokens
        output = original(self, scheduler_output)
        if output is None:
            from vllm_spec_plugins.engine.exchange import samples_at_once

            if samples_at_once(self, scheduler_output):
                return self.sample_tokens(None)
        return output

    return execute_model


def _make_lora_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def make_lora_inputs(self: Any, req_ids: Any, idx_mapping: Any, num_scheduled_tokens: Any) -> Any:
        by_request, by_token, active = original(self, req_ids, idx_mapping, num_scheduled_tokens)
        drafts = getattr(self, "_spec_drafts", {})  # of an engine with a plugin
        rows = [1 + len(drafts.get(request, ())) for request in req_ids]
        by_row = tuple(adapter for adapter, count in zip(by_request, rows, strict=True) for _ in range(count))
        return by_row, by_token, active

    return make_lora_inputs


def _sample_tokens(original: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        output = original(self, grammar_output)
        config = self.vllm_config
        if is_tree_method(config.speculative_config) and not config.scheduler_config.async_scheduling:
            from vllm_spec_plugins.engine.exchange import enclose

            enclose(output, self.model_runner)
        return output

    return sample_tokens


def _post_step(original: Callable[[Any, bool], None]) -> Callable[[Any, bool], None]:
    def post_step(self: Any, model_executed: bool) -> None:
        if model_executed and is_tree_method(self.vllm_config.speculative_config):
            from vllm_spec_plugins.engine.exchange import kept

            if (drafts := kept(self.scheduler)) is not None:
                self.scheduler.update_draft_token_ids(drafts)
                return
        original(self, model_executed)

    return post_step


def _observe(original: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    def observe(self: Any, spec_decoding_stats: Any) -> None:
        original(self, spec_decoding_stats)
        if (depth := getattr(self, "_spec_depth", None)) is not None:
            from vllm_spec_plugins.engine.metrics import by_depth

            self.accepted_tokens_per_pos_lists[-1] = by_depth(spec_decoding_stats, depth)
        if (log := getattr(self, "_spec_counts", None)) is not None:
            log.observe(spec_decoding_stats)

    return observe


def _reset(original: Callable[[Any], None]) -> Callable[[Any], None]:
    def reset(self: Any) -> None:
        # vLLM's __init__ calls it first: the engine that is being made is the active one, later ones may draft deeper.
        first = not hasattr(self, "num_drafts")
        original(self)
        if first:
            self._spec_depth = activation.max_depth()
            from vllm_spec_plugins.engine.metrics import CountsLog

            self._spec_counts = CountsLog(activation.counts())
        elif (log := getattr(self, "_spec_counts", None)) is not None:
            log.log()

    return reset


def _prometheus(original: Callable[..., None]) -> Callable[..., None]:
    def __init__(
        self: Any, speculative_config: Any, labelnames: Any, per_engine_labelvalues: Any, is_diffusion: bool = False
    ) -> None:
        original(self, speculative_config, labelnames, per_engine_labelvalues, is_diffusion)
        self._spec_counters = []
        if is_tree_method(speculative_config):
            from vllm_spec_plugins.engine.metrics import counters

            self._spec_counters = counters(activation.counts(), labelnames, per_engine_labelvalues)

    return __init__


def _prometheus_observe(original: Callable[..., None]) -> Callable[..., None]:
    def observe(self: Any, spec_decoding_stats: Any, engine_idx: int = 0) -> None:
        original(self, spec_decoding_stats, engine_idx)
        if found := getattr(self, "_spec_counters", None):
            from vllm_spec_plugins.engine.metrics import counted

            for counter, value in zip(found, counted(spec_decoding_stats) or [0] * len(found), strict=True):
                counter[engine_idx].inc(value)

    return observe


FLAG_HOOKS: tuple[Hook, ...] = (
    Hook(
        target="vllm.engine.arg_utils:EngineArgs.add_cli_args",
        why="--plugin stands in `vllm serve --help` and is parsed there",
        signature="(parser)",
        upstream="goes when vLLM lets a general plugin add arguments",
        replacement=_add_cli_args,
    ),
    Hook(
        target="vllm.engine.arg_utils:EngineArgs.from_cli_args",
        why="the parsed flag is not a field of EngineArgs: it travels in additional_config",
        signature="(cls, args)",
        upstream="goes with add_cli_args",
        replacement=_from_cli_args,
    ),
    Hook(
        target="vllm.engine.arg_utils:EngineArgs.create_engine_config",
        why="settings are checked against the other flags before, and against the model after the config is made",
        signature="(self, usage_context=None, headless=False)",
        upstream="goes when plugins can take part in making the config",
        replacement=_create_engine_config,
    ),
)

ENGINE_HOOKS: tuple[Hook, ...] = (
    Hook(
        target="vllm.config.vllm:VllmConfig.use_v2_model_runner",
        why="an engine with a plugin runs on Model Runner V2, whatever the platform's default",
        signature="(self)",
        upstream="goes when V1 does",
        replacement=_use_v2_model_runner,
    ),
    Hook(
        target="vllm.config.vllm:VllmConfig.num_lookahead_tokens",
        why="a draft model writes K/V of its nodes behind the root: the slots must be there",
        signature="(self)",
        upstream="goes when a proposer from outside can say how far it writes",
        replacement=_num_lookahead_tokens,
    ),
    Hook(
        target="vllm.v1.worker.gpu.model_runner:init_speculator",
        why="a closed if/elif makes the speculator: proposers from outside have no way in",
        signature="(vllm_config, device, req_states)",
        upstream="vLLM issue 36219 asks for it; patches/vllm-0.32.0 has a registry",
        replacement=_init_speculator,
    ),
    Hook(
        target="vllm.v1.worker.gpu.model_states:resolve_model_state_cls",
        why="trees change positions, attention metadata, sampling and K/V commit: a mixin in front of the model's own state",
        signature="(vllm_config, model)",
        upstream="goes when a plugin can wrap a model's state",
        replacement=_resolve_model_state_cls,
    ),
    Hook(
        target="vllm.v1.worker.gpu.model_runner:DraftTokensHandler",
        why="a synchronous scheduler is told N drafts for every request; a tree may have fewer nodes, or none",
        signature="(device=None)",
        upstream="goes when the handler drops -1 at the end, as the grammar path does",
        replacement=_drafts_handler,
    ),
    Hook(
        target="vllm.sampling_params:SamplingParams._validate_spec_decode",
        why="min_p and logit_bias are refused with any speculation; the walk applies them row by row",
        signature="(self, speculative_config)",
        upstream="goes when the check asks the sampler",
        replacement=_validate_spec_decode,
    ),
    Hook(
        target="vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        why="requests of contrastive search and of a cascade are checked where a refusal is an answer, with prompt and final "
        "parameters known",
        signature="(self, request_id, prompt, params, supported_tasks, arrival_time=None, lora_request=None, "
        "tokenization_kwargs=None, trace_headers=None, priority=0, data_parallel_rank=None, resumable=False, "
        "session_id=None, kv_hints=None)",
        upstream="goes when a plugin can check the parameters of a request",
        replacement=_process_inputs,
    ),
    Hook(
        target="vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample",
        why="contrastive search chooses by hidden states, which the sampler is not given",
        signature="(self, hidden_states, input_batch, grammar_output)",
        upstream="goes when the sampler is given hidden states",
        replacement=_sample,
    ),
    Hook(
        target="vllm.v1.core.sched.scheduler:Scheduler.add_request",
        why="requests of an engine with a schedule of layers carry what tells their K/V apart in the prefix cache",
        signature="(self, request)",
        upstream="goes with kv_cache_utils.generate_block_hash_extra_keys",
        replacement=_add_request,
    ),
    Hook(
        target="vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys",
        why="K/V of generated tokens lacks layers: nobody else may find it in the prefix cache",
        signature="(request, start_token_idx, end_token_idx, start_mm_idx)",
        upstream="goes when a plugin can salt the blocks behind the prompt",
        replacement=_extra_keys,
    ),
    Hook(
        target="vllm.v1.core.block_pool:generate_block_hash_extra_keys",
        why="K/V events tell the keys with the hash",
        signature="(request, start_token_idx, end_token_idx, start_mm_idx)",
        upstream="goes with kv_cache_utils.generate_block_hash_extra_keys",
        replacement=_extra_keys,
    ),
    Hook(
        target="vllm.v1.core.sched.scheduler:Scheduler.schedule",
        why="a step's time, from here to its output, tells what drafts cost",
        signature="(self, throttle_prefills=False)",
        upstream="goes when a plugin can decide how many drafts a step verifies",
        replacement=_schedule,
    ),
    Hook(
        target="vllm.v1.core.sched.scheduler:Scheduler.update_draft_token_ids",
        why="drafts that cost more time than they save, or beside a cascade's full requests too much room, are declined or cut "
        "before they are scheduled",
        signature="(self, draft_token_ids)",
        upstream="goes with Scheduler.schedule",
        replacement=_update_draft_token_ids,
    ),
    Hook(
        target="vllm.v1.core.sched.scheduler:Scheduler.update_draft_token_ids_in_output",
        why="asynchronous scheduling hands the drafts over here: their parents are kept for the grammar",
        signature="(self, draft_token_ids, scheduler_output)",
        upstream="goes with StructuredOutputManager.grammar_bitmask",
        replacement=_update_draft_token_ids_in_output,
    ),
    Hook(
        target="vllm.v1.structured_output:StructuredOutputManager.validate_tokens",
        why="drafts are cut at the first one that a grammar forbids, as if they were a chain",
        signature="(self, request, spec_tokens)",
        upstream="goes with StructuredOutputManager.grammar_bitmask",
        replacement=_validate_tokens,
    ),
    Hook(
        target="vllm.v1.structured_output:StructuredOutputManager.grammar_bitmask",
        why="masks advance along the row order: a tree's row must be masked as its path leaves the grammar",
        signature="(self, requests, structured_output_request_ids, scheduled_spec_decode_tokens)",
        upstream="vLLM pull request 41897, open, does it for one backend and trees of one shape",
        replacement=_grammar_bitmask,
    ),
    Hook(
        target="vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
        why="vLLM counts only steps with drafts, so the mean acceptance length would not be the tokens per step",
        signature="(self, scheduler_output, model_runner_output)",
        upstream="goes when steps without drafts are counted",
        replacement=_update_from_output,
    ),
    Hook(
        target="vllm.v1.worker.gpu_worker:Worker.execute_model",
        why="speed: the workers sample when the forward pass is done, without being asked a second time",
        signature="(self, scheduler_output)",
        upstream="goes when vLLM asks once for steps without a grammar",
        replacement=_execute_model,
    ),
    Hook(
        target="vllm.v1.worker.gpu.lora_utils:LoraState.make_lora_inputs",
        why="names an adapter per request for the rows whose logits are computed: with drafts there are more of these",
        signature="(self, req_ids, idx_mapping, num_scheduled_tokens)",
        upstream="goes when it counts the drafts, as the first runner does",
        replacement=_make_lora_inputs,
    ),
    Hook(
        target="vllm.v1.worker.gpu_worker:Worker.sample_tokens",
        why="speed: the drafts travel with the sampled tokens",
        signature="(self, grammar_output)",
        upstream="goes when a step's output has a field for drafts",
        replacement=_sample_tokens,
    ),
    Hook(
        target="vllm.v1.engine.core:EngineCore.post_step",
        why="speed: drafts that came with the sampled tokens are not asked for again",
        signature="(self, model_executed)",
        upstream="goes with Worker.sample_tokens",
        replacement=_post_step,
    ),
    Hook(
        target="vllm.v1.spec_decode.metrics:SpecDecodingLogging.observe",
        why="the log line lists a rate per draft token; a tree has fewer depths than nodes",
        signature="(self, spec_decoding_stats)",
        upstream="goes when a proposer can say how deep it drafts",
        replacement=_observe,
    ),
    Hook(
        target="vllm.v1.spec_decode.metrics:SpecDecodingLogging.reset",
        why="what a proposer or a lossy rule counts gets a line behind vLLM's, after which the figures are reset",
        signature="(self)",
        upstream="goes when a speculator can bring figures of its own",
        replacement=_reset,
    ),
    Hook(
        target="vllm.v1.spec_decode.metrics:SpecDecodingProm.__init__",
        why="and counters of its own",
        signature="(self, speculative_config, labelnames, per_engine_labelvalues, is_diffusion=False)",
        upstream="goes with SpecDecodingLogging.reset",
        replacement=_prometheus,
    ),
    Hook(
        target="vllm.v1.spec_decode.metrics:SpecDecodingProm.observe",
        why="which are counted up here",
        signature="(self, spec_decoding_stats, engine_idx=0)",
        upstream="goes with SpecDecodingLogging.reset",
        replacement=_prometheus_observe,
    ),
)
