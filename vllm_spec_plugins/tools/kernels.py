# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels on a GPU: each checked against its reference, then timed beside the machine's own ceilings.

    python -m vllm_spec_plugins.tools.bench kernels --json kernels.json
    python -m vllm_spec_plugins.tools.bench kernels --kernel tree_attention --kernel kv_commit

Every figure is the median of many launches, timed by CUDA events, after a warm-up, with an L2 cache that holds something else.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from rich.table import Table

from vllm_spec_plugins.tools.kernel_cases import CASES, Mismatch, Setup, in_torch

NO_GPU = "bench kernels measures on a CUDA GPU, and torch {} finds none on this machine"

# The step that a kernel's time is compared with: it reads the weights of so many parameters in bfloat16 at least once.
STEP_PARAMETERS = 7e9

# Milliseconds of GPU time that one figure may take, and how many launches that are at least and at most.
BUDGET, LEAST, MOST = 300.0, 15, 200
WARM_UP = 3


class Stopwatch:
    """Milliseconds of what is launched, on the current GPU."""

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        # Written before every launch: whatever the kernel reads comes from memory then.
        self._other = torch.empty(max(256 << 20, 4 * cache), dtype=torch.uint8, device="cuda")

    def __call__(self, launch: Callable[[], object]) -> list[float]:
        for _ in range(WARM_UP):
            launch()
        (first,) = self._measure(launch, 1)
        return self._measure(launch, repetitions(first))

    def _measure(self, launch: Callable[[], object], count: int) -> list[float]:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for begin, end in events:
            # Also gives the host time to launch what is timed before the GPU asks for it.
            self._other.zero_()
            begin.record()
            launch()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in events]


def repetitions(milliseconds: float) -> int:
    """Launches that one figure is the median of."""
    return max(LEAST, min(MOST, int(BUDGET / max(milliseconds, 1e-3))))


@dataclass(frozen=True)
class Machine:
    """What the GPU can do at best, measured in the same run.

    Attributes:
        copy: bytes read plus bytes written per second, copying a tensor much larger than the L2 cache.
        matmul: floating-point operations per second of a bfloat16 product of square matrices.
    """

    name: str
    capability: str
    multiprocessors: int
    memory_gib: float
    l2_mib: float
    cuda: str
    triton: str
    copy: float
    matmul: float

    @property
    def step(self) -> float:
        """Milliseconds that a step of a model of `STEP_PARAMETERS` takes at least: its weights pass once, as fast as a copy."""
        return 2 * STEP_PARAMETERS / self.copy * 1e3


def measure_machine(stopwatch: Stopwatch) -> Machine:
    """Random contents: a GPU that multiplies zeros draws less power and runs faster."""
    import triton

    about = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Machine(
        name=about.name,
        capability=f"{about.major}.{about.minor}",
        multiprocessors=about.multi_processor_count,
        memory_gib=round(about.total_memory / 2**30, 1),
        l2_mib=round(about.L2_cache_size / 2**20, 1),
        cuda=str(torch.version.cuda),
        triton=triton.__version__,
        copy=_copy(stopwatch),
        matmul=_matmul(stopwatch),
    )


