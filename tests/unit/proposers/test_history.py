# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from vllm_spec_plugins.proposers.history import LATER, LONGEST, REPEATS, SEARCHED, history_guesses


def naive(text, guesses, length):
    """[(tokens, matched)]: all places compared, the best `guesses` by the first SEARCHED tokens, longest match first."""
    found = []
    for place in range(1, len(text)):
        matched = 0
        while matched < min(place, LONGEST) and text[place - 1 - matched] == text[-1 - matched]:
            matched += 1
        if matched:
            found.append((min(matched, SEARCHED), place, matched))
    best = sorted(found, reverse=True)[:guesses]
    best.sort(key=lambda f: (f[2], f[1]), reverse=True)
    copies = []
    for _, place, matched in best:
        copy = list(text)
        for step in range(length):
            copy.append(copy[place + step])  # reads what it wrote: an overlapping copy
        copies.append((copy[len(text) :], matched))
    return copies


@pytest.mark.parametrize(("guesses", "length"), [(1, 1), (4, 12), (7, 4), (40, 3)])
def test_guesses_are_what_followed_the_longest_and_latest_repetitions(guesses, length, rng):
    for vocab in (2, 5, 40):
        lengths = torch.randint(1, 30, (16,), generator=rng)
        token_ids = torch.randint(vocab, (20, 40), generator=rng, dtype=torch.int32)
        slots = torch.randperm(20, generator=rng)[:16]
        bound = int(lengths.max()) + int(torch.randint(8, (1,), generator=rng))
        ngrams, odds = history_guesses(token_ids, slots, lengths, bound, guesses, length)
        for b in range(16):
            text = token_ids[slots[b], : lengths[b]].tolist()
            expected = naive(text, guesses, length)
            assert ngrams[b, : len(expected)].tolist() == [tokens for tokens, _ in expected]
            assert ngrams[b, len(expected) :].eq(-1).all()
            for rank, (_, matched) in enumerate(expected):
                chance = [REPEATS[min(matched + step, LONGEST)] for step in range(length)]
                assert odds[b, rank].tolist() == pytest.approx([c / (1 - c) * LATER**rank for c in chance], rel=1e-5)


def test_a_loop_is_continued_to_the_full_length():
    text = torch.tensor([[9, 4, 5, 6, 4, 5, 6, 4]], dtype=torch.int32)
    ngrams, _ = history_guesses(text, torch.tensor([0]), torch.tensor([8]), 8, 1, 9)
    assert ngrams[0, 0].tolist() == [5, 6, 4, 5, 6, 4, 5, 6, 4]


def test_what_lies_behind_the_text_is_never_read(rng):
    lengths = torch.randint(1, 20, (8,), generator=rng)
    clean = torch.randint(4, (8, 32), generator=rng, dtype=torch.int32)
    dirty = clean.clone()
    behind = torch.arange(32) >= lengths.unsqueeze(1)
    dirty[behind] = torch.randint(4, (int(behind.sum()),), generator=rng, dtype=torch.int32)
    slots = torch.arange(8)
    for bound in (int(lengths.max()), 32):
        a = history_guesses(clean, slots, lengths, int(lengths.max()), 5, 6)
        b = history_guesses(dirty, slots, lengths, bound, 5, 6)
        assert torch.equal(a[0], b[0])
