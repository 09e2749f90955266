# SPDX-License-Identifier: Apache-2.0
"""Prompt lookup: the kernels find the places that the compiled loop and the tensor code find."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cases import Cases
from tests.kernels.guarded import Guarded
from vllm_spec_plugins import compiled
from vllm_spec_plugins.kernels import history
from vllm_spec_plugins.proposers.history import LONGEST, SEARCHED, _odds, history_guesses


def test_the_guesses_are_those_of_the_plain_versions(
    cases: Cases, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for draw in cases(history._search_kernel, history._guess_kernel):
        monkeypatch.setattr(history, "SHORTEST", draw.one_of(8, 16, 64))  # often several parts per text
        monkeypatch.setattr(history, "PARTS", draw.number(2, 6))
        guesses, length, long, memory = draw.number(1, 9), draw.number(1, 14), draw.number(8, 90), Guarded(rng)
        batch, requests, vocab = draw.number(1, 4), draw.number(4, 7), draw.one_of(2, 5, 40)
        lengths = torch.randint(1, long - 5, (batch,), generator=rng)
        token_ids = torch.randint(vocab, (requests, long), generator=rng, dtype=torch.int32)
        slots = torch.randperm(requests, generator=rng)[:batch]
        bound = int(lengths.max()) + draw.number(0, 7)
        odds_of = _odds(guesses, torch.device("cpu")).to(draw.one_of(torch.float32, torch.float64))
        shape = (batch, guesses, length)
        out = memory(shape, torch.int64), memory(shape, odds_of.dtype)
        given = token_ids, slots, lengths, bound, guesses, length
        ngrams, odds = history.history_guesses(*given, SEARCHED, odds_of, out)
        for loops in (True, False):
            monkeypatch.setattr(compiled, "use_loops", loops)
            expected = history_guesses(*given)
            assert torch.equal(ngrams, expected[0])
            there = ngrams >= 0
            assert torch.equal(odds[there].float(), expected[1].float()[there])
        assert not odds[ngrams < 0].any()
        memory.assert_untouched()


def test_another_ending_is_seen(rng: torch.Generator) -> None:
    """The control: a changed last token leads elsewhere."""
    text = torch.randint(6, (1, 200), generator=rng, dtype=torch.int32)
    slot, length = torch.zeros(1, dtype=torch.int64), torch.full((1,), 200)
    odds_of = _odds(4, torch.device("cpu"))
    before, _ = history.history_guesses(text, slot, length, 200, 4, 6, SEARCHED, odds_of)
    text[0, -1] = (text[0, -1] + 1) % 6
    after, _ = history.history_guesses(text, slot, length, 200, 4, 6, SEARCHED, odds_of)
    assert not torch.equal(before, after)


def test_a_long_text_is_searched_in_parts_and_compared_as_far_as_the_table_goes(rng: torch.Generator) -> None:
    text = torch.randint(1000, (1, 3000), generator=rng, dtype=torch.int32)
    text[0, -20:] = text[0, 700:720]
    slot, length = torch.zeros(1, dtype=torch.int64), torch.full((1,), 3000)
    ngrams, odds = history.history_guesses(text, slot, length, 3000, 1, 8, SEARCHED, _odds(1, torch.device("cpu")))
    assert ngrams[0, 0].tolist() == text[0, 720:728].tolist()
    assert torch.equal(odds[0, 0], _odds(1, torch.device("cpu"))[0, LONGEST].expand(8))
