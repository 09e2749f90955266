# SPDX-License-Identifier: Apache-2.0
"""What of vLLM is replaced so that Model Runner V2 runs without a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from vllm_spec_plugins.cpu import lane, threads
from vllm_spec_plugins.cpu.kernels import loops
from vllm_spec_plugins.cpu.kernels.launch import NeedsGrid
from vllm_spec_plugins.cpu.kernels.nucleus import apply_top_k_top_p
from vllm_spec_plugins.cpu.kernels.sampling import draw
from vllm_spec_plugins.hook import ABSENT, Hook, apply

ASYNC_VARIABLE = "VLLM_SPEC_CPU_ASYNC"


def _next_power_of_2(_: Any) -> Callable[[int], int]:
    def next_power_of_2(n: int) -> int:
        return 1 << (n - 1).bit_length() if n > 0 else n

    return next_power_of_2


def _without_llvmlite(original: Callable[[Any], None]) -> Callable[[Any], None]:
    name = "llvmlite.binding.ffi"

    def _rebind_kernels(overrides: Any) -> None:
        hidden = sys.modules.pop(name, None)
        try:
            original(overrides)
        finally:
            if hidden is not None:
                sys.modules[name] = hidden

    return _rebind_kernels


def _register_after(original: Callable[[Any], None]) -> Callable[[Any], None]:
    def register_triton_kernel_overrides(cls: Any) -> None:
        original(cls)
        lane.register()
        apply(WORKER)

    return register_triton_kernel_overrides


def _register_again(original: Callable[[Any], None]) -> Callable[[Any], None]:
    def init_device(self: Any) -> None:
        original(self)
        lane.register()
        loops.warm()

    return init_device


def _getitem_with_grid(original: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def __getitem__(self: Any, grid: Any) -> Any:
        return self._impl.on(grid) if isinstance(self._impl, NeedsGrid) else original(self, grid)

    return __getitem__


def _configured(original: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        scheduler = vllm_config.scheduler_config
        asked = scheduler.async_scheduling
        original(cls, vllm_config)
        threads.configure(vllm_config)
        if os.environ.get(ASYNC_VARIABLE) == "1":
            scheduler.async_scheduling = asked

    return check_and_update_config


def _aliased(original: Any) -> Callable[..., Any]:
    def copy_to_uva(self: Any, n: int | None = None) -> Any:
        self.gpu = self.cpu if n is None else self.cpu[:n]
        return self.gpu

    return copy_to_uva


def _drawn_directly(original: Callable[..., Any]) -> Callable[..., Any]:
    def gumbel_sample(
        logits: Any,
        expanded_idx_mapping: Any,
        temperature: Any,
        seed: Any,
        pos: Any,
        apply_temperature: bool,
        is_drafting: bool,
        logits_cache: Any = None,
        logits_cache_col: Any = None,
        use_fp64: bool = False,
        logits_cache_source: Any = None,
    ) -> Any:
        if logits_cache is not None:
            return original(
                logits,
                expanded_idx_mapping,
                temperature,
                seed,
                pos,
                apply_temperature,
                is_drafting,
                logits_cache,
                logits_cache_col,
                use_fp64,
                logits_cache_source,
            )
        best, _ = draw(logits, expanded_idx_mapping, temperature, seed, pos, apply_temperature, is_drafting, use_fp64)
        return torch.from_numpy(best)

    return gumbel_sample


HOOKS: tuple[Hook, ...] = (
    Hook(
        target="vllm.platforms.cpu:CpuPlatform.check_and_update_config",
        why="thread settings that vLLM lacks; tests of async scheduling, which the CPU platform turns off",
        signature="(cls, vllm_config)",
        upstream="goes when vLLM's CPU platform runs more workers than memory nodes",
        replacement=_configured,
    ),
    Hook(
        target="vllm.triton_utils.dispatcher:_rebind_kernels",
        why="it looks into every object of every module and dies of llvmlite's, whose `__dict__` is a C function's proxy",
        signature="(overrides)",
        upstream="goes when the scan checks what vars() gave it; patches/vllm-0.32.0 has it",
        replacement=_without_llvmlite,
    ),
)

# Without Triton only.
WITHOUT_TRITON: tuple[Hook, ...] = (
    Hook(
        target="vllm.config.vllm:HAS_TRITON",
        why="the config refuses Model Runner V2 without Triton, whoever supplies its kernels",
        signature="bool",
        upstream="goes when the check asks for registered kernels instead of for Triton",
        replacement=lambda _: True,
    ),
    Hook(
        target="vllm.triton_utils:triton.next_power_of_2",
        why="vLLM's placeholder for Triton lacks a host function that V2's launches call",
        signature=ABSENT,
        upstream="goes when the placeholder has it, as it has cdiv",
        replacement=_next_power_of_2,
    ),
)

# Wherever versions of V2's kernels for the CPU stand in for them.
FAST_LANE: tuple[Hook, ...] = (
    Hook(
        target="vllm.platforms.cpu:CpuPlatform.register_triton_kernel_overrides",
        why="the place where a platform registers its versions of Triton kernels: V2's are added",
        signature="(cls)",
        upstream="goes when vLLM's CPU platform registers versions of V2's kernels",
        replacement=_register_after,
    ),
    Hook(
        target="vllm.triton_utils.dispatcher:KernelOverride.__getitem__",
        why="an override gets a launch's arguments but not its grid, which the block-table kernels need",
        signature="(self, grid)",
        upstream="goes when overrides can ask for the grid",
        replacement=_getitem_with_grid,
    ),
)

# Under Triton's interpreter only.
INTERPRETED: tuple[Hook, ...] = (
    Hook(
        target="vllm.v1.sample.ops.topk_topp_sampler:HAS_TRITON",
        why="the interpreter cannot run the top-k and top-p kernels: vLLM's torch version takes their place",
        signature="bool",
        upstream="stays: for tests only",
        replacement=lambda _: False,
    ),
    Hook(
        target="torch.cuda:get_device_capability",
        why="vLLM's Triton kernel that writes the K/V cache asks the device before it chooses a tile",
        signature="(device=None)",
        upstream="stays: for tests only",
        replacement=lambda _: lambda device=None: (9, 0),
    ),
    Hook(
        target="vllm.v1.attention.ops.triton_reshape_and_cache_flash:_is_supported_kv_cache_dtype",
        why="that kernel writes 8-bit caches on devices that have the type; a CPU names no capability, the interpreter has it",
        signature="(kv_cache_dtype)",
        upstream="stays: for tests only",
        replacement=lambda original: (
            lambda kv_cache_dtype: kv_cache_dtype.startswith("fp8") or original(kv_cache_dtype)
        ),
    ),
)

# In worker processes only: the module of the target gives torch's CUDA names another meaning when it is imported.
WORKER: tuple[Hook, ...] = (
    Hook(
        target="vllm.v1.worker.cpu_worker:CPUWorker.init_device",
        why="the runner imports its speculator while it is made; kernels of that module get their versions, loops are compiled",
        signature="(self)",
        upstream="goes when vLLM's CPU platform registers versions of V2's kernels",
        replacement=_register_again,
    ),
    Hook(
        target="vllm.v1.worker.gpu.buffer_utils:UvaBackedTensor.copy_to_uva",
        why="speed: without a device the copy that a step in flight reads is the tensor itself (16 copies per step)",
        signature="(self, n=None)",
        upstream="goes when vLLM's CPU buffers alias",
        replacement=_aliased,
    ),
    Hook(
        target="vllm.v1.worker.gpu.sample.sampler:gumbel_sample",
        why="speed: one argmax per row instead of one per block and another over the blocks",
        signature=(
            "(logits, expanded_idx_mapping, temperature, seed, pos, apply_temperature, is_drafting, logits_cache=None, "
            "logits_cache_col=None, use_fp64=False, logits_cache_source=None)"
        ),
        upstream="stays",
        replacement=_drawn_directly,
    ),
    *(
        Hook(
            target=f"vllm.v1.worker.gpu.sample.{module}:apply_top_k_top_p",
            why="speed: vLLM sorts every row of logits with its indices, which costs more than a tiny model's layer",
            signature="(logits, k, p)",
            upstream="stays",
            replacement=lambda _: apply_top_k_top_p,
        )
        for module in ("sampler", "states")
    ),
    Hook(
        target="vllm.v1.worker.gpu.spec_decode.ngram.speculator:HAS_TRITON",
        why="vLLM's own n-gram speculator asks for Triton; its kernels have versions here",
        signature="bool",
        upstream="goes when the check asks for registered kernels instead of for Triton",
        replacement=lambda _: True,
    ),
)
