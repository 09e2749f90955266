# SPDX-License-Identifier: Apache-2.0
"""``vllm-spec doctor``: what is installed, whether it fits together, and what to do where it does not."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata

from vllm_spec_plugins import __version__


@dataclass(frozen=True)
class Finding:
    """One line of the report. `problem`: the sentence that says what is wrong and what to do; None: all is well."""

    subject: str
    found: str
    problem: str | None = None


def examine() -> Iterator[Finding]:
    """Findings in the order in which a server's start would meet them. Applies the hooks to this process."""
    yield Finding("python", platform.python_version())
    yield Finding("vllm-spec-plugins", __version__)
    yield from _distribution()
    try:
        import torch
        import vllm
    except Exception as error:  # a broken build raises anything, and that is the finding
        yield Finding(
            "vllm", "does not import", f"vLLM cannot be imported ({error}); install it for this machine first"
        )
        return
    yield Finding("torch", torch.__version__)
    yield _try("vllm", lambda: _version(vllm.__version__))
    yield _try("platform", _platform)
    yield _try("flag hooks", _flag_hooks)
    yield _try("engine hooks", _engine_hooks)
    yield _entry_point()


def _distribution() -> Iterator[Finding]:
    """What vLLM's CPU distribution breaks, without importing anything of it."""
    from vllm_spec_plugins.cpu import distribution

    problems = distribution.problems()
    for problem in problems:
        yield Finding("installation", "to be repaired", problem)
    if not problems:
        yield Finding("installation", "nothing to repair")


def _try(subject: str, check: Callable[[], str]) -> Finding:
    """`check`'s words, or the sentence of what it raises."""
    from vllm_spec_plugins.config import SettingError
    from vllm_spec_plugins.hook import HookMismatch

    try:
        return Finding(subject, check())
    except (SettingError, HookMismatch, RuntimeError) as error:
        return Finding(subject, "does not fit", str(error))


def _version(found: str) -> str:
    from vllm_spec_plugins.engine.support import TESTED_RELEASES, check_version

    check_version(found)
    return f"{found} (tested: {', '.join(f'{release}.*' for release in TESTED_RELEASES)})"


def _platform() -> str:
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    if current_platform.is_unspecified():
        raise RuntimeError("vLLM finds no platform to run on: install the build for this machine's device")
    name = str(current_platform.device_type)
    return (
        name
        if HAS_TRITON or not current_platform.is_cpu()
        else f"{name}, without Triton: torch versions of its kernels"
    )


def _flag_hooks() -> str:
    from vllm_spec_plugins.engine.hooks import FLAG_HOOKS
    from vllm_spec_plugins.hook import apply

    apply(FLAG_HOOKS)
    return f"{len(FLAG_HOOKS)} fit"


def _engine_hooks() -> str:
    from vllm_spec_plugins.engine import activation
    from vllm_spec_plugins.engine.hooks import ENGINE_HOOKS

    activation.install()
    return f"{len(ENGINE_HOOKS)} fit, and those of this platform"


def _entry_point() -> Finding:
    """Whether vLLM will find this package: its processes load plugins by entry point only."""
    found = [point.value for point in metadata.entry_points(group="vllm.general_plugins", name="spec_plugins")]
    if found == ["vllm_spec_plugins.plugin:register"]:
        return Finding("entry point", found[0])
    return Finding(
        "entry point",
        ", ".join(found) or "none",
        "vLLM does not find this package by its entry point; install it again: pip install vllm-spec-plugins",
    )


def run() -> int:
    """Print the report; 1 when something is wrong."""
    problems = []
    for finding in examine():
        mark = "ok " if finding.problem is None else "NOT"
        print(f"{mark} {finding.subject:<18} {finding.found}")
        if finding.problem is not None:
            problems.append(finding.problem)
    for problem in problems:
        print(f"\n{problem}", file=sys.stderr)
    return 1 if problems else 0
