# SPDX-License-Identifier: Apache-2.0
"""Random logits for the kernels that change, sample and score them."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu import structured_outputs
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample import bad_words, gumbel, logit_bias, logprob, min_p, penalties, prompt_logprob
from vllm.v1.worker.gpu.sample.output import SamplingMaskTensors
from vllm.v1.worker.gpu.sample.thinking_budget import apply_thinking_budget
from vllm.v1.worker.gpu.sample.trace_replay import apply_trace_tokens

from tests.unit.cpu.parity import Draw, Tensor, case, starts

MAX_NUM_REQS = 6
INF = float("inf")


class Rows:
    """Logits rows of a batch: each request has one row and one more per draft."""

    def __init__(self, draw: Draw, vocab_size: int | None = None) -> None:
        self.vocab_size = vocab_size or draw.int(33, 3000)
        states = draw.states(draw.int(1, MAX_NUM_REQS), MAX_NUM_REQS)
        counts = draw.ints(1, 4, len(states))
        self.num_reqs, self.states, self.cu_num_logits = len(states), states, starts(counts)
        self.expanded = states.repeat_interleave(counts)
        self.local = torch.cat([torch.arange(int(n), dtype=torch.int32) for n in counts])
        self.num_rows = len(self.expanded)
        self.logits = draw.floats(self.num_rows, self.vocab_size, scale=3.0)
        self.input_ids = draw.ints(0, self.vocab_size - 1, self.num_rows)
        self.positions = draw.ints(0, 40, self.num_rows, dtype=torch.int64)


@case("sample.gumbel._temperature_kernel")
def temperature(draw: Draw) -> tuple[Any, ...]:
    r = Rows(draw)
    gumbel.apply_temperature(r.logits, r.expanded, draw.choice([0.0, 1.0, 0.7, 1.3], MAX_NUM_REQS))
    return (r.logits,)


@case("sample.min_p._min_p_kernel")
def minimum_probability(draw: Draw) -> tuple[Any, ...]:
    r = Rows(draw)
    r.logits[draw.uniform(0, 1, *r.logits.shape) < 0.1] = -INF
    min_p.apply_min_p(r.logits, r.expanded, draw.choice([0.0, 0.01, 0.3, 1.0], MAX_NUM_REQS))
    return (r.logits,)


@case("sample.gumbel._gumbel_sample_kernel")
def gumbel_max(draw: Draw) -> tuple[Any, ...]:
    r = Rows(draw)
    expanded = r.expanded.clone()
    expanded[draw.uniform(0, 1, r.num_rows) < 0.1] = -1
    logits = r.logits.to((torch.float32, torch.bfloat16)[draw.int(0, 1)])
    logits[draw.uniform(0, 1, *logits.shape) < 0.1] = -INF
    logits[:, 0] = 0.0
    seeds = draw.ints(-(2**62), 2**62, MAX_NUM_REQS, dtype=torch.int64)
    temperatures = draw.choice([0.0, 1.0, 0.7, 1.5], MAX_NUM_REQS)
    drafting, fp64 = draw.flag(), draw.flag()
    cache = column = None
    if draw.flag():
        cache = torch.full((MAX_NUM_REQS, 3, r.vocab_size + 2), -7.0, dtype=logits.dtype)
        # Rows of one request write different columns: which of two writes to one place wins is not defined.
        column = r.local.long() if draw.flag() or r.num_rows > r.num_reqs else torch.tensor(draw.int(0, 2))
        if column.dim():
            expanded[r.local > 2] = -1
            column = column.clamp(max=2)
    sampled = gumbel.gumbel_sample(
        logits, expanded, temperatures, seeds, r.positions, draw.flag(), drafting, cache, column, fp64
    )
    return sampled, cache


@case("sample.penalties._penalties_kernel", "sample.penalties._bincount_kernel")
def penalised(draw: Draw) -> tuple[Any, ...]:
    r = Rows(draw)
    prompt_len = draw.ints(1, 30, MAX_NUM_REQS)
    prefill_len = prompt_len + draw.ints(0, 20, MAX_NUM_REQS)
    tokens = draw.ints(0, r.vocab_size - 1, MAX_NUM_REQS, 64)
    mask = draw.ints(-9, 9, MAX_NUM_REQS, -(-r.vocab_size // 32))
    counts = draw.ints(0, 2, MAX_NUM_REQS, r.vocab_size)
    penalties.bincount(r.states, tokens, prompt_len, prefill_len, mask, counts, int(prefill_len[r.states].max()))
    input_ids = r.input_ids.clone()
    input_ids[draw.uniform(0, 1, r.num_rows) < 0.2] = -1
    penalties.apply_penalties(
        r.logits,
        r.expanded,
        input_ids,
        r.local,
        draw.choice([1.0, 1.2, 0.8], MAX_NUM_REQS),
        draw.choice([0.0, 0.5, -0.4], MAX_NUM_REQS),
        draw.choice([0.0, 0.3, -0.2], MAX_NUM_REQS),
        mask,
        counts,
    )
    return mask, counts, r.logits


@case("sample.bad_words._bad_words_kernel")
def without_bad_words(draw: Draw) -> tuple[Any, ...]:
    r = Rows(draw, vocab_size=40)
    # Three tokens in all, so that prefixes match often, across the border to the drafts too.
    tokens = draw.ints(0, 2, MAX_NUM_REQS, 48)
    lengths = draw.ints(1, 4, MAX_NUM_REQS, 5)
    offsets = torch.cat((torch.zeros(MAX_NUM_REQS, 1, dtype=torch.int64), lengths.long().cumsum(1)), dim=1).int()
    prompt_len = draw.ints(1, 20, MAX_NUM_REQS)
    number = draw.ints(0, 5, MAX_NUM_REQS)
    bad_words.apply_bad_words(
        r.logits,
        r.expanded,
        draw.ints(0, 2, MAX_NUM_REQS, 20),
        offsets,
        number,
        tokens,
        prompt_len,
        prompt_len + draw.ints(0, 20, MAX_NUM_REQS),
        r.input_ids % 3,
        r.local,
        int(number.max()),
    )
    return (r.logits,)


@case("sample.logit_bias._bias_kernel")
def biased(draw: Draw) -> tuple[Any, ...]:
    r = Rows(draw)

    def distinct(columns: int) -> Tensor:
        return torch.stack([draw.states(columns, r.vocab_size) for _ in range(MAX_NUM_REQS)]).int()

    stops = distinct(8)
    if draw.flag():
        # Rows in which only stop tokens are left, as under a grammar that can only end.
        for row in range(0, r.num_rows, 2):
            kept = stops[r.expanded[row]].long()
            saved = r.logits[row, kept].clone()
            r.logits[row] = -INF
            r.logits[row, kept] = saved
            r.logits[row, kept[0]] = -INF
    logit_bias.apply_logit_bias(
        r.logits,
        r.expanded,
        r.positions,
        draw.ints(0, 16, MAX_NUM_REQS) * draw.ints(0, 1, MAX_NUM_REQS),
        distinct(16),
        draw.ints(0, 10, MAX_NUM_REQS),
        distinct(10),
        draw.floats(MAX_NUM_REQS, 10),
        draw.ints(0, 40, MAX_NUM_REQS),
        draw.ints(0, 8, MAX_NUM_REQS),
        draw.ints(0, 1, MAX_NUM_REQS),
        stops,
        draw.flag(),
    )
    return (r.logits,)


@case("sample.logprob._topk_log_softmax_kernel", "sample.logprob._ranks_kernel", tolerance=2e-6)
def logprobs_of_top_tokens(draw: Draw) -> tuple[Any, ...]:
    r = Rows(draw)
    # Not bfloat16: the interpreter compares its bit patterns.
    logits = r.logits.to((torch.float32, torch.float16)[draw.int(0, 1)])
    sampled = draw.ints(0, r.vocab_size - 1, r.num_rows, dtype=torch.int64)
    found = logprob.compute_topk_scores(logits, draw.int(0, 33), sampled)
    return found.logprob_token_ids, found.logprobs, found.selected_token_ranks


@case(
    "sample.logprob._fill_logprob_token_ids_kernel",
    "sample.logprob._topk_log_softmax_kernel",
    "sample.logprob._ranks_kernel",
    tolerance=2e-6,
)
def logprobs_of_named_tokens(draw: Draw) -> tuple[Any, ...]:
    r = Rows(draw)
    state = logprob.LogprobTokenIdsState(MAX_NUM_REQS, torch.device("cpu"))
    state.num_token_ids.gpu.copy_(draw.ints(0, 7, MAX_NUM_REQS) * draw.ints(0, 1, MAX_NUM_REQS))
    state.token_ids.gpu[:, :7] = draw.ints(0, r.vocab_size - 1, MAX_NUM_REQS, 7)
    sampled = draw.ints(0, r.vocab_size - 1, r.num_rows, dtype=torch.int64)
    found = logprob.compute_topk_scores(r.logits, draw.int(0, 9), sampled, None, state, r.expanded, 7)
    return found.logprob_token_ids, found.logprobs, found.selected_token_ranks


@case("sample.prompt_logprob._prompt_logprobs_token_ids_kernel")
def tokens_of_prompt_logprobs(draw: Draw) -> tuple[Any, ...]:
    states = draw.states(draw.int(1, MAX_NUM_REQS), MAX_NUM_REQS)
    lengths = draw.ints(1, 20, len(states))
    computed, tokens = draw.ints(0, 40, MAX_NUM_REQS), draw.ints(0, 999, MAX_NUM_REQS, 64)
    total = int(lengths.sum())
    return (prompt_logprob.get_prompt_logprobs_token_ids(total, starts(lengths), states, computed, tokens),)


@case("sample.output._compact_sampling_mask_kernel")
def sampling_masks(draw: Draw) -> tuple[Any, ...]:
    r = Rows(draw)
    r.logits[draw.uniform(0, 1, *r.logits.shape) < 0.97] = -INF
    r.logits[0, 0] = INF
    counts = r.cu_num_logits.diff()
    num_sampled = (draw.uniform(0, 1, r.num_reqs) * (counts + 1)).int()
    masks = SamplingMaskTensors.from_logits(r.logits, r.cu_num_logits, num_sampled, draw.int(1, 60), 4)
    return masks.token_ids, masks.packed_mask, masks.counts


@case("sample.trace_replay._trace_replay_kernel")
def replayed_traces(draw: Draw) -> tuple[Any, ...]:
    states = draw.states(MAX_NUM_REQS, MAX_NUM_REQS)
    states[draw.uniform(0, 1, MAX_NUM_REQS) < 0.2] = -1
    sampled = draw.ints(0, 99, MAX_NUM_REQS, dtype=torch.int64)
    traces, lengths = draw.ints(100, 199, MAX_NUM_REQS, 20), draw.ints(0, 20, MAX_NUM_REQS)
    prompt_len = draw.ints(1, 9, MAX_NUM_REQS)
    total_len = prompt_len + draw.ints(-1, 20, MAX_NUM_REQS)
    apply_trace_tokens(sampled, states, traces, lengths, total_len, prompt_len)
    return (sampled,)


@case("sample.thinking_budget._update_committed_marker_cache_kernel", "sample.thinking_budget._thinking_budget_kernel")
def thinking_budgets(draw: Draw) -> tuple[Any, ...]:
    r = Rows(draw, vocab_size=40)
    total_len = draw.ints(0, 30, MAX_NUM_REQS)
    if draw.flag():
        total_len += 1500  # a cold scan over more than one block
    tokens = draw.ints(0, 2, MAX_NUM_REQS, 1600)
    if draw.flag():
        tokens[:, 20:] = 9  # markers only far from the end
    caches = [torch.full((MAX_NUM_REQS,), -1, dtype=torch.int32) for _ in range(2)]
    scan = torch.zeros(MAX_NUM_REQS, dtype=torch.int32)
    markers = [draw.ints(0, 2, draw.int(1, 3)) for _ in range(3)]
    budget = draw.choice([-1, 0, 2, 10], MAX_NUM_REQS).int()
    for _ in range(2):  # a cold scan, then one from where it stopped
        apply_thinking_budget(
            r.logits, r.states, r.expanded, budget, tokens, total_len, r.input_ids % 3, r.local, *caches, scan, *markers
        )
        total_len = total_len + draw.ints(0, 3, MAX_NUM_REQS)
    return r.logits, *caches, scan


@case("structured_outputs._apply_grammar_bitmask_kernel")
def grammar_masks(draw: Draw) -> tuple[Any, ...]:
    r = Rows(draw)
    stride = 4
    counts = r.cu_num_logits.diff()
    # Requests without a grammar have no mask; a mask beyond a request's rows is for drafts that were cut.
    requests = draw.states(draw.int(1, r.num_reqs), r.num_reqs)
    places = torch.cat([int(q) * stride + torch.arange(min(stride, int(counts[q]) + 1)) for q in requests]).int()
    words = -(-r.vocab_size // 32)
    masks = draw.ints(-(2**31), 2**31 - 1, len(places), words)
    structured_outputs._apply_grammar_bitmask_kernel[(len(places), -(-r.vocab_size // 8192))](
        r.logits,
        r.logits.stride(0),
        places,
        r.cu_num_logits,
        masks,
        masks.stride(0),
        r.vocab_size,
        MASK_STRIDE=stride,
        BLOCK_SIZE=8192,
    )
    return (r.logits,)


@case("metrics.logits._num_nans_kernel")
def nan_counts(draw: Draw) -> tuple[Any, ...]:
    r = Rows(draw)
    r.logits[draw.uniform(0, 1, *r.logits.shape) < 0.01] = float("nan")
    return (get_num_nans(r.logits),)
