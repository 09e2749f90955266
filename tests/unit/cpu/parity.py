# SPDX-License-Identifier: Apache-2.0
"""Runs vLLM's own callers of its Triton kernels twice on equal random inputs: on the interpreted kernels, on ours.

A process of its own, because Triton's interpreter must be on before vllm is imported:

    python -m tests.unit.cpu.parity SEED    # prints one JSON object: case -> what differed ("" for nothing)

Memory that the callers allocate is poisoned, alike in both runs: whatever only one of the two writes shows.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vllm_spec_plugins.cpu import interpreted

if __name__ == "__main__":
    interpreted.enable()

import torch

from vllm_spec_plugins.cpu.kernels import KERNELS
from vllm_spec_plugins.cpu.kernels.launch import NeedsGrid

Tensor = torch.Tensor
ROUNDS = 6


class Draw:
    """Random tensors from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def int(self, low: int, high: int) -> int:
        """One of low..high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def flag(self) -> bool:
        return bool(self.int(0, 1))

    def ints(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator, dtype=dtype)

    def floats(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.generator) * scale

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def choice(self, values: list[float], *shape: int) -> Tensor:
        return torch.tensor(values)[self.ints(0, len(values) - 1, *shape, dtype=torch.int64)]

    def states(self, num_reqs: int, max_num_reqs: int) -> Tensor:
        """int64[num_reqs]: distinct request states."""
        return torch.randperm(max_num_reqs, generator=self.generator)[:num_reqs]


def starts(lengths: Tensor) -> Tensor:
    """int32[n + 1]: cumulative lengths from 0."""
    return torch.cat((torch.zeros(1, dtype=torch.int64), lengths.long().cumsum(0))).int()


@dataclass(frozen=True)
class Case:
    name: str
    kernels: tuple[str, ...]  # as in KERNELS, without vllm.v1.worker.gpu.
    run: Callable[[Draw], tuple[Any, ...]]  # returns everything the kernels may have written
    tolerance: float  # relative, of floats; 0: bit for bit


CASES: list[Case] = []
# case -> kernel -> launches of our version
entry_launches: dict[str, dict[str, int]] = {}


def case(*kernels: str, tolerance: float = 0.0) -> Callable[[Callable[[Draw], tuple[Any, ...]]], None]:
    def add(run: Callable[[Draw], tuple[Any, ...]]) -> None:
        names = tuple("vllm.v1.worker.gpu." + kernel for kernel in kernels)
        CASES.append(Case(run.__name__, names, run, tolerance))

    return add


class _Replacement:
    def __init__(self, implementation: Any) -> None:
        self.implementation = implementation
        self.launches = 0

    def __getitem__(self, grid: Any) -> Any:
        self.launches += 1
        return self.implementation.on(grid) if isinstance(self.implementation, NeedsGrid) else self.implementation


@contextmanager
def replaced(names: tuple[str, ...]) -> Iterator[dict[str, _Replacement]]:
    """Put this package's versions in the place of the interpreted kernels."""
    hosts = [(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    originals = [getattr(host, attribute) for host, attribute in hosts]
    replacements = {name: _Replacement(KERNELS[name]) for name in names}
    for (host, attribute), name in zip(hosts, names, strict=True):
        setattr(host, attribute, replacements[name])
    try:
        yield replacements
    finally:
        for (host, attribute), original in zip(hosts, originals, strict=True):
            setattr(host, attribute, original)


def difference(expected: tuple[Any, ...], found: tuple[Any, ...], tolerance: float) -> str:
    for place, (a, b) in enumerate(zip(expected, found, strict=True)):
        if a is None or b is None:
            if a is not b:
                return f"output {place}: {a} against {b}"
            continue
        if not isinstance(a, Tensor):
            if a != b:
                return f"output {place}: {a} against {b}"
            continue
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"output {place}: {a.dtype}{tuple(a.shape)} against {b.dtype}{tuple(b.shape)}"
        if tolerance and a.is_floating_point():
            same = torch.isclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
        else:
            same = (a == b) | ((a != a) & (b != b))
        if not bool(same.all()):
            where = tuple(int(i) for i in (~same).nonzero()[0])
            return f"output {place} at {where} of {tuple(a.shape)}: {a[where]} against {b[where]}, {int((~same).sum())} in all"
    return ""


def compare(entry: Case, seed: int) -> str:
    """What differs between the interpreted kernels and ours for one seed; an empty string when nothing does."""
    expected = entry.run(Draw(seed))
    with replaced(entry.kernels) as replacements:
        found = entry.run(Draw(seed))
    entry_launches.setdefault(entry.name, dict.fromkeys(entry.kernels, 0))
    for name, replacement in replacements.items():
        entry_launches[entry.name][name] += replacement.launches
    return difference(expected, found, entry.tolerance)


def main(seed: int) -> None:
    importlib.import_module("vllm.v1.worker.cpu.shm")
    for cases in ("inputs", "sampling", "rejection", "drafting"):
        importlib.import_module(f"tests.unit.cpu.parity_{cases}")
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns
    torch.utils.deterministic.fill_uninitialized_memory = True

    results = {}
    for entry in CASES:
        try:
            found = (f"round {i}: {text}" for i in range(ROUNDS) if (text := compare(entry, seed + i)))
            results[entry.name] = next(found, "")
        except Exception:
            results[entry.name] = traceback.format_exc()
        launches = entry_launches.get(entry.name, {})
        idle = [name for name, count in launches.items() if count == 0]
        if idle and not results[entry.name]:
            results[entry.name] = f"never launched {idle}"
    print(json.dumps({"cases": results, "kernels": sorted({name for entry in CASES for name in entry.kernels})}))


if __name__ == "__main__":
    from tests.unit.cpu import parity  # the cases register there, not in __main__

    parity.main(int(sys.argv[1]))
