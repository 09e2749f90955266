# SPDX-License-Identifier: Apache-2.0
"""Tables for people, JSON for programs: figures with what they were taken on."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_spec_plugins import __version__
from vllm_spec_plugins.tools.speed import NONE, PLAIN, Row

NOTES = (
    "tokens per step: tokens received / passes of the target model over the request, its prompt's last pass included",
    f"ratio: tokens/s to the faster of `{PLAIN}` and `{NONE}` in the same round; median (least to most) of the rounds",
    f"identical: completions equal token for token; sampled ones to `{NONE}`, the same runner, because vLLM's other "
    "runner draws other noise from the same seed",
)


def console() -> Console:
    """Wide enough for the tables when the output goes to a file or a pipe."""
    return Console(width=None if os.isatty(1) else 140)


def spread(values: Sequence[float], digits: int) -> str:
    """Median (least to most)."""
    middle = f"{median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def speed_table(rows: Iterable[Row], title: str) -> Table:
    table = Table(title=title, caption="\n".join(NOTES), caption_justify="left")
    for name in ("requests", "server", "output identical", "tokens per step", "tokens/s", "ratio"):
        table.add_column(name, justify="left" if name in ("requests", "server", "output identical") else "right")
    load = ""
    for row in rows:
        this = f"{row.sampling}, {row.concurrency} at a time"
        if load and this != load:
            table.add_section()
        table.add_row(
            this if this != load else "",
            row.configuration,
            identical(row),
            f"{row.counters.tokens_per_step:.2f}",
            spread(row.tokens_per_second, 1),
            spread(row.ratio, 2),
        )
        load = this
    return table


def identical(row: Row) -> str:
    """yes, or how many of how many; nothing for what there is no reference for."""
    if not row.identical:
        return ""
    return "yes" if row.lossless else f"NO: {min(row.identical.values())} of {row.prompts}"


def surroundings() -> dict[str, Any]:
    """Date, machine and versions, for a JSON report."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "usable_cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "load_average": os.getloadavg(),
            "system": platform.platform(),
        },
        "versions": {
            "vllm-spec-plugins": __version__,
            "python": platform.python_version(),
            **{name: version for name in ("vllm", "torch", "transformers") if (version := _version(name))},
        },
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**surroundings(), **report}, indent=2) + "\n")
