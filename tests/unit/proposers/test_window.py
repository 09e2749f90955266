# SPDX-License-Identifier: Apache-2.0
"""The window against the paper's, kept in lists: which token stands in which cell, which n-grams are read off."""

import pytest
import torch

from tests.unit.proposers.simulate import MarkovTarget, from_next_token
from vllm_spec_plugins.proposers import StepContext
from vllm_spec_plugins.proposers.window import LookaheadWindow
from vllm_spec_plugins.tree import TokenTree, Walk


class NaiveWindow:
    """One request. Rows of columns; None = any token of the text."""

    def __init__(self, width, ngram, root):
        self.width, self.depth = width, ngram - 1
        self.rows = [[root] + [None] * (width - 1)]

    def step(self, draws, emitted, eos):
        """`draws`: per column, the token drawn at the last row. Returns the n-grams read off the columns."""
        new = [None if token == eos else token for token in draws]
        ngrams = []
        if len(self.rows) == self.depth:
            ngrams = [[*(row[i] for row in self.rows), new[i]] for i in range(self.width)]
            self.rows = [*self.rows[1:], new]
            left = len(emitted) - 1  # rows moved up by one place, the root moved on by len(emitted)
        else:
            self.rows.append(new)
            left = len(emitted)
        self.rows = [(row[left:] + [None] * self.width)[: self.width] for row in self.rows]
        self.rows[0][0] = emitted[-1]
        return ngrams


def agree(naive, got, text):
    """Equal cell by cell; None stands for a token picked from the text."""
    return len(naive) == len(got) and all(g in text if n is None else n == g for n, g in zip(naive, got, strict=True))


@pytest.mark.parametrize(("width", "ngram"), [(1, 2), (4, 2), (1, 4), (3, 3), (5, 4), (7, 5)])
def test_cells_and_ngrams_are_the_papers(width, ngram, rng):
    vocab, eos, guesses = 9, 4, 3
    model = MarkovTarget(vocab, 2, 0.7, int(torch.randint(1 << 20, (1,), generator=rng)))
    target = from_next_token(model)
    window = LookaheadWindow(2, width, ngram, [eos], torch.device("cpu"))
    window.clear(1)
    text = torch.randint(vocab, (6,), generator=rng).tolist()
    tree, naive, last_draws, drawn, emitted = None, None, [], torch.tensor([[text[-1]]]), 1
    for _ in range(25):
        # A verified tree of a few guesses and the window; the first step has none.
        nodes = guesses + window.num_nodes
        if tree is None:
            tree = TokenTree.empty(1, nodes)
            drawn = torch.nn.functional.pad(drawn, (0, nodes), value=-1)
        token_ids = torch.zeros(2, 200, dtype=torch.int32)
        token_ids[1, : len(text)] = torch.tensor(text)
        slots, length, count = torch.tensor([1]), torch.tensor([len(text)]), torch.tensor([emitted])
        ctx = StepContext(slots, token_ids, length, len(text), count, drawn, tree)
        ngrams, real = window.advance(ctx)
        if naive is None:
            naive, expected = NaiveWindow(width, ngram, text[-1]), []
        else:
            expected = naive.step(last_draws, text[-emitted:], eos)
        assert real.tolist() == [[bool(expected)] * width]
        for column, one in enumerate(expected):
            assert agree(one, ngrams[0, column].tolist(), text)

        size = int(torch.randint(guesses + 1, (1,), generator=rng))
        first = TokenTree(torch.randint(vocab, (1, guesses), generator=rng), torch.zeros(1, guesses, dtype=torch.int64))
        tree = window.append_to(first.truncate(size), torch.tensor([1]), fits=True)
        tree.validate()
        assert int(tree.num_nodes) == size + len(naive.rows) * width - 1
        cells = [text[-1], *tree.tokens[0, size : int(tree.num_nodes)].tolist()]
        assert agree([cell for row in naive.rows for cell in row], cells, text)
        # What the window remembers is what it proposed: where the naive one has a picked token, take it over.
        naive.rows = [cells[r * width : (r + 1) * width] for r in range(len(naive.rows))]

        count = int(tree.num_nodes)
        draws = target(0, text, tree.tokens[0, :count].tolist(), tree.parents[0, :count].tolist())
        drawn = torch.full((1, nodes + 1), -1)
        drawn[0, : count + 1] = torch.tensor(draws)
        last = (len(naive.rows) - 1) * width
        last_draws = [draws[cell + size if cell else 0] for cell in range(last, last + width)]
        kept = Walk()(tree, drawn)
        emitted = int(kept.num_emitted)
        text += kept.emitted[0, :emitted].tolist()


@pytest.mark.parametrize("missing", ["cut", "no window", "not verified", "inside the prompt"])
def test_a_step_whose_window_was_not_computed_leaves_its_rows_and_reads_nothing(missing, rng):
    window = LookaheadWindow(1, 4, 3, [], torch.device("cpu"))
    window.clear(0)
    token_ids = torch.randint(50, (1, 40), generator=rng, dtype=torch.int32)
    slots = torch.tensor([0])

    def advance(length, emitted, tree, drawn):
        ctx = StepContext(slots, token_ids, torch.tensor([length]), length, torch.tensor([emitted]), drawn, tree)
        return window.advance(ctx)

    empty = TokenTree.empty(1, 2)
    nodes = 2 + window.num_nodes
    advance(10, 1, TokenTree.empty(1, nodes), torch.full((1, nodes + 1), -1))
    tree = window.append_to(empty, slots, fits=True)
    full = torch.randint(50, (1, nodes + 1), generator=rng)
    advance(11, 1, tree, full)  # the second row is filled now
    tree = window.append_to(empty, slots, fits=missing != "no window")
    before = window.cells[0].clone()
    if missing == "cut":
        full[0, int(tree.num_nodes)] = -1
    if missing == "not verified":
        full[0, 1:] = -1
    _, real = advance(12, 0 if missing == "inside the prompt" else 1, tree, full)
    assert not real.any()
    before[0, 0] = token_ids[0, 11]
    assert torch.equal(window.cells[0], before)
    assert window.level.tolist() == [1]


def test_the_tokens_picked_for_empty_cells_depend_on_the_text_alone(rng):
    token_ids = torch.randint(50, (3, 40), generator=rng, dtype=torch.int32)
    token_ids[2] = token_ids[0]
    picked = []
    for slot in (0, 2):
        window = LookaheadWindow(3, 5, 4, [], torch.device("cpu"))
        lengths = torch.tensor([25, 30])
        slots = torch.tensor([slot, 1])
        tree = TokenTree.empty(2, window.num_nodes)
        drawn = torch.full((2, window.num_nodes + 1), -1)
        window.advance(StepContext(slots, token_ids, lengths, 30, torch.ones(2).int(), drawn, tree))
        picked.append(window.cells[slot, 0])
    assert torch.equal(*picked)
    assert picked[0][0] == token_ids[0, 24]
    assert len(picked[0].unique()) > 1
