# SPDX-License-Identifier: Apache-2.0
"""The proposer in vLLM's speculator seat, and how its nodes get to the scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu.async_utils import async_copy_to_np
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator
from vllm.v1.worker.gpu.spec_decode.utils import DraftTokensHandler
from vllm.v1.worker.gpu.states import RequestState

from vllm_spec_plugins.cascade.routes import Routes
from vllm_spec_plugins.compiled import loops_for
from vllm_spec_plugins.config import Settings
from vllm_spec_plugins.engine import cascade, weights
from vllm_spec_plugins.engine.device_drafter import DeviceDrafter
from vllm_spec_plugins.engine.drafter import Drafter, PagedDraft
from vllm_spec_plugins.engine.scheduling import TreeDraftTokenIds
from vllm_spec_plugins.engine.shallow import ShallowDraft
from vllm_spec_plugins.engine.state import TreeState, Verified
from vllm_spec_plugins.layers.exit_policy import ExitPolicy
from vllm_spec_plugins.layers.planner import Planner
from vllm_spec_plugins.method import Surroundings
from vllm_spec_plugins.proposers.base import Counting, Deferring, StepContext
from vllm_spec_plugins.registry import method_of
from vllm_spec_plugins.tree.accept import Acceptance, AcceptRule, TargetRows
from vllm_spec_plugins.tree.tree import TokenTree


class TreeSpeculator(BaseSpeculator):
    """Asks the proposer for the next trees after every step."""

    supports_mm_inputs = False
    draft_logits = None

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, req_states: RequestState, settings: Settings
    ) -> None:
        method = method_of(settings)
        assert method.proposer is not None
        self.hidden_size, self.dtype = vllm_config.model_config.get_hidden_size(), vllm_config.model_config.dtype
        self.req_states = req_states
        self.drafters: list[PagedDraft] = []

        def draft(model: str, nodes: int) -> PagedDraft:
            kind = Drafter if loops_for(req_states.total_len.gpu) else DeviceDrafter
            self.drafters.append(kind(vllm_config, model, len(self.drafters), req_states, nodes))
            return self.drafters[-1]

        def shallow(planner: Planner, policy: ExitPolicy | None, judges: bool) -> PagedDraft:
            self.drafters.append(ShallowDraft(vllm_config, req_states, planner, policy, judges))
            return self.drafters[-1]

        # Placeholders of an asynchronous step are computed whatever they are: they must be tokens.
        self.fixed_shape = bool(vllm_config.scheduler_config.async_scheduling)
        self.proposer = method.proposer(
            settings,
            Surroundings(
                max_requests=req_states.max_num_reqs,
                max_model_len=req_states.max_model_len,
                vocab_size=req_states.vocab_size,
                eos_token_ids=_eos_token_ids(vllm_config),
                device=device,
                dtype=vllm_config.model_config.dtype,
                weights=lambda model: weights.tensors(model, vllm_config.load_config),
                draft=draft,
                shallow=shallow,
                num_layers=vllm_config.model_config.get_total_num_hidden_layers(),
            ),
        )
        if self.proposer.num_nodes != vllm_config.num_speculative_tokens:
            raise RuntimeError(
                f"proposer {self.proposer.name} makes trees of {self.proposer.num_nodes} nodes, "
                f"the engine was set up for {vllm_config.num_speculative_tokens}"
            )
        self.no_tree = torch.full(
            (req_states.max_num_reqs, self.proposer.num_nodes), -1, dtype=torch.int64, device=device
        )
        self.state = TreeState(
            req_states.max_num_reqs,
            self.proposer.num_nodes,
            self.proposer.max_depth,
            device,
            on_new_request=self._add_request,
            reads_draws=self.proposer.reads_draws,
            routes=cascade.routes(settings, req_states.max_num_reqs, device),
        )
        cast("Any", req_states).tree_state = self.state
        cast("Any", req_states).speculator = self

    def _add_request(self, slot: int, prompt_len: int, computed: int) -> None:
        self.proposer.add_request(slot, prompt_len)
        for drafter in self.drafters:
            drafter.add_request(slot, computed)

    @torch.inference_mode()
    def warm(self, rule: AcceptRule) -> Acceptance:
        """Compile the loops or the kernels of a step before the first request waits for them: one request proposes, and `rule`
        accepts nothing. What row 0 remembers of it is cleared when a request moves in; K/V goes to vLLM's null block.
        """
        device, host = self.state.tokens.device, np.zeros(1, dtype=np.int64)
        slots, one = (torch.full((1,), number, dtype=torch.int64, device=device) for number in (0, 1))
        verified = self._nothing_verified(slots, torch.zeros(1, 1, dtype=torch.int64, device=device))
        emitted = torch.full((1,), int(bool(self.drafters)), dtype=torch.int32, device=device)
        if not loops_for(slots):
            emitted = emitted.long()
        tokens = self.req_states.all_token_ids.gpu
        # Again with what the first has left behind: a draft model then has nodes that might have come true.
        for _ in range(1 if loops_for(slots) else 2):
            context = StepContext(slots, tokens, one, 1, emitted, verified.drawn, verified.tree)
            if self.proposer.reads_hidden:
                context.hidden = torch.zeros(1, self.hidden_size, dtype=self.dtype, device=device)
            context.likeliest = lambda logits, request, place, count: self.state.likeliest(
                logits, torch.zeros_like(request), host, place, count
            )
            for drafter in self.drafters:
                drafter.stepped(host, host + 1)
                drafter.asked(host)
            self.proposer.propose(context)
        self.state.begin_step(slots, host + 1)
        assert self.state.trees is not None
        acceptance = rule(self.state.trees.tree, verified.drawn, self._nothing_computed(slots))
        self.state.end_step()
        return acceptance

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Whether draft models' passes are captured too. Caches are made anew after this call: graphs of the old ones go."""
        self.captures = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        for drafter in self.drafters:
            drafter.release()

    def capture(self) -> None:
        """Draft models' passes; all else that proposes runs between the graphs."""
        if self.captures:
            for drafter in self.drafters:
                drafter.capture(2 + self.proposer.max_depth)  # as they count: see `_tell_drafters`

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, Tensor],
        last_hidden_states: Tensor,
        aux_hidden_states: list[Tensor] | None,
        num_sampled: Tensor,
        num_rejected: Tensor,
        last_sampled: Tensor,
        next_prefill_tokens: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> Tensor:
        """[B, N] int64 draft tokens; absent nodes are -1, or token 0 where placeholders must be tokens."""
        slots = input_batch.idx_mapping
        if dummy_run:
            for drafter in self.drafters:
                drafter.warm(input_batch.num_tokens)
            return self.state.tokens.new_zeros(len(slots), self.proposer.num_nodes)
        if self.drafters and not loops_for(slots):
            self._tell_drafters(input_batch)
        if num_speculative_tokens == 0 and not self.proposer.remembers:
            self.state.end_step()
            return self._as_tokens(self.no_tree[: len(slots)])
        verified, ends = None, None
        if self.proposer.reads_hidden:
            ends = self._ends(input_batch)
        if self.proposer.reads_draws:
            verified = self.state.verified or self._nothing_verified(slots, last_sampled)
        # Every request can have grown by one token beyond what it computed; of a prompt all is known from the start.
        max_length = int(input_batch.seq_lens_cpu_upper_bound.numpy()[: input_batch.num_reqs].max()) + 1
        if input_batch.has_prefill:
            max_length = max(max_length, int(input_batch.prefill_len_np.max()))
        if not loops_for(slots):
            slots, num_sampled = slots.long(), num_sampled.long()
        context = StepContext(
            slots=slots,
            token_ids=self.req_states.all_token_ids.gpu,
            lengths=self.req_states.total_len.gpu[slots].long(),
            max_length=min(max_length, self.req_states.max_model_len),
            num_emitted=num_sampled,
            drawn=verified.drawn if verified else None,
            tree=verified.tree if verified else None,
            hidden=None if ends is None else last_hidden_states[ends],
            likeliest=partial(self._likeliest, input_batch),
            budget=num_speculative_tokens,
            deferring=None if self.state.routes is None else self._deferring(input_batch, self.state.routes),
        )
        others = self.state.searches.others(input_batch.idx_mapping_np)
        if others is None:
            tree = self.proposer.propose(context)
        else:
            tree = self._beside_searches(context, input_batch, others)
        self.state.end_step()
        self.state.store(slots, tree)
        # To the handler, which is given the same batch. An asynchronous scheduler asks it about grammars alone.
        if not self.fixed_shape or input_batch.has_structured_output_reqs:
            cast("Any", input_batch).tree, cast("Any", input_batch).tree_counts = tree, self._take_counts()
        return self._as_tokens(tree.tokens)

    def _as_tokens(self, tokens: Tensor) -> Tensor:
        """`tokens` as they may be computed: token 0 where there is no node. On a CPU with synchronous scheduling such a row never
        is; elsewhere vLLM's warm-up schedules all rows, whatever was proposed, and asynchronous scheduling always does.
        """
        return tokens.clamp(min=0) if self.fixed_shape or tokens.device.type != "cpu" else tokens

    def _tell_drafters(self, batch: InputBatch) -> None:
        """What the host knows of the step: who ran, and how many of its tokens can be kept at most."""
        drafts = batch.num_draft_tokens_per_req
        most = batch.num_scheduled_tokens.astype(np.int64)
        if drafts is not None:
            most += np.minimum(drafts, self.proposer.max_depth) - drafts
        for drafter in self.drafters:
            drafter.stepped(batch.idx_mapping_np, most)
            drafter.asked(batch.idx_mapping_np)

    def _beside_searches(self, context: StepContext, batch: InputBatch, others: np.ndarray) -> TokenTree:
        """The proposer's trees for requests `others` [n] of the batch, candidates for those of contrastive search, of which
        it never hears.
        """
        tokens = self.no_tree[: batch.num_reqs].clone()
        parents, gain = torch.zeros_like(tokens), torch.zeros(batch.num_reqs, device=tokens.device)
        confidence = None if context.deferring is None else torch.zeros(tokens.shape, device=tokens.device)
        if len(others):
            index = async_tensor_h2d(others, tokens.device)
            for drafter in self.drafters:
                drafter.asked(batch.idx_mapping_np[others])
            tree = self.proposer.propose(context.take(index))
            tokens[index], parents[index] = tree.tokens, tree.parents
            if confidence is not None and tree.confidence is not None:
                confidence[index] = tree.confidence
            gain[index] = (tree.num_nodes if tree.gain is None else tree.gain).to(gain.dtype)
        self.state.searches.store(tokens, batch.idx_mapping_np)
        return TokenTree(tokens, parents, self.proposer.max_depth, gain, confidence=confidence)

    def _take_counts(self) -> list[Tensor]:
        """Integers [n] on the device, in the order of `Method.counts`."""
        taken = [self.proposer.take_counts()] if isinstance(self.proposer, Counting) else []
        if self.state.lossy is not None:
            taken.append(self.state.lossy)
            self.state.lossy = torch.zeros_like(self.state.lossy)
        return taken

    def _ends(self, batch: InputBatch) -> Tensor:
        """[B] int64: the row of the batch that drew each request's last token."""
        first = batch.logits_indices[batch.cu_num_logits[:-1].long()]
        if self.state.verified is None:
            return first
        acceptance = self.state.verified.acceptance
        path = torch.nn.functional.pad(acceptance.path, (1, 0))
        return first + path.gather(1, acceptance.num_accepted.unsqueeze(1)).squeeze(1)

    def _likeliest(
        self, batch: InputBatch, logits: Tensor, request: Tensor, place: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """`StepContext.likeliest`."""
        rows = batch.idx_mapping[request]
        position = self.req_states.total_len.gpu[rows].long() - 1 + place
        return self.state.likeliest(logits, rows, batch.idx_mapping_np, position, count)

    def _deferring(self, batch: InputBatch, routes: Routes) -> Deferring:
        """`StepContext.deferring`."""
        rows, slots = batch.idx_mapping, batch.idx_mapping_np
        return Deferring(
            lambda logits, request: self.state.confidence_of(logits, rows[request], slots),
            lambda confidence, request: routes.stands(confidence, rows[request]),
        )

    def _nothing_computed(self, slots: Tensor) -> TargetRows:
        """The target's row at the root of one request, where every token is as likely as any other."""
        logits = torch.zeros(1, self.req_states.vocab_size, device=slots.device)
        index = torch.full((1, self.proposer.num_nodes + 1), -1, dtype=torch.int64, device=slots.device)
        index[:, 0] = 0
        threshold = None if self.state.routes is None else self.state.routes.thresholds(slots)
        return TargetRows(logits, index, slots > 0, threshold=threshold)

    def _nothing_verified(self, slots: Tensor, last_sampled: Tensor) -> Verified:
        """A step without trees: each request drew one token, at its root."""
        nodes = self.proposer.num_nodes
        drawn = torch.full((len(slots), nodes + 1), -1, dtype=torch.int64, device=slots.device)
        drawn[:, 0] = last_sampled.view(-1)[slots]
        none = torch.zeros_like(slots)
        path = drawn.new_zeros(len(slots), self.proposer.max_depth)
        tree = TokenTree.empty(len(slots), nodes, slots.device, self.proposer.max_depth)
        return Verified(tree, drawn, Acceptance(path, none, drawn[:, :1], none + 1))


class TreeDraftsHandler(DraftTokensHandler):
    """Tells the scheduler how many nodes each tree has, so that no row is computed for an absent node, and for requests
    with a grammar which ones, and their parents.
    """

    tree: TokenTree | None = None
    counts: Sequence[Tensor] = ()
    # Number of nodes [B], expected gain [B], and `counts`, on their way from the device; None: they are on the host.
    copied: list[np.ndarray] | None = None

    def set_draft_tokens(self, input_batch: InputBatch, draft_tokens: Tensor) -> None:
        self.tree, self.width = getattr(input_batch, "tree", None), draft_tokens.shape[1]
        if self.tree is not None and input_batch.has_structured_output_reqs:
            # Both in the one copy that is made in this case.
            draft_tokens = torch.cat((self.tree.tokens[:, : self.width], self.tree.parents[:, : self.width]), 1)
        super().set_draft_tokens(input_batch, draft_tokens)
        self.counts = getattr(input_batch, "tree_counts", ())
        if self.tree is not None and not draft_tokens.is_cpu:
            self._copy(self.tree.num_nodes, _gain(self.tree), *self.counts)

    def _copy(self, *tensors: Tensor) -> None:
        """Beside what the device does next, as vLLM copies drafts; `copy_event` tells when all is there."""
        self.copy_stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.copy_stream):
            self.copied = [async_copy_to_np(tensor) for tensor in tensors]
            for tensor in tensors:
                tensor.record_stream(self.copy_stream)
            self.copy_event.record()

    def get_draft_tokens(self) -> DraftTokenIds | None:
        drafts = super().get_draft_tokens()
        if drafts is None or self.tree is None:
            return drafts
        num_nodes: Tensor | np.ndarray
        expected: Tensor | np.ndarray
        counted: Sequence[Tensor | np.ndarray]
        if self.copied is None:
            num_nodes, expected, counted = self.tree.num_nodes, _gain(self.tree), self.counts
        else:
            self.copy_event.synchronize()
            num_nodes, expected, *counted = self.copied
        given, present = drafts.draft_token_ids, [min(count, self.width) for count in num_nodes.tolist()]
        tokens = [ids[:count] for ids, count in zip(given, present, strict=True)]
        gain, counts = expected.tolist(), [count for each in counted for count in each.tolist()]
        if self.draft_tokens_np is None:
            return TreeDraftTokenIds(drafts.req_ids, tokens, gain, counts=counts)
        parents = [ids[self.width : self.width + count] for ids, count in zip(given, present, strict=True)]
        return TreeDraftTokenIds(drafts.req_ids, tokens, gain, parents, counts)


def _gain(tree: TokenTree) -> Tensor:
    """[B], how many nodes of each tree its proposer expects to be accepted."""
    return tree.num_nodes if tree.gain is None else tree.gain


def _eos_token_ids(vllm_config: VllmConfig) -> tuple[int, ...]:
    ids = getattr(vllm_config.model_config.hf_text_config, "eos_token_id", None)
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)
