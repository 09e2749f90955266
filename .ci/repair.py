# SPDX-License-Identifier: Apache-2.0
"""Forget every distribution whose installation did not finish, so that pip installs it again.

pip unpacks a wheel, then writes INSTALLER and RECORD; it goes by the metadata alone when it says "already satisfied".
A distribution without one of them, or with a recorded file that is missing or of another size, is therefore one that an
interruption left half-made. Run inside the virtual environment by the set-up.
"""

from __future__ import annotations

import shutil
import sysconfig
from importlib.metadata import Distribution, distributions
from pathlib import Path


def is_whole(dist: Distribution) -> bool:
    """Whether pip finished this installation and its files are still there."""
    if dist.read_text("INSTALLER") is None or dist.read_text("RECORD") is None:
        return False
    for file in dist.files or []:
        if file.suffix == ".pyc":
            continue
        path = Path(str(dist.locate_file(file)))
        if not path.exists() or (file.size is not None and path.stat().st_size != file.size):
            return False
    return True


def main() -> None:
    site = Path(sysconfig.get_path("purelib"))
    for leftover in site.glob("~*"):  # what pip had set aside when it was stopped in an upgrade
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    for dist in list(distributions(path=[str(site)])):
        folder = site / f"{getattr(dist, '_path', '')}"
        if folder.suffix == ".dist-info" and not is_whole(dist):
            print(f"    half-installed, to be installed again: {folder.name.removesuffix('.dist-info')}")
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
