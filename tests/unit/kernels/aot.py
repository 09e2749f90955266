# SPDX-License-Identifier: Apache-2.0
"""Compiles kernels for GPUs that are not here, and says what they need of one."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Shared memory in bytes that one block of threads may have, by compute capability (CUDA programming guide, table of
# technical specifications). What stays under the smallest runs everywhere.
SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}


@dataclass(frozen=True)
class Usage:
    """What one block of a compiled kernel takes.

    Attributes:
        registers: per thread.
        spills: bytes of local memory per thread: registers that did not fit and stand in a stack frame.
        shared: bytes of shared memory, dynamic and static.
    """

    registers: int
    spills: int
    shared: int


def compile_for(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[tuple[int, ...] | str, Any],
    capability: int,
    num_warps: int,
    num_stages: int,
    *,
    aligned: Collection[str] = (),
) -> Usage:
    """Machine code of `kernel` for compute capability `capability` (80 is 8.0), and its usage.

    Args:
        signature: type of each argument by name, such as "*bf16", "i32" or "fp32"; constexprs may be left out.
        constexprs: values by position or name. An argument that is 1 at run time is one, as Triton makes it one.
        aligned: integer arguments that are multiples of 16 at run time (strides, mostly), which lets Triton load wide. Pointers
            are taken to be multiples of 16, as torch allocates.

    Printed as well: `pytest tests/unit/kernels -rP` lists what all of them take.

    Raises triton.CompilationError, or RuntimeError from a later stage, where the compiler refuses the kernel.
    """
    assert isinstance(kernel, triton.JITFunction), f"{kernel} is interpreted: this process has TRITON_INTERPRET=1"
    names = kernel.arg_names
    values = {(names.index(at),) if isinstance(at, str) else at: value for at, value in constexprs.items()}
    types = {name: "constexpr" if (i,) in values else signature[name] for i, name in enumerate(names)}
    multiples = [i for i, name in enumerate(names) if name in aligned or types[name].startswith("*")]
    source = ASTSource(kernel, types, values, {(i,): [["tt.divisibility", 16]] for i in multiples})
    # Fused multiply-adds are what Triton 3.6 makes by default; 3.9 wants to be told.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", listing)}
    shared = used["SHARED"] + compiled.metadata.shared
    usage = Usage(registers=used["REG"], spills=used["STACK"] + used["LOCAL"], shared=shared)
    sizes = ", ".join(f"{names[i]}={value}" for (i,), value in values.items())
    print(f"sm_{capability} {kernel.__name__} ({sizes}, {num_warps} warps, {num_stages} stages): {usage}")
    return usage
