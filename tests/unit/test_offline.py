# SPDX-License-Identifier: Apache-2.0
"""What carries vLLM for CUDA to a machine without network: extensions reduced to one GPU, a checkout that needs no pip."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.offline import fatbins

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = ROOT / "tests" / "gpu" / "offline"
PTX, CODE = fatbins.PTX, fatbins.CODE


def element(kind: int, architecture: int, payload: bytes) -> bytes:
    header = bytearray(64)
    fatbins.ELEMENT.pack_into(header, 0, kind, 257, 64, len(payload))
    struct.pack_into("<I", header, fatbins.ARCHITECTURE, architecture)
    return bytes(header) + payload


def fat_binary(*elements: bytes) -> bytes:
    content = b"".join(elements)
    return fatbins.HEADER.pack(0xBA55ED50, 1, 16, len(content)) + content


def described(data: bytes | bytearray) -> list[list[tuple[int, int, bytes]]]:
    return [
        [(e.kind, e.architecture, bytes(data[e.begin + 64 : e.begin + e.size])) for e in elements]
        for _, _, elements in fatbins.fat_binaries(data)
    ]


def test_only_the_code_of_the_gpu_is_kept_and_everything_stays_in_its_place() -> None:
    first = fat_binary(element(CODE, 80, b"a" * 40), element(CODE, 90, b"b" * 24), element(PTX, 90, b"p" * 8))
    second = fat_binary(element(CODE, 90, b"c" * 16))
    # Four bytes that look like a fat binary's first, between two of them.
    data = bytearray(b"text" * 9 + first + b"rodata" + fatbins.MAGIC + b"no header" + second + b"end")
    before = bytes(data)
    assert fatbins.reduce(data, [90]) == 64 + 40 + 64 + 8
    assert described(data) == [[(CODE, 90, b"b" * 24)], [(CODE, 90, b"c" * 16)]]
    assert len(data) == len(before)
    begin = 36
    assert data[:begin] == before[:begin] and data[begin + len(first) :] == before[begin + len(first) :]
    assert data[begin + 16 + 64 + 24 : begin + len(first)] == bytes(64 + 40 + 64 + 8)


def test_where_nothing_is_for_the_gpu_what_it_can_run_is_kept() -> None:
    data = bytearray(
        fat_binary(element(CODE, 80, b"8" * 8), element(PTX, 80, b"p" * 8), element(CODE, 100, b"x" * 8))
        + fat_binary(element(CODE, 86, b"6" * 8), element(CODE, 100, b"x" * 8))
        + fat_binary(element(CODE, 100, b"x" * 8))
    )
    fatbins.reduce(data, [89])
    assert described(data) == [
        [(CODE, 80, b"8" * 8), (PTX, 80, b"p" * 8)],
        [(CODE, 86, b"6" * 8)],
        [(CODE, 100, b"x" * 8)],  # nothing that it can run: left alone
    ]


def test_an_element_that_makes_no_sense_is_an_error() -> None:
    broken = bytearray(fat_binary(element(CODE, 90, b"b" * 24)))
    struct.pack_into("<Q", broken, 16 + 8, 1 << 40)
    with pytest.raises(ValueError, match="no element of a fat binary at 0x10"):
        fatbins.reduce(broken, [90])


def test_a_linked_checkout_has_its_plugin_and_its_kernels_without_being_installed(tmp_path: Path) -> None:
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    checkout.mkdir()
    shutil.copy(ROOT / "pyproject.toml", checkout)
    for folder in ("vllm_spec_plugins", "kernels"):
        ignore = shutil.ignore_patterns("__pycache__", "kernels") if folder == "vllm_spec_plugins" else None
        shutil.copytree(ROOT / folder, checkout / folder, ignore=ignore)
    for _ in range(2):  # a second time does no harm
        subprocess.run([sys.executable, OFFLINE / "link.py", checkout, site], check=True)
    code = (
        "import sys, importlib.metadata as m; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "import vllm_spec_plugins.kernels as k; print(k.__file__)\n"
        "found = m.distribution('vllm-spec-plugins'); print(found.version)\n"
        "print(*sorted(e.load().__module__ for e in found.entry_points if e.group == 'vllm.general_plugins'))"
    )
    env = {**os.environ, "PYTHONPATH": f"{checkout}{os.pathsep}{site}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines == [
        str(checkout / "vllm_spec_plugins" / "kernels" / "__init__.py"),
        "0.1.0",
        "vllm_spec_plugins.plugin",
    ]
    names = site.joinpath("vllm_spec_plugins-0.1.0.dist-info", "entry_points.txt").read_text()
    assert "[vllm.general_plugins]\nspec_plugins = vllm_spec_plugins.plugin:register\n" in names


def test_installing_without_the_part_that_has_vllm_says_so(tmp_path: Path) -> None:
    part, site = tmp_path / "part-2", tmp_path / "site"
    part.mkdir()
    subprocess.run(["tar", "cJf", part / "more.tar.xz", "-C", str(OFFLINE), "link.py"], check=True)
    done = subprocess.run([OFFLINE / "install_there.sh", part, site], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"install_there.sh: {site} has no vLLM yet: install part 1 too\n"
    assert (site / "link.py").exists()


def test_the_gpu_suite_fails_without_a_gpu_and_says_why() -> None:
    """Not skipped: a run that tested nothing must not look like one that passed."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line]
    assert said == [f"Exit: tests/gpu needs a CUDA GPU, and torch {torch.__version__} finds none on this machine"]
    assert "passed" not in done.stdout and "skipped" not in done.stdout


@pytest.mark.parametrize("script", sorted(OFFLINE.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_valid_and_executable(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


def test_an_unknown_part_is_refused_before_anything_is_downloaded(tmp_path: Path) -> None:
    command = [OFFLINE / "make_parts.sh", tmp_path / "out"]
    env = {**os.environ, "PARTS": "4", "WORK": str(tmp_path / "work"), "PIP_NO_INDEX": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "make_parts.sh: there is no part 4; PARTS is some of 1 2 3\n")
