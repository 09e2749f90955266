# SPDX-License-Identifier: Apache-2.0
"""OpenMP settings for the engine's processes: made where they can be, advised where it is too late.

vLLM binds each worker to the cores of one NUMA node and gives it as many threads: right for one worker per node, and left
alone. Two cases need help. More workers than nodes: vLLM's binding refuses to start. Unbound workers without
OMP_NUM_THREADS: each of them starts a thread for every core, and threads that spin while they wait take the cores from
the others' work (measured: ten times the time on two cores).

Environment variables reach the processes that this one starts. A process whose own OpenMP runtime has started, as when
the engine runs inside it, reads them no more.
"""

from __future__ import annotations

import os
from typing import Any

BINDING = "VLLM_CPU_OMP_THREADS_BIND"
THREADS = "OMP_NUM_THREADS"
WAITING = "OMP_WAIT_POLICY"


def chosen(environment: dict[str, str], workers: int, nodes: int, cores: int) -> dict[str, str]:
    """Variables to set for `workers` worker processes on this machine's memory `nodes` and `cores`.

    Nothing that is set already is changed.
    """
    found: dict[str, str] = {}
    binding = environment.get(BINDING, "auto")
    if binding == "auto" and workers > nodes:
        binding = found[BINDING] = "nobind"
    if binding == "nobind":
        # As vLLM's binding does, one core is left to the process that schedules, where there is one to spare.
        share = max(1, (cores - 1) // workers)
        found |= {
            name: value for name, value in ((THREADS, str(share)), (WAITING, "PASSIVE")) if name not in environment
        }
    return found


def advice(environment: dict[str, str], in_this_process: bool, threads: int) -> str | None:
    """What can only be said: the engine runs in a process whose threads have started, and they spin."""
    if not in_this_process or threads == 1 or WAITING in environment:
        return None
    return (
        f"the engine runs inside this process, whose {threads} OpenMP threads spin while they wait: where other work "
        f"shares the cores, start it with {WAITING}=PASSIVE, or with {THREADS}=1 for a small model"
    )


def configure(vllm_config: Any) -> None:
    """Set what the engine's processes will read. To be called while the configuration is made, before they start."""
    import torch
    from vllm.logger import init_logger
    from vllm.utils.cpu_resource_utils import get_visible_memory_node

    logger = init_logger(f"vllm.{__name__}")
    environment = dict(os.environ)
    parallel = vllm_config.parallel_config
    settings = chosen(
        environment, parallel.local_world_size, len(get_visible_memory_node()), len(os.sched_getaffinity(0))
    )
    if settings:
        os.environ.update(settings)
        logger.info("CPU threads: set %s", ", ".join(f"{name}={value}" for name, value in settings.items()))
    sentence = advice(environment, parallel.distributed_executor_backend == "uni", torch.get_num_threads())
    if sentence:
        logger.info("CPU threads: %s", sentence)
