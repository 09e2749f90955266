# SPDX-License-Identifier: Apache-2.0
"""`kernels/` in the repository's root against transformers, which looks for a package of that name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, *path: Path, cwd: Path = ROOT) -> str:
    """Runs the code in a process of its own with these folders in front of sys.path; returns what it printed."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


PROBE = """
import importlib.util
from transformers.utils.import_utils import is_kernels_available
import transformers.integrations.hub_kernels
print(importlib.util.find_spec("kernels").origin, is_kernels_available(), sep="\\n")
"""


@pytest.fixture
def real_kernels(tmp_path: Path) -> Path:
    """A stand-in for the `kernels` distribution: a version that transformers accepts and every name it asks for."""
    package = tmp_path / "kernels"
    package.mkdir()
    package.joinpath("__init__.py").write_text("def __getattr__(name):\n    return type(name, (), {})\n")
    package.joinpath("layer.py").write_text("MARK = 'real'\n")
    metadata = tmp_path / "kernels-0.17.2.dist-info"
    metadata.mkdir()
    metadata.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n")
    return tmp_path


def test_transformers_sees_the_folder_and_does_not_take_it_for_the_package() -> None:
    origin, available = run(PROBE, ROOT).splitlines()
    assert Path(origin) == ROOT / "kernels" / "__init__.py"  # else this test shows nothing
    assert available == "False"


def test_the_real_package_is_found_behind_the_folder(real_kernels: Path) -> None:
    origin, available = run(PROBE, ROOT, real_kernels).splitlines()
    assert Path(origin) == real_kernels / "kernels" / "__init__.py"
    assert available == "True"
    mark = run("from kernels.layer import MARK; print(MARK)", ROOT, real_kernels)
    assert mark == "real"


def test_a_plain_folder_in_its_place_would_break_transformers(real_kernels: Path, tmp_path: Path) -> None:
    """The control: without the stepping aside, importing transformers' kernel integration fails."""
    plain = tmp_path / "plain"
    (plain / "kernels").mkdir(parents=True)
    (plain / "kernels" / "__init__.py").write_text("")
    with pytest.raises(AssertionError, match="cannot import name"):
        run(PROBE, plain, real_kernels, cwd=plain)


def test_two_checkouts_on_the_path_do_not_chase_each_other(tmp_path: Path) -> None:
    other = tmp_path / "kernels"
    other.mkdir()
    other.joinpath("__init__.py").write_text((ROOT / "kernels" / "__init__.py").read_text())
    assert run("import kernels; print(kernels.__file__)", ROOT, tmp_path) == str(other / "__init__.py")


def test_the_folder_costs_nothing_and_has_no_version() -> None:
    names = run(
        "import sys; before = set(sys.modules); import kernels;"
        "print([n for n in set(sys.modules) - before if n.partition('.')[0] not in sys.stdlib_module_names],"
        " hasattr(kernels, '__version__'))",
        ROOT,
    )
    assert names == "['kernels'] False"


def test_the_vllm_command_starts_from_the_root_with_the_root_on_the_path() -> None:
    command = Path(sys.executable).with_name("vllm")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([command, "--version"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith("0.32.")


@pytest.mark.parametrize("path", [(), (ROOT,)], ids=["installed", "root on the path"])
def test_the_project_imports_its_kernels_from_the_folder(path: tuple[Path, ...], tmp_path: Path) -> None:
    code = "import vllm_spec_plugins.kernels as k; print(k.__name__, k.__file__)"
    assert run(code, *path, cwd=tmp_path) == f"vllm_spec_plugins.kernels {ROOT / 'kernels' / '__init__.py'}"
