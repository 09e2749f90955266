# SPDX-License-Identifier: Apache-2.0
"""Lookahead windows: the kernel moves them as the tensor code does, cell by cell."""

from __future__ import annotations

import torch

from tests.kernels.cases import Cases
from tests.kernels.guarded import Guarded
from vllm_spec_plugins.kernels import window as kernel
from vllm_spec_plugins.proposers import StepContext
from vllm_spec_plugins.proposers.window import LookaheadWindow


def test_windows_move_as_the_plain_ones_do(cases: Cases, rng: torch.Generator) -> None:
    for draw in cases(kernel._advance_kernel):
        width, ngram, batch = draw.number(1, 9), draw.number(2, 6), draw.number(1, 5)
        requests, memory, eos = draw.number(5, 7), Guarded(rng), draw.one_of([], [4], [4, 7], [1, 2, 3])
        plain = LookaheadWindow(requests, width, ngram, eos, torch.device("cpu"))
        state = plain.cells, plain.level, plain.start
        # Any state that a window can be in, also one whose tree was cut or never verified.
        plain.cells.copy_(torch.randint(9, plain.cells.shape, generator=rng))
        plain.level.copy_(torch.randint(-1, ngram - 1, (requests,), generator=rng))
        plain.start.copy_(torch.randint(-1, 4, (requests,), generator=rng))
        ours = [memory.holding(each) for each in state]
        slots = torch.randperm(requests, generator=rng)[:batch]
        lengths = torch.randint(1, 40, (batch,), generator=rng)
        emitted = torch.minimum(torch.randint(ngram + 2, (batch,), generator=rng), lengths)
        token_ids = torch.randint(250_000, (requests, 50), generator=rng, dtype=torch.int32)
        drawn = torch.randint(-1, 9, (batch, plain.num_nodes + draw.number(1, 5)), generator=rng)
        context = StepContext(slots, token_ids, lengths, 50, emitted, drawn)
        out = memory((batch, width, ngram), torch.int64), memory((batch, width), torch.int64)
        ngrams, real = kernel.advance(*ours, slots, token_ids, lengths, emitted, drawn, plain._eos, out)
        expected = plain.advance(context)
        assert torch.equal(ngrams, expected[0])
        assert torch.equal(real, expected[1])
        for mine, theirs in zip(ours, state, strict=True):
            assert torch.equal(mine, theirs)
        memory.assert_untouched()


def test_other_draws_are_seen(rng: torch.Generator) -> None:
    """The control: the n-grams end in what was drawn."""
    plain = LookaheadWindow(1, 3, 3, [], torch.device("cpu"))
    plain.level.fill_(1)
    plain.start.fill_(0)
    one = torch.ones(1, dtype=torch.int64)
    token_ids = torch.ones(1, 9, dtype=torch.int32)
    for draw in (5, 6):
        drawn = torch.full((1, 9), draw)
        state = plain.cells.clone(), plain.level.clone(), plain.start.clone()
        ngrams, real = kernel.advance(*state, one - 1, token_ids, one * 9, one, drawn, one[:0])
        assert real.all()
        assert ngrams[0, :, -1].tolist() == [draw] * 3
