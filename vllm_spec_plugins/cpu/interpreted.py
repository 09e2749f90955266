# SPDX-License-Identifier: Apache-2.0
"""The interpreted lane, for tests: vLLM's and this package's real Triton kernels under Triton's interpreter, a launch's
programs in step (cpu/lockstep.py).

    from vllm_spec_plugins.cpu import interpreted
    interpreted.enable()  # before anything imports vllm

An engine with a plugin then runs as it does on a GPU: vLLM's Triton attention on its K/V layout, and this package's kernels
wherever there is one (`compiled.kernels_for`).

An entry point for a "cpu" Triton backend would do the same for every process, but Triton does not skip it when it looks
for the one active driver: it would break hosts that have a GPU. So it is done by hand, in the process that asks for it.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from vllm_spec_plugins import compiled


def enable() -> None:
    """Turn the interpreter on in this process. Needs the triton package. Raises RuntimeError when it is too late."""
    compiled.use_kernels = True
    if os.environ.get("TRITON_INTERPRET") == "1" and _enabled():
        return
    late = [name for name in ("vllm.triton_utils", "vllm.platforms") if name in sys.modules]
    if late:
        raise RuntimeError(f"the interpreted lane must be enabled before vllm is imported, but {late[0]} is imported")
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import Backend, backends
    from triton.backends.compiler import BaseBackend
    from triton.backends.driver import DriverBase

    class InterpretedDriver(DriverBase):
        """What vLLM asks of the platform's driver before it uses Triton. Interpreted kernels need none to run."""

        @staticmethod
        def is_active() -> bool:
            import torch

            return not torch.cuda.is_available()

        def map_python_to_cpp_type(self, ty: str) -> str:
            raise NotImplementedError("the interpreter compiles nothing")

        def get_current_target(self) -> Any:
            raise NotImplementedError("the interpreter compiles nothing")

        def get_active_torch_device(self) -> Any:
            import torch

            return torch.device("cpu")

        def get_benchmarker(self) -> Any:
            raise NotImplementedError("the interpreter is not for timing")

    backends["cpu"] = Backend(BaseBackend, InterpretedDriver)
    _repair_interpreter()
    from vllm_spec_plugins.cpu import lockstep

    lockstep.enable()


def _repair_interpreter() -> None:
    """What Triton 3.9's interpreter lacks for vLLM's kernels and ours: masks that are not plain bool arrays, products of bfloat16
    matrices (it multiplies their bits), 8-bit floats (see `_repair_eight_bits`), two libdevice functions.
    """
    import numpy as np
    import triton.language as tl
    import triton.language.extra.libdevice as libdevice
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    load, store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot

    def plain(mask: Any) -> Any:
        return interpreter.TensorHandle(np.ascontiguousarray(mask.data, dtype=np.bool_), tl.int1)

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        return load(self, ptrs, plain(mask), *rest)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, ptrs, value, plain(mask), *rest)

    def widened(matrix: Any) -> Any:
        if matrix.dtype.scalar != tl.bfloat16:
            return matrix
        return interpreter.TensorHandle((matrix.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, left: Any, right: Any, *rest: Any) -> Any:
        return dot(self, widened(left), widened(right), *rest)

    builder.create_masked_load, builder.create_masked_store = create_masked_load, create_masked_store
    builder.create_dot = create_dot
    _repair_eight_bits(builder)

    def elementwise(function: Any, dtype: Any) -> Any:
        def apply(value: Any) -> Any:
            scalar = dtype or value.dtype
            with np.errstate(invalid="ignore"):
                handle = interpreter.TensorHandle(function(value.handle.data), scalar)
            return tl.tensor(handle, tl.block_type(scalar, value.shape) if value.shape else scalar)

        return apply

    libdevice.log1p = elementwise(np.log1p, None)
    libdevice.isnan = elementwise(np.isnan, tl.int1)


def _repair_eight_bits(builder: Any) -> None:
    """Conversions from and to 8-bit floats as NVIDIA's devices have them: to the nearest, of two the even one, and to the largest
    where it is larger. The interpreter rounds halves up, drops the carry into an odd exponent, and reads NaN as a number.
    """
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, _get_np_dtype

    convert = builder.create_fp_to_fp
    types = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
    codes = torch.arange(256, dtype=torch.uint8)
    values = {ours: codes.view(theirs).float().numpy() for ours, theirs in types.items()}

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source not in types and target not in types:
            return convert(self, src, dst_type, rounding_mode)
        if source in types:
            wide = values[source][src.data]
        elif source == tl.bfloat16:
            wide = (src.data.astype(np.uint32) << 16).view(np.float32)
        else:
            wide = src.data.astype(np.float32)
        if target in types:
            largest = torch.finfo(types[target]).max
            data = torch.tensor(wide).clamp(-largest, largest).to(types[target]).view(torch.uint8).numpy()
        elif target == tl.bfloat16:  # which has every value of 8 bits
            data = (wide.view(np.uint32) >> 16).astype(np.uint16)
        else:
            data = wide.astype(_get_np_dtype(target))
        return TensorHandle(data, target)

    builder.create_fp_to_fp = create_fp_to_fp


def _enabled() -> bool:
    triton_backends = sys.modules.get("triton.backends")
    return triton_backends is not None and "cpu" in triton_backends.backends
