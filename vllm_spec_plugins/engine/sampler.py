# SPDX-License-Identifier: Apache-2.0
"""Verification: the target draws at every row of the trees, the rule chooses the path, the tokens go out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS, SamplingStates

from vllm_spec_plugins.cascade.rules import largest
from vllm_spec_plugins.compiled import loops_for
from vllm_spec_plugins.engine.state import StepTrees, TreeState, Verified
from vllm_spec_plugins.tree.accept import Acceptance, AcceptRule, TargetRows, Walk
from vllm_spec_plugins.tree.tree import TokenTree


class TreeVerifier:
    """Stands where vLLM has its rejection sampler; called when some request of the batch has drafts."""

    # vLLM's own way to verify fewer drafts; its warm-up on a GPU asks for it.
    enable_adaptive_verification = False

    def __init__(self, sampler: Sampler, state: TreeState, rule: AcceptRule) -> None:
        self.sampler, self.state, self.rule = sampler, state, rule
        if not rule.lossless:
            state.lossy = torch.zeros(1, dtype=torch.int64, device=state.tokens.device)

    def __call__(
        self,
        logits: Tensor,
        input_batch: InputBatch,
        draft_logits: Tensor | None = None,
        invalid_drafts: Tensor | None = None,
    ) -> SamplerOutput:
        """Draw, walk, report.

        Args:
            logits: [L, V], request by request, the root's row first; grammar masks are applied already.
            invalid_drafts: [L] bool, rows behind the last node that the scheduler took a grammar to.
        """
        trees = self.state.trees
        assert trees is not None, "verification without trees: preprocess_state did not run"
        tree = trees.tree
        local = input_batch.expanded_local_pos.long()
        if invalid_drafts is not None:
            tree = _without_invalid(tree, trees.request, local, invalid_drafts)
        num_nans = get_num_nans(logits) if self.sampler.compute_nans else None
        processed, position = self._process(logits, input_batch, trees, local)
        if self._walks_alone(processed):
            drawn = self._draw_reached(processed, position, tree, input_batch, trees)
        else:
            drawn, processed = self._draw_all(processed, position, input_batch, trees, local)
        target = self._target(processed, input_batch, trees, local) if self.rule.needs_target else None
        acceptance = self.rule(tree, drawn, target)
        if self.state.routes is not None:
            self.state.routes.observe(input_batch.idx_mapping, tree, drawn, acceptance)
        self.state.verified = Verified(tree, drawn, acceptance)
        if self.state.lossy is not None:
            self.state.lossy += undrawn(acceptance, drawn)

        logprobs = self._logprobs(logits, processed, input_batch, acceptance, trees, local)
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            acceptance.num_emitted.to(torch.int32),
            input_batch.seq_lens,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            self.sampler.req_states.prefill_len.gpu,
        )
        return SamplerOutput(
            sampled_token_ids=acceptance.emitted,
            logprobs_tensors=logprobs,
            num_nans=num_nans,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    def _walks_alone(self, processed: Tensor) -> bool:
        """Whether rows are drawn one after the other as the walk comes by: no device waits, and nobody else asks."""
        only_the_walk = isinstance(self.rule, Walk) and not self.state.reads_draws
        return only_the_walk and loops_for(processed) and not self.sampler.use_fp64_gumbel

    def _process(self, logits: Tensor, batch: InputBatch, trees: StepTrees, local: Tensor) -> tuple[Tensor, Tensor]:
        """What plain decoding would draw from at each row, [L, V], but for top-k and top-p; and each row's position."""
        sampler = self.sampler
        position = batch.positions[batch.logits_indices]
        if trees.branched:
            position = position + trees.tree.depth[trees.request, local] - local
        input_ids = batch.input_ids[batch.logits_indices]
        rows = (batch.expanded_idx_mapping, position, input_ids, batch.expanded_local_pos)
        seq_lens = batch.seq_lens_cpu_upper_bound.numpy()
        keep = None
        if trees.branched and self._reads_history(batch.idx_mapping_np):
            line, keep, depth = chain_layout(trees, batch.cu_num_logits, local)
            logits = logits[line]
            rows = (*(row[line] for row in rows[:3]), depth.to(torch.int32))
        slot, at, token, behind = rows
        processed = sampler.apply_sampling_params(
            logits, slot, batch.idx_mapping, batch.idx_mapping_np, at, token, behind, seq_lens, skip_top_k_top_p=True
        )
        return (processed if keep is None else processed[keep]), position

    def _draw_all(
        self, processed: Tensor, position: Tensor, batch: InputBatch, trees: StepTrees, local: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draw at every row, with the noise that plain decoding has at its position.

        Returns [B, N + 1] int64, -1 where there is no row, and the logits after top-k and top-p.
        """
        sampler = self.sampler
        top_k, top_p = sampler.sampling_states.get_top_k_top_p(batch.expanded_idx_mapping, batch.idx_mapping_np)
        sampled, processed = sampler._sample_random(
            processed, batch.expanded_idx_mapping, batch.idx_mapping_np, position, top_k, top_p, use_fused_sampler=False
        )
        rows = trees.tree.tokens.shape[1] + 1
        drawn = torch.full((batch.num_reqs, rows), -1, dtype=torch.int64, device=processed.device)
        drawn[trees.request, local] = sampled
        return drawn, processed

    def _draw_reached(
        self, processed: Tensor, position: Tensor, tree: TokenTree, batch: InputBatch, trees: StepTrees
    ) -> Tensor:
        """Draw where the walk comes by and nowhere else: the same draws, of which most trees need few."""
        from vllm_spec_plugins.cpu.kernels.reached import draw_reached

        states = self.sampler.sampling_states
        top_k, top_p = states.get_top_k_top_p(batch.expanded_idx_mapping, batch.idx_mapping_np)
        slots = batch.idx_mapping_np
        return draw_reached(
            processed,
            tree,
            trees.num_rows,
            states.temperature.np[slots],
            states.seeds.np[slots],
            position,
            top_k,
            top_p,
        )

    def _target(self, processed: Tensor, batch: InputBatch, trees: StepTrees, local: Tensor) -> TargetRows:
        """What the target computed at the trees' rows, for a rule that asks."""
        index = torch.full_like(trees.tree.depth, -1)
        index[trees.request, local] = torch.arange(len(local), device=local.device)
        temperature = self.sampler.sampling_states.temperature.gpu
        routes = self.state.routes
        threshold = None if routes is None else routes.thresholds(batch.idx_mapping)
        return TargetRows(processed, index, temperature[batch.idx_mapping] == 0, threshold=threshold)

    def _reads_history(self, slots: np.ndarray) -> bool:
        """Whether a processor of these requests looks at the drafts before a row (they take the rows for a chain)."""
        _, penalties, bad_words, *custom = self.sampler.logits_processors
        thinking = self.sampler.thinking_budget_state
        return bool(
            custom
            or penalties.use_penalty[slots].any()
            or bad_words.num_bad_words.np[slots].any()
            or (thinking.enabled and thinking.use_thinking_budget[slots].any())
        )

    def _logprobs(
        self,
        logits: Tensor,
        processed: Tensor,
        batch: InputBatch,
        acceptance: Acceptance,
        trees: StepTrees,
        local: Tensor,
    ) -> LogprobsTensors | None:
        """Log-probabilities of the emitted tokens, each from the row that drew it, in vLLM's flat layout."""
        most = self.sampler.sampling_states.max_num_logprobs(batch.idx_mapping_np)
        if most == NO_LOGPROBS:
            return None
        mode = self.sampler.logprobs_mode
        source = processed if mode in PROCESSED_LOGPROBS_MODES else logits
        extra = trees.tree.tokens.shape[1] - acceptance.path.shape[1]
        path = pad(acceptance.path, (1, extra))  # [B, N + 1]: the root, the accepted rows, zeros
        emitted = pad(acceptance.emitted, (0, extra), value=-1)
        first = batch.cu_num_logits[:-1].long()[trees.request]
        return compute_topk_scores(
            source[first + path[trees.request, local]],
            most,
            emitted[trees.request, local].clamp(min=0),
            batch.cu_num_logits_np.tolist(),
            logits_mode=mode in ("raw_logits", "processed_logits"),
        )


def likeliest(
    states: SamplingStates,
    coupled: bool,
    logits: Tensor,
    rows: Tensor,
    slots: np.ndarray,
    position: Tensor,
    count: int,
) -> tuple[Tensor, Tensor]:
    """Rank a draft's candidates as the target's sampler would ("coupled children"), best first: tokens [n, K] int64, and
    scores [n, K] float32, logit + temperature * noise.

    Args:
        coupled: with the sampler's noise; else without, for a rule that keeps what is likely, drawn or not.
        logits: [n, V] float32, the draft's; overwritten.
        rows: [n] int32, the request of each line; `slots` are the same requests on the host, once each.
        position: [n] int64, of the row that will draw the token.

    Penalties, bad words and biases are left to the target: they change which tokens it draws, not what is right.
    """
    logits = _filtered(states, logits, rows, slots)
    if not loops_for(logits):
        from vllm_spec_plugins.kernels.coupled_topk import coupled_topk

        heat, seed = states.temperature.gpu, states.seeds.gpu
        return coupled_topk(logits, heat, seed, position, count, rows, scaled=True, coupled=coupled)
    from vllm_spec_plugins.cpu.kernels.noise import gumbel_topk

    index = rows.numpy()
    temperature, seeds = states.temperature.np[index], states.seeds.np[index]
    noisy = temperature if coupled else np.zeros_like(temperature)
    tokens, sums = gumbel_topk(logits.numpy(), noisy, seeds, position.numpy(), count)
    scale = np.where(temperature > 0, temperature, np.float32(1.0))
    return torch.from_numpy(tokens), torch.from_numpy(sums * scale[:, None])


def confidence(states: SamplingStates, logits: Tensor, rows: Tensor, slots: np.ndarray) -> Tensor:
    """[n] float32: the largest probability that a draft's logits [n, V] give, after temperature and filters; as `likeliest`, but
    the logits stay as they are.
    """
    return largest(_filtered(states, logits.clone(), rows, slots))


def _filtered(states: SamplingStates, logits: Tensor, rows: Tensor, slots: np.ndarray) -> Tensor:
    """Logits [n, V] after temperature, min-p, top-k and top-p; overwritten."""
    if not states.temperature.np[slots].any():
        return logits
    states.apply_temperature(logits, rows, slots)
    states.apply_min_p(logits, rows, slots)
    return states.apply_top_k_top_p(logits, rows, slots)


def undrawn(acceptance: Acceptance, drawn: Tensor) -> Tensor:
    """[] int64: accepted tokens that the target had not drawn, [B, N + 1], at the row before them."""
    before = pad(acceptance.path, (1, 0))[:, :-1]
    place = torch.arange(before.shape[1], device=before.device)
    accepted = place < acceptance.num_accepted.unsqueeze(1)
    return (accepted & (acceptance.emitted[:, :-1] != drawn.gather(1, before))).sum()


def _without_invalid(tree: TokenTree, request: Tensor, local: Tensor, invalid: Tensor) -> TokenTree:
    """`tree` without the nodes of invalid rows, the last of each request: what stays is a packed tree."""
    absent = torch.zeros(tree.tokens.shape[0], tree.tokens.shape[1] + 1, dtype=torch.bool, device=local.device)
    absent[request, local] = invalid
    absent = absent[:, 1:]
    tokens, parents = tree.tokens.masked_fill(absent, -1), tree.parents.masked_fill(absent, 0)
    return TokenTree(tokens, parents, tree.max_depth, confidence=tree.confidence)


def chain_layout(trees: StepTrees, cu_num_logits: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lay every row's path out as a chain, for processors that take the rows before a row for its history.

    Row r of depth d becomes D + 1 consecutive lines: its d + 1 path rows (root first) and fill, D = max_depth.

    Returns:
        line: [L * (D + 1)] int64, the logits row behind each line.
        keep: [L] int64, the line that stands for each row.
        depth: [L * (D + 1)] int64, each line's place in its chain; 0 for fill.
    """
    tree = trees.tree
    batch, rows = tree.depth.shape
    width = tree.max_depth + 1
    # path[b, i, k]: the row at depth k above row i.
    place = tree.depth.unsqueeze(1).masked_fill(~tree.ancestors(), width)  # [B, N + 1, N + 1]
    index = torch.arange(rows, device=local.device).expand(batch, rows, rows)
    path = torch.zeros(batch, rows, width + 1, dtype=torch.int64, device=local.device)
    path = path.scatter_(2, place, index)[:, :, :width]

    first = cu_num_logits[:-1].long()[trees.request]  # [L]
    depth = tree.depth[trees.request, local]
    step = torch.arange(width, device=local.device)
    line = first.unsqueeze(1) + path[trees.request, local]
    keep = torch.arange(len(local), device=local.device) * width + depth
    return line.view(-1), keep, step.where(step <= depth.unsqueeze(1), 0).view(-1)
