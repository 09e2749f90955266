# SPDX-License-Identifier: Apache-2.0
import os
import random

import pytest
import torch


@pytest.fixture
def rng() -> torch.Generator:
    """A generator whose seed is printed when the test fails; SEED=... repeats a run."""
    seed = int(os.environ.get("SEED", random.randrange(1 << 30)))
    print(f"SEED={seed}")
    return torch.Generator().manual_seed(seed)
