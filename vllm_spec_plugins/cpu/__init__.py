# SPDX-License-Identifier: Apache-2.0
"""Runs vLLM's Model Runner V2 where there is no GPU."""

from __future__ import annotations

import os

__all__ = ["install"]


def install(*, for_every_engine: bool = True, async_scheduling: bool | None = None) -> None:
    """Make this process, and those it starts, able to run Model Runner V2 on the CPU. Idempotent.

    Call it before the engine's configuration is made, when a plugin was asked for and vLLM's platform is the CPU.
    `for_every_engine=False` leaves the choice of the runner to each engine's configuration. `async_scheduling=True`
    keeps asynchronous scheduling on, which the CPU platform turns off (the same as VLLM_SPEC_CPU_ASYNC=1; for tests:
    there is no device that could run ahead).

    Raises RuntimeError when VLLM_USE_V2_MODEL_RUNNER=0 asks for the other runner, and HookMismatch when the installed
    vLLM does not fit.
    """
    from vllm.triton_utils import HAS_TRITON

    from vllm_spec_plugins.cpu.hooks import ASYNC_VARIABLE, FAST_LANE, HOOKS, INTERPRETED, WITHOUT_TRITON
    from vllm_spec_plugins.hook import apply

    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "1").strip().lower() in ("0", "false"):
        raise RuntimeError("VLLM_USE_V2_MODEL_RUNNER=0 contradicts --plugin, which runs on vLLM's V2 runner: unset it")
    if not HAS_TRITON:
        apply(HOOKS + WITHOUT_TRITON + FAST_LANE)
    elif os.environ.get("TRITON_INTERPRET") == "1":
        apply(HOOKS + INTERPRETED)
    else:  # a Triton that compiles for the CPU: vLLM's own kernels run
        apply(HOOKS)
    _warn_of_broken_companions()
    if for_every_engine:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    if async_scheduling is not None:
        os.environ[ASYNC_VARIABLE] = "1" if async_scheduling else "0"


# Set once the companions of torch were looked at, for the processes that this one starts.
_CHECKED = "SPEC_PLUGINS_COMPANIONS_CHECKED"


def _warn_of_broken_companions() -> None:
    """One sentence before transformers imports what is going to fail with a riddle."""
    from vllm_spec_plugins.cpu.distribution import broken_companions, companion_sentence, doubtful_companions

    if os.environ.get(_CHECKED) == "1":
        return
    os.environ[_CHECKED] = "1"
    broken = broken_companions(doubtful_companions())
    if broken:
        from vllm.logger import init_logger

        init_logger(f"vllm.{__name__}").warning(companion_sentence(broken))
