# SPDX-License-Identifier: Apache-2.0
"""The fast lane: which of Model Runner V2's kernels run without Triton, and what happens to the others."""

from __future__ import annotations

import importlib
import linecache
import sys
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

from vllm_spec_plugins.cpu.kernels import KERNELS

V2_RUNNER = "vllm.v1.worker.gpu"

# What the lane does not do: module of the runner -> the feature whose kernels it holds.
UNCOVERED = {
    "cp_utils": "context parallelism",
    "mm.rope": "models with multi-dimensional rotary positions",
    "model_states.mamba_hybrid": "hybrid and Mamba models",
    "model_states.prompt_embeds": "prompts given as embeddings",
    "model_states.recoverssm": "hybrid and Mamba models",
    "sample.batch_shard": "batch-sharded sampling",
    "sample.watermark": "watermarking",
    "spec_decode.acceptance_estimator": "adaptive verification",
    "spec_decode.dflash": "DFlash drafters",
    "spec_decode.dflash2": "DFlash drafters",
    "spec_decode.multi_module_mtp": "multi-token-prediction drafters",
}


class UncoveredKernelError(NotImplementedError):
    """A kernel was launched that this lane has no version of."""


def feature_of(kernel: str) -> str | None:
    """The feature that an uncovered kernel belongs to; None for one that UNCOVERED does not know."""
    name = kernel.removeprefix(V2_RUNNER + ".")
    return next((feature for module, feature in UNCOVERED.items() if name.startswith(module + ".")), None)


def _is_jit(function: FunctionType) -> bool:
    """Whether a plain function stands under a `@triton.jit` that vLLM's placeholder made a no-op."""
    code = function.__code__
    for number in range(code.co_firstlineno, code.co_firstlineno + 40):  # the first line is the first decorator's
        line = linecache.getline(code.co_filename, number).strip()
        if line.startswith("@triton.jit"):
            return True
        if line.startswith("def "):
            break
    return False


def jit_functions() -> Iterator[tuple[str, Any]]:
    """(qualified name, function) of every Triton function in the runner's imported modules, kernels and helpers alike."""
    for name, module in sorted(sys.modules.items()):
        if not name.startswith(V2_RUNNER + "."):
            continue
        for attribute, value in vars(module).items():
            interpreted = type(value).__name__ == "InterpretedFunction"
            function = value.fn if interpreted else value
            if (
                isinstance(function, FunctionType)
                and function.__module__ == name
                and (interpreted or _is_jit(function))
            ):
                yield f"{name}.{attribute}", value


class Uncovered:
    """Stands in for a Triton function without a version here. Launching it says so."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name = name
        self.func = function

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        feature = feature_of(self._name)
        what = f"{feature} cannot be used" if feature else "what launches it cannot be used"
        raise UncoveredKernelError(
            f"{what} with --plugin on a CPU: vLLM's Triton kernel {self._name} has no version for it"
        )

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._refuse

    __call__ = _refuse


def register() -> None:
    """Give every V2 kernel its CPU version, and every other Triton function of the runner a sentence.

    Idempotent. Sees imported modules only: call it again when the runner has imported what its settings ask for.
    """
    from vllm.triton_utils.dispatcher import KernelOverride, register_kernels

    # First of all: gives torch's CUDA names their meaning on the CPU, which the runner's modules then bind.
    importlib.import_module("vllm.v1.worker.cpu.shm")
    importlib.import_module(f"{V2_RUNNER}.model_runner")

    functions = dict(jit_functions())
    for name in KERNELS:
        home, _, attribute = name.rpartition(".")
        if home in sys.modules and name not in functions:
            if not isinstance(getattr(sys.modules[home], attribute, None), KernelOverride):
                raise RuntimeError(f"vLLM has no Triton kernel {name}: this package was made for another release")
    pending = {name: KERNELS[name] for name in functions if name in KERNELS}
    if pending:
        register_kernels(pending)
    uncovered = {
        id(function): Uncovered(name, function)
        for name, function in functions.items()
        if name not in KERNELS and isinstance(function, FunctionType)
    }
    for module_name, module in list(sys.modules.items()):
        if uncovered and module_name.startswith("vllm.v1."):
            for attribute, value in list(vars(module).items()):
                if isinstance(value, FunctionType) and id(value) in uncovered:
                    setattr(module, attribute, uncovered[id(value)])
