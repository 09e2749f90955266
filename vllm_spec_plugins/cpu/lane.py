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


class UncoveredKernelError(NotImplementedError):
    """A kernel was launched that this lane has no version of."""


def import_runner() -> None:
    """Import the V2 runner, after the module that gives torch's CUDA names their CPU meaning: it must come first."""
    importlib.import_module("vllm.v1.worker.cpu.shm")
    importlib.import_module(f"{V2_RUNNER}.model_runner")


def _is_jit(function: FunctionType) -> bool:
    """Whether a plain function stands under a `@triton.jit` that vLLM's placeholder made a no-op.

    The first line of a decorated function's code is its first decorator.
    """
    code = function.__code__
    return linecache.getline(code.co_filename, code.co_firstlineno).lstrip().startswith("@triton.jit")


def jit_functions() -> Iterator[tuple[str, Any]]:
    """(qualified name, function) of every Triton function in the runner's imported modules, kernels and helpers alike."""
    for name, module in sorted(sys.modules.items()):
        if not name.startswith(V2_RUNNER + "."):
            continue
        for attribute, value in vars(module).items():
            if isinstance(value, FunctionType) and value.__module__ == name and _is_jit(value):
                yield f"{name}.{attribute}", value


class Uncovered:
    """Stands in for a Triton function without a version here. Launching it says so."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name = name
        self.func = function

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        raise UncoveredKernelError(
            f"the Triton kernel {self._name} has no CPU version: the feature that launches it needs a GPU "
            "(or --plugin removed, for vLLM's own CPU runner)"
        )

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._refuse

    __call__ = _refuse


def register() -> None:
    """Give every V2 kernel its CPU version, and every other Triton function of the runner a sentence. Idempotent."""
    from vllm.triton_utils.dispatcher import KernelOverride, register_kernels

    import_runner()
    pending = {}
    uncovered: dict[int, Uncovered] = {}
    for name, function in jit_functions():
        if name in KERNELS:
            pending[name] = KERNELS[name]
        else:
            uncovered[id(function)] = Uncovered(name, function)
    missing = [name for name in KERNELS if name not in pending and not _is_registered(name, KernelOverride)]
    if missing:
        raise RuntimeError(f"vLLM has no kernel {missing[0]}: this package was made for another release")
    if pending:
        register_kernels(pending)
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("vllm.v1."):
            for attribute, value in list(vars(module).items()):
                if isinstance(value, FunctionType) and id(value) in uncovered:
                    setattr(module, attribute, uncovered[id(value)])


def _is_registered(name: str, override: type) -> bool:
    module, _, attribute = name.rpartition(".")
    return isinstance(getattr(sys.modules.get(module), attribute, None), override)
