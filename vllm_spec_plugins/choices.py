# SPDX-License-Identifier: Apache-2.0
"""Fixed trees of Medusa candidates: the text form ``0/0.0/1``, and the original repository's trees by name."""

from __future__ import annotations

from collections.abc import Sequence

Paths = tuple[tuple[int, ...], ...]

# FasterDecoding/Medusa (Apache-2.0), medusa/model/medusa_choices.py, in its order: parents before their children, and the
# nodes worth most first, so that what a budget leaves of a tree is its best part.
PRESETS = {
    "mc_sim_7b_63": (
        "0/0.0/1/0.1/2/0.0.0/1.0/0.2/3/0.3/4/0.4/2.0/0.5/0.0.1/5/0.6/6/0.7/0.1.0/1.1/7/0.8/0.0.2/3.0/0.9/8/9/"
        "1.0.0/0.2.0/1.2/0.0.3/4.0/2.1/0.0.4/0.0.5/0.0.0.0/0.1.1/0.0.6/0.3.0/5.0/1.3/0.0.7/0.0.8/0.0.9/6.0/"
        "0.4.0/1.4/7.0/0.1.2/2.0.0/3.1/2.2/8.0/0.5.0/1.5/1.0.1/0.2.1/9.0/0.6.0/0.0.0.1/1.6/0.7.0"
    ),
    "vicuna_7b_stage1": (
        "0/0.0/1/2/0.1/1.0/3/0.2/4/0.0.0/0.3/5/2.0/0.4/6/0.5/1.1/0.0.1/7/3.0/0.6/8/9/0.1.0/0.7/0.8/4.0/0.0.2/"
        "1.2/0.9/2.1/5.0/1.0.0/0.0.3/1.3/0.2.0/0.1.1/0.0.4/6.0/1.4/0.0.5/2.2/0.3.0/3.1/0.0.6/7.0/1.5/1.0.1/"
        "2.0.0/0.0.7/8.0/0.0.0.0/4.1/0.1.2/0.4.0/9.0/0.2.1/2.3/1.6/0.0.8/0.5.0/3.2/5.1"
    ),
    "vicuna_7b_stage1_ablation": (
        "0/0.0/1/0.0.0/0.1/1.0/2/0.2/0.0.1/3/0.3/0.1.0/2.0/0.0.2/0.4/4/0.0.0.0/1.0.0/1.1/0.0.3/0.2.0/0.5/5/"
        "3.0/0.1.1/0.6/6/0.0.4/1.2/0.0.0.1/4.0/0.0.5/0.7/0.8/0.3.0/0.0.1.0/1.0.1/7/2.0.0/0.0.6/2.1/0.1.2/5.0/"
        "0.2.1/0.9/0.0.0.2/0.4.0/8/1.3/0.0.7/0.1.0.0/1.1.0/6.0/9/0.0.8/0.0.9/0.5.0/0.0.2.0/1.0.2/0.1.3/"
        "0.0.0.3/3.0.0/3.1"
    ),
    "vicuna_7b_stage2": (
        "0/0.0/1/0.1/0.0.0/1.0/2/0.2/0.0.1/0.3/3/0.1.0/2.0/4/0.0.2/0.4/1.1/1.0.0/0.0.0.0/5/0.0.3/0.5/0.2.0/"
        "3.0/0.1.1/0.6/6/0.7/0.0.4/4.0/1.2/0.8/7/0.3.0/0.0.0.1/0.0.5/2.1/0.0.6/1.0.1/0.0.1.0/2.0.0/5.0/0.9/"
        "0.1.2/8/0.4.0/0.2.1/1.3/0.0.7/0.0.0.2/0.0.8/1.1.0/0.1.0.0/6.0/9/0.1.3/0.0.0.3/1.0.2/0.5.0/3.1/"
        "0.0.2.0/7.0/1.4"
    ),
    "vicuna_13b_stage1": (
        "0/0.0/1/0.1/2/1.0/0.0.0/0.2/3/0.3/4/2.0/0.4/0.0.1/0.5/5/1.1/0.1.0/6/0.6/0.0.2/7/3.0/8/0.7/0.8/1.0.0/"
        "0.0.3/4.0/1.2/9/0.9/2.1/0.2.0/0.0.4/1.3/0.1.1/0.0.5/5.0/0.3.0/0.0.0.0/0.0.6/6.0/1.4/2.0.0/0.1.2/3.1/"
        "0.4.0/1.0.1/2.2/0.0.7/1.5/7.0/0.0.8/8.0/0.5.0/0.0.9/0.2.1/1.1.0/0.1.3/4.1/2.3/1.6"
    ),
    "vicuna_13b_stage2": (
        "0/0.0/1/0.0.0/0.1/1.0/2/0.2/0.0.1/0.1.0/3/0.3/2.0/0.0.2/0.0.0.0/0.4/1.0.0/1.1/4/0.0.3/0.5/0.2.0/5/"
        "3.0/0.1.1/0.6/0.0.4/0.0.0.1/0.7/0.0.5/1.2/0.0.1.0/0.3.0/1.0.1/4.0/0.0.6/0.8/2.0.0/0.9/6/7/2.1/5.0/"
        "0.1.2/0.0.0.2/8/0.4.0/0.1.0.0/0.2.1/0.0.7/1.1.0/1.3/0.0.2.0/9/0.0.8/0.5.0/0.0.0.3/0.0.9/0.1.3/1.0.2/"
        "0.0.1.1/3.0.0/1.0.0.0"
    ),
    "vicuna_33b_stage1": (
        "0/1/0.0/2/0.1/3/1.0/4/0.2/5/0.3/0.0.0/6/0.4/2.0/7/1.1/0.5/3.0/8/9/0.6/0.7/0.0.1/1.2/4.0/0.1.0/0.8/"
        "0.9/2.1/0.0.2/5.0/1.3/0.0.3/1.0.0/1.4/6.0/0.2.0/3.1/2.2/0.0.4/7.0/0.1.1/1.5/4.1/0.0.5/0.3.0/9.0/8.0/"
        "1.6/0.0.6/2.3/0.1.2/3.2/0.4.0/2.0.0/1.7/1.0.1/0.0.7/5.1/2.4/0.0.8/0.2.1"
    ),
    "vicuna_33b_stage2": (
        "0/0.0/1/0.1/0.0.0/1.0/2/0.2/0.0.1/0.3/3/0.1.0/2.0/0.4/4/0.0.2/1.1/1.0.0/0.5/5/0.0.0.0/0.0.3/3.0/"
        "0.2.0/0.6/0.1.1/6/0.0.4/0.7/7/1.2/4.0/8/0.3.0/0.0.5/0.0.0.1/0.8/2.1/0.9/1.0.1/2.0.0/0.0.6/5.0/"
        "0.0.1.0/1.3/0.1.2/0.4.0/0.0.7/0.2.1/9/1.1.0/0.0.0.2/6.0/0.0.8/0.1.0.0/7.0/0.1.3/0.5.0/1.4/0.0.9/3.1/"
        "1.0.2/2.2"
    ),
    "zephyr_stage2": (
        "0/0.0/1/0.1/2/0.0.0/1.0/0.2/3/0.3/4/2.0/0.0.1/0.4/5/0.5/0.1.0/1.1/6/0.0.2/3.0/0.6/7/0.7/0.8/0.0.3/"
        "1.0.0/0.9/0.2.0/1.2/4.0/8/9/2.1/0.1.1/0.0.4/0.0.0.0/5.0/0.3.0/1.3/0.0.5/0.0.6/6.0/2.0.0/1.0.1/0.1.2/"
        "0.4.0/1.4/3.1/2.2/0.0.7/7.0/0.2.1/0.0.8/0.1.3/0.5.0/1.5/0.0.9/1.1.0/0.0.0.1/0.0.1.0/4.1/2.3"
    ),
}