def _copy(stopwatch: Stopwatch) -> float:
    size = min(2 << 30, torch.cuda.mem_get_info()[0] // 8)
    source = torch.randint(256, (size,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / (median(stopwatch(lambda: target.copy_(source))) / 1e3)


def _matmul(stopwatch: Stopwatch, size: int = 8192) -> float:
    a, b = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    product = torch.empty_like(a)
    return 2 * size**3 / (median(stopwatch(lambda: torch.mm(a, b, out=product))) / 1e3)


@dataclass(frozen=True)
class Figure:
    """One kernel on one shape.

    Attributes:
        wrong: how the result differs from the reference's; "" = it does not. Only what is right is timed.
        milliseconds: every launch's.
        traffic: bytes that the kernel must move at least; None = the launch costs more than they do.
        beside: name -> milliseconds of each launch of what it is compared with.
        bound: what is asked of it, as in `Setup`.
    """

    kernel: str
    shape: str
    wrong: str = ""
    milliseconds: Sequence[float] = ()
    traffic: int | None = None
    beside: Mapping[str, Sequence[float]] = field(default_factory=dict)
    bound: str = ""

    @property
    def time(self) -> float:
        return median(self.milliseconds)

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second."""
        return None if self.traffic is None else self.traffic / (self.time / 1e3)

    def ratio(self, name: str) -> float:
        """This kernel's time to that of what stands beside it."""
        return self.time / median(self.beside[name])

    def achieved(self, machine: Machine) -> dict[str, float]:
        """What a target may ask for: share of the copy's bandwidth, share of a step, times the reference."""
        found = {"share of a step": self.time / machine.step}
        if self.bandwidth is not None:
            found["share of the copy"] = self.bandwidth / machine.copy
        return {**found, **{f"time to {name}": self.ratio(name) for name in self.beside}}

    def met(self, machine: Machine) -> bool | None:
        """Whether the target is; None where there is none."""
        if not self.bound:
            return None
        what, relation, limit = self.bound.rsplit(" ", 2)
        value = self.achieved(machine)[what]
        return value >= float(limit) if relation == ">=" else value <= float(limit)

    def as_dict(self, machine: Machine) -> dict[str, Any]:
        if self.wrong:
            return {"kernel": self.kernel, "shape": self.shape, "wrong": self.wrong}
        figures = asdict(self)
        figures["milliseconds_median"] = self.time
        figures["beside_median"] = {name: median(times) for name, times in self.beside.items()}
        figures["bytes_per_second"] = self.bandwidth
        return {**figures, "achieved": self.achieved(machine), "met": self.met(machine)}


def measure(
    kernels: Sequence[str],
    stopwatch: Callable[[Callable[[], object]], list[float]],
    device: str,
    say: Callable[[str], None],
) -> list[Figure]:
    """A figure per case of each kernel, checked before it is timed; cases too large for the memory are named and left out."""
    found = []
    for kernel in kernels:
        for setup in CASES[kernel]:
            free = torch.cuda.mem_get_info()[0] if device == "cuda" else None
            if free is not None and setup.bytes > 0.9 * free:
                say(f"{kernel}, {setup.shape}: left out, it needs {setup.bytes / 2**30:.0f} GiB of memory")
                continue
            say(f"{kernel}, {setup.shape}")
            found.append(_figure(setup, device, stopwatch))
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    return found


def _figure(setup: Setup, device: str, stopwatch: Callable[[Callable[[], object]], list[float]]) -> Figure:
    case = setup.make(device)
    with in_torch():  # nothing in it is the engine's: what it chooses by itself is for what the kernel stands beside
        try:
            case.check(case.launch)
        except Mismatch as mismatch:
            return Figure(case.kernel, setup.shape, wrong=str(mismatch))
        beside = {name: stopwatch(launch) for name, launch in case.beside.items()}
    return Figure(case.kernel, setup.shape, "", stopwatch(case.launch), case.traffic, beside, setup.bound)


def tables(machine: Machine, figures: Sequence[Figure]) -> list[Table]:
    """One per kernel."""
    made = []
    for kernel in dict.fromkeys(figure.kernel for figure in figures):
        mine = [figure for figure in figures if figure.kernel == kernel]
        names = list(dict.fromkeys(name for figure in mine for name in figure.beside))
        table = Table(
            title=kernel, caption=_CAPTION.format(m=machine, copy=machine.copy / 1e9, mm=machine.matmul / 1e12)
        )
        for name in (
            "shape",
            "right",
            "µs",
            "GB/s",
            "of the copy",
            "of a step",
            *(f"time to {n}" for n in names),
            "target",
        ):
            table.add_column(name, justify="left" if name in ("shape", "right", "target") else "right")
        for figure in mine:
            table.add_row(*_cells(figure, machine, names))
        made.append(table)
    return made


_CAPTION = (
    "{m.name}, compute capability {m.capability}: a copy reads and writes {copy:.0f} GB/s, a bf16 product {mm:.0f} TFLOP/s; "
    "a step: the weights of 7 B parameters in bf16 read once at the copy's rate, {m.step:.2f} ms at least"
)


def _cells(figure: Figure, machine: Machine, names: Sequence[str]) -> list[str]:
    if figure.wrong:
        return [figure.shape, f"NO: {figure.wrong}"]
    achieved, met = figure.achieved(machine), figure.met(machine)
    verdict = "" if met is None else f"{figure.bound}: {'met' if met else 'MISSED'}"
    return [
        figure.shape,
        "yes",
        f"{figure.time * 1e3:.1f}",
        "" if figure.bandwidth is None else f"{figure.bandwidth / 1e9:.0f}",
        f"{achieved['share of the copy']:.1%}" if "share of the copy" in achieved else "",
        f"{achieved['share of a step']:.2%}",
        *(f"{figure.ratio(name):.2f}" if name in figure.beside else "" for name in names),
        verdict,
    ]


def available() -> None:
    """Raises ValueError, with the sentence for the user, where there is nothing to measure on."""
    if not torch.cuda.is_available():
        raise ValueError(NO_GPU.format(torch.__version__))
