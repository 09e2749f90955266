# SPDX-License-Identifier: Apache-2.0
"""Which nodes of a draft's tree have come true, and where their K/V goes."""

import numpy as np

from vllm_spec_plugins.tree import loops


def follow(tokens, parents, root, known, most=100, grown_at=None):
    """One request whose root stood at `root`; `known` are its tokens now."""
    text = np.full((1, 120), -1, dtype=np.int32)
    text[0, : len(known)] = known
    request, source, target, seen = loops.follow(
        np.array([tokens]),
        np.array([parents]),
        np.zeros(1, dtype=np.int64),
        np.array([root if grown_at is None else grown_at]),
        np.array([root + 1]),
        np.array([len(known)]),
        text,
        most,
    )
    assert not request.any()
    return list(zip(source.tolist(), target.tolist(), strict=True)), int(seen[0])


# Root at 3; 7 and 8 below it, 9 below 8, 5 below 9, 9 below 7.
TOKENS, PARENTS = [7, 8, 9, 5, 9, -1], [0, 0, 2, 3, 1, 0]


def test_the_path_that_came_true_moves_behind_the_root_and_the_new_root_is_read_anew():
    assert follow(TOKENS, PARENTS, 3, [1, 1, 1, 1, 8, 9, 4]) == ([(5, 4), (6, 5)], 6)
    assert follow(TOKENS, PARENTS, 3, [1, 1, 1, 1, 8, 9]) == ([(5, 4)], 5)


def test_what_stands_in_its_place_is_not_moved():
    assert follow(TOKENS, PARENTS, 3, [1, 1, 1, 1, 7, 9, 4]) == ([(8, 5)], 6)
    assert follow(TOKENS, PARENTS, 3, [1, 1, 1, 1, 7, 2]) == ([], 5)


def test_a_path_ends_at_the_first_token_that_is_no_node():
    assert follow(TOKENS, PARENTS, 3, [1, 1, 1, 1, 8, 7, 9, 5]) == ([(5, 4)], 5)
    assert follow(TOKENS, PARENTS, 3, [1, 1, 1, 1, 2, 7, 9, 5]) == ([], 4)


def test_no_tree_or_one_of_another_root_gives_nothing():
    assert follow(TOKENS, PARENTS, 3, [1, 1, 1, 1, 8, 9, 4], grown_at=-1) == ([], 4)
    assert follow(TOKENS, PARENTS, 3, [1, 1, 1, 1, 8, 9, 4], grown_at=2) == ([], 4)


def test_nodes_that_had_no_slot_are_read_again():
    assert follow(TOKENS, PARENTS, 3, [1, 1, 1, 1, 8, 9, 4], most=6) == ([(5, 4)], 5)
