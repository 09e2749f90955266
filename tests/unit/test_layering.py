# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, and what no file of the repository may name."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "vllm_spec_plugins"

# A part imports from parts below it and from itself, never from its own level or above.
LEVELS = {
    "kernels": 0,
    "hook": 0,
    "compiled": 0,
    "choices": 0,
    "tree": 1,
    "config": 0,
    "settings": 3,
    "depth_settings": 4,
    "proposers": 4,
    "layers": 0,
    "cascade": 2,
    "method": 5,
    "registry": 6,
    "cpu": 6,
    "engine": 7,
    "plugin": 8,
    "tools": 9,
}
MAY_IMPORT_VLLM = {"engine", "cpu", "tools"}


def sources() -> list[Path]:
    return sorted([*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def part_of(path: Path) -> str:
    """The part that a file belongs to; "" for the package's own __init__."""
    inside = path.relative_to(ROOT)
    if inside.parts[0] == "kernels":
        return "kernels"
    return inside.with_suffix("").parts[1].replace("__init__", "")


def module_of(path: Path) -> str:
    inside = path.relative_to(ROOT).with_suffix("")
    parts = inside.parts if inside.parts[0] == PACKAGE else (PACKAGE, *inside.parts)
    return ".".join(parts)


def imported(path: Path, source: str) -> Iterator[str]:
    """Full names of everything that a file imports anywhere; `from a import b` gives `a.b`."""
    module = module_of(path)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # With k dots the base is k - 1 packages above the one that holds this module.
            package = module.split(".")[: len(module.split(".")) - node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(path: Path, source: str) -> list[str]:
    part = part_of(path)
    found = []
    for name in imported(path, source):
        root, *rest = name.split(".")
        if root == "vllm" and part not in MAY_IMPORT_VLLM:
            found.append(f"{part or PACKAGE} imports {name}")
        elif root == "kernels":
            found.append(f"{part or PACKAGE} imports {name}, which is {PACKAGE}.{name}")
        elif root == PACKAGE and part and rest and rest[0] in LEVELS and rest[0] != part:
            upwards = LEVELS[rest[0]] >= LEVELS[part]
            found += [f"{part} imports {name}, which is not below it"] if upwards else []
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_downwards_and_vllm_only_where_the_engine_is_touched(path: Path) -> None:
    assert part_of(path) in {*LEVELS, ""}, "a new part needs its place in LEVELS"
    assert violations(path, path.read_text()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("vllm_spec_plugins/tree/tree.py", "import vllm"),
        ("vllm_spec_plugins/tree/tree.py", "def f():\n    from vllm.config import VllmConfig"),
        ("vllm_spec_plugins/config.py", "from vllm import LLM"),
        ("vllm_spec_plugins/__init__.py", "import vllm.plugins"),
        ("vllm_spec_plugins/tree/tree.py", "from vllm_spec_plugins import engine"),
        ("vllm_spec_plugins/tree/tree.py", "from ..proposers import base"),
        ("vllm_spec_plugins/proposers/base.py", "import vllm_spec_plugins.registry"),
        ("vllm_spec_plugins/engine/kv.py", "from vllm_spec_plugins.tools.cli import main"),
        ("kernels/attention.py", "from .. import tree"),
        ("vllm_spec_plugins/engine/kv.py", "import kernels"),
    ],
)
def test_an_import_that_points_up_is_found(path: str, source: str) -> None:
    assert len(violations(ROOT / path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("vllm_spec_plugins/engine/kv.py", "import vllm\nfrom vllm_spec_plugins.engine.state import TreeState"),
        ("vllm_spec_plugins/tree/tree.py", "from . import accept\nfrom ..kernels.masks import x\nimport vllm_other"),
        ("kernels/attention.py", "from .masks import words"),
    ],
)
def test_an_import_that_points_down_is_allowed(path: str, source: str) -> None:
    assert violations(ROOT / path, source) == []


# Written in pieces, so that this file does not name them either.
FORBIDDEN = re.compile(
    "|".join(
        [
            r"pypi\." "org",
            r"pythonhosted\." "org",
            r"download\.pytorch\." "org",
            r"/wo" r"rk/(main|shared)",
            r"/opt/(wheels|py" "pi)",
            r"/ro" "ot/",
            r"\bcla" "ude",
        ]
    ),
    re.IGNORECASE,
)


def test_no_file_names_a_package_host_or_a_path_of_one_machine() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    texts = [
        path for path in files if Path(path).suffix in {"", ".py", ".md", ".toml", ".in", ".patch", ".sh", ".yaml"}
    ]
    assert len(texts) > 20
    named = {
        path: match.group()
        for path in texts
        if (ROOT / path).is_file() and (match := FORBIDDEN.search((ROOT / path).read_text()))
    }
    assert named == {}
