# SPDX-License-Identifier: Apache-2.0
import pytest

from vllm_spec_plugins import compiled


@pytest.fixture(params=["loops", "tensors"])
def on_both_paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled loops of the CPU, then the tensor code that every other device runs."""
    monkeypatch.setattr(compiled, "use_loops", request.param == "loops")
