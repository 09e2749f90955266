# SPDX-License-Identifier: Apache-2.0
"""What every test gets: one thread per process (engines share the cores), no network, and a seed that is printed."""

from __future__ import annotations

import os
import random
from collections import Counter
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

# Before torch is imported anywhere: worker threads that spin cost ten times the work itself on a shared machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


# Files whose few tests take long. Where processes share the files, they must not come last.
LONG = (
    "test_interpreted.py",
    "test_kernels.py",
    "test_lane.py",
    "test_lanes.py",
    "test_parallel.py",
    "test_patches.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, then those with most tests; `--no-loadscope-reorder` leaves it at that."""
    count = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in LONG, -count[item.path]))


@pytest.fixture
def seed() -> int:
    """A fresh seed, shown when the test fails. TEST_SEED=n repeats that run."""
    value = int(os.environ.get("TEST_SEED") or random.SystemRandom().randrange(2**31))
    print(f"TEST_SEED={value}")
    return value


@pytest.fixture
def rng() -> torch.Generator:
    """A generator whose seed is printed when the test fails; SEED=... repeats a run."""
    import torch

    seed = int(os.environ.get("SEED", random.randrange(1 << 30)))
    print(f"SEED={seed}")
    return torch.Generator().manual_seed(seed)