def read(value: str | Sequence[Sequence[int]]) -> Paths:
    """Paths of ranks from a preset's name, from text or from lists.

    "0/0.1" and [[0], [0, 1]] are the best token of head 1, and behind it the second of head 2.
    Raises ValueError, with a clause that says what is wrong and what would be valid.
    """
    if isinstance(value, str):
        paths = _from_text(PRESETS.get(value, value))
    else:
        paths = _from_lists(value)
    known = set(paths)
    if len(known) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"has {text([twice])} twice; give every path once")
    for path in paths:
        if path[:-1] and path[:-1] not in known:
            raise ValueError(f"has {text([path])} without {text([path[:-1]])}, which it hangs below; add that path")
    return paths


def text(paths: Sequence[Sequence[int]]) -> str:
    """The text form."""
    return "/".join(".".join(map(str, path)) for path in paths)


def _from_text(value: str) -> Paths:
    paths = [path.split(".") for path in value.split("/")]
    if not all(rank.isascii() and rank.isdecimal() for path in paths for rank in path):
        raise ValueError(f"is neither paths of ranks as 0/0.0/1 nor one of {', '.join(PRESETS)}")
    return tuple(tuple(map(int, path)) for path in paths)


def _from_lists(value: Sequence[Sequence[int]]) -> Paths:
    lists = isinstance(value, list | tuple) and all(isinstance(path, list | tuple) and path for path in value)
    if not value or not lists or not all(type(rank) is int and rank >= 0 for path in value for rank in path):
        raise ValueError("is no list of paths of ranks as [[0], [0, 0], [1]]")
    return tuple(tuple(path) for path in value)
