# SPDX-License-Identifier: Apache-2.0
"""The set-up: what it finds half-made, and when it has nothing to do."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The site-packages of an empty environment."""
    venv.create(tmp_path / "venv", with_pip=False)
    (folder,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    return folder


def install(site: Path, name: str, *, recorded: int = 5) -> Path:
    """A distribution of one module of 5 bytes, as pip leaves it; returns its dist-info folder."""
    site.joinpath(f"{name}.py").write_text("x = 1")
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    info.joinpath("INSTALLER").write_text("pip\n")
    record = [f"{name}.py,,{recorded}", f"__pycache__/{name}.pyc,,", f"{info.name}/METADATA,,", f"{info.name}/RECORD,,"]
    info.joinpath("RECORD").write_text("\n".join(record) + "\n")
    return info


def repair(site: Path) -> str:
    python = site.parents[2] / "bin" / "python"
    done = subprocess.run([python, ROOT / ".ci" / "repair.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_whole_installation_is_left_alone(site: Path) -> None:
    info = install(site, "whole")
    assert repair(site) == ""
    assert info.exists()


@pytest.mark.parametrize("damage", ["no installer", "no record", "file missing", "file cut short"])
def test_a_half_made_installation_is_forgotten_so_that_pip_makes_it_again(site: Path, damage: str) -> None:
    whole = install(site, "whole")
    half = install(site, "half", recorded=9 if damage == "file cut short" else 5)
    if damage == "no installer":
        half.joinpath("INSTALLER").unlink()
    elif damage == "no record":
        half.joinpath("RECORD").unlink()
    elif damage == "file missing":
        site.joinpath("half.py").unlink()
    assert "half-1.0" in repair(site)
    assert not half.exists()
    assert whole.exists()


def test_what_pip_had_set_aside_in_an_upgrade_is_removed(site: Path) -> None:
    site.joinpath("~alf").mkdir()
    install(site, "half")
    repair(site)
    assert not site.joinpath("~alf").exists()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose set-up has finished, as far as the stamp and the interpreter tell."""
    for name in ("pyproject.toml", "setup.py", ".ci/setup", ".ci/repair.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    venv.create(tmp_path / ".venv", with_pip=False)
    files = ("pyproject.toml", "setup.py", ".ci/setup", ".ci/repair.py")
    content = b"".join((tmp_path / name).read_bytes() for name in files)
    (tmp_path / ".venv" / ".setup-stamp").write_text(f"{hashlib.sha256(content).hexdigest()} {tmp_path}")
    return tmp_path


def set_up(checkout: Path) -> subprocess.CompletedProcess[str]:
    """Runs the set-up where no interpreter can be found: it cannot get past the first step."""
    environment = {**os.environ, "PYTHON": "/no/such/python"}
    return subprocess.run([checkout / ".ci" / "setup"], env=environment, capture_output=True, text=True, timeout=60)


def test_a_finished_set_up_does_nothing(checkout: Path) -> None:
    done = set_up(checkout)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("change", ["requirements", "interpreter", "moved"])
def test_a_set_up_that_no_longer_fits_starts_again_and_says_what_is_missing(checkout: Path, change: str) -> None:
    if change == "requirements":
        (checkout / "pyproject.toml").write_text((checkout / "pyproject.toml").read_text() + "\n")
    elif change == "interpreter":
        (checkout / ".venv" / "bin" / "python").unlink()
    else:
        checkout = checkout.rename(checkout.with_name("moved"))
    done = set_up(checkout)
    assert done.returncode == 1
    assert "3.11 to 3.14" in done.stderr
    assert "/no/such/python" in done.stderr
    assert "run it again to go on" in done.stderr
    assert not (checkout / ".venv" / ".setup-stamp").exists()
