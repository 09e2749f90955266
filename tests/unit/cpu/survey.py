# SPDX-License-Identifier: Apache-2.0
"""Registers the lane in a clean process and prints, as JSON, what became of the runner's Triton functions."""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
import warnings
from typing import Any

from vllm_spec_plugins import cpu
from vllm_spec_plugins.cpu import lane
from vllm_spec_plugins.cpu.kernels import KERNELS


def attribute(name: str) -> Any:
    module, _, last = name.rpartition(".")
    return getattr(sys.modules[module], last)


def refusal(function: Any) -> str:
    try:
        function[(1,)](1, BLOCK_SIZE=2)
    except lane.UncoveredKernelError as error:
        return str(error)
    return "launched"


def main() -> None:
    warnings.simplefilter("ignore")
    cpu.install()
    cpu.install()  # a second plugin load changes nothing
    from vllm.platforms import current_platform
    from vllm.triton_utils.dispatcher import KernelOverride

    current_platform.register_triton_kernel_overrides()
    runner = importlib.import_module(lane.V2_RUNNER)
    for module in pkgutil.walk_packages(runner.__path__, lane.V2_RUNNER + "."):
        importlib.import_module(module.name)
    lane.register()  # as after the runner has imported its speculator
    lane.register()
    uncovered = {
        f"{name}.{key}": value
        for name, module in sys.modules.items()
        if name.startswith(lane.V2_RUNNER)
        for key, value in vars(module).items()
        if isinstance(value, lane.Uncovered) and value.func.__module__ == name
    }
    print(
        json.dumps(
            {
                "not_overridden": [name for name in KERNELS if not isinstance(attribute(name), KernelOverride)],
                "left_plain": [name for name, _ in lane.jit_functions()],
                "uncovered": {name: refusal(function) for name, function in uncovered.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
