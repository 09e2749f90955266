# SPDX-License-Identifier: Apache-2.0
import os
import random

import pytest
import torch

from vllm_spec_plugins import compiled


@pytest.fixture
def rng() -> torch.Generator:
    """A generator whose seed is printed when the test fails; SEED=... repeats a run."""
    seed = int(os.environ.get("SEED", random.randrange(1 << 30)))
    print(f"SEED={seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=["loops", "tensors"])
def on_both_paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled loops of the CPU, then the tensor code that every other device runs."""
    monkeypatch.setattr(compiled, "use_loops", request.param == "loops")
