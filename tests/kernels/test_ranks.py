# SPDX-License-Identifier: Apache-2.0
"""Counts of ranks: the kernels count what the compiled loops and the tensor code count."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.kernels.cases import Cases
from tests.kernels.guarded import Guarded
from vllm_spec_plugins import compiled
from vllm_spec_plugins.kernels import ranks as kernel
from vllm_spec_plugins.tree.ranks import Ranks

KEEP = float(np.float32(1.0) - np.float32(1.0 - Ranks.MEMORY))


def test_counts_and_chances_are_those_of_the_plain_versions(
    cases: Cases, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for draw in cases(kernel._judge_kernel, kernel._together_kernel, kernel._chances_kernel):
        depth, per_depth, batch = draw.number(1, 5), draw.number(1, 11), draw.number(1, 9)
        requests, memory = draw.number(9, 11), Guarded(rng)
        looped, plain = (Ranks(requests, depth, per_depth, torch.device("cpu")) for _ in range(2))
        seen = torch.randint(300, plain.seen.shape, generator=rng).float()
        hits = (seen * torch.rand(plain.hits.shape, generator=rng)).floor()
        for each in (looped, plain):
            each.seen.copy_(seen)
            each.hits.copy_(hits)
        ours = [memory.holding(each) for each in (plain.offered, plain.offered_at, plain.hits, plain.seen)]
        token_ids = torch.randint(per_depth + 1, (requests, 30), generator=rng, dtype=torch.int32)
        slots = torch.randperm(requests, generator=rng)[:batch]
        lengths = torch.randint(8, 30, (batch,), generator=rng)
        emitted = torch.randint(depth + 3, (batch,), generator=rng)
        candidates = torch.rand(batch, depth, per_depth, generator=rng).argsort(2)
        candidates[torch.rand(batch, depth, generator=rng) < 0.2] = -1
        at = lengths - emitted - (torch.rand(batch, generator=rng) < 0.3).long()  # some are too late
        for each in (looped, plain):
            monkeypatch.setattr(compiled, "use_loops", each is looped)
            each.offer(slots, at, candidates)
            each.observe(SimpleNamespace(slots=slots, token_ids=token_ids, lengths=lengths, num_emitted=emitted))
        ours[0][slots], ours[1][slots] = candidates, at
        kernel.judge(*ours, slots, token_ids, lengths, emitted, KEEP)
        out = memory((batch, depth, per_depth), torch.float32)
        chance = kernel.rank_chances(ours[2], ours[3], slots, plain.first, Ranks.PRIOR, out)
        for each in (looped, plain):
            monkeypatch.setattr(compiled, "use_loops", each is looped)
            assert torch.equal(ours[0][slots], each.offered[slots])
            torch.testing.assert_close(ours[2], each.hits, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(ours[3], each.seen, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(chance, each.chance(slots), rtol=1e-5, atol=1e-7)
        memory.assert_untouched()


def test_a_candidate_that_was_right_is_seen(rng: torch.Generator) -> None:
    """The control: the same step with another token emitted leaves other counts."""
    token_ids, slot = torch.full((1, 9), 7, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    hits = []
    for offered in (7, 6):
        ranks = Ranks(1, 1, 1, torch.device("cpu"))
        ranks.offer(slot, torch.tensor([4]), torch.tensor([[[offered]]]))
        state = ranks.offered, ranks.offered_at, ranks.hits, ranks.seen
        kernel.judge(*state, slot, token_ids, torch.tensor([5]), torch.tensor([1]), KEEP)
        hits.append(ranks.hits.flatten().tolist())
    assert hits == [[1.0, 1.0], [0.0, 0.0]]
