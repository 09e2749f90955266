# SPDX-License-Identifier: Apache-2.0
"""Makes a checkout usable without pip: its metadata in a folder on the path, and its kernels where they are imported from.

    python link.py CHECKOUT SITE

Plugins are found by their entry points, which are metadata of an installed distribution. Needs Python 3.11 and nothing else.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path


def link(checkout: Path, site: Path) -> None:
    """SITE gets the metadata; the checkout itself is to be on the path. Done again after pyproject.toml changed."""
    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    name = project["name"].replace("-", "_")
    for old in site.glob(f"{name}-*.dist-info"):
        for file in old.iterdir():
            file.unlink()
        old.rmdir()
    metadata = site / f"{name}-{project['version']}.dist-info"
    metadata.mkdir(parents=True)
    metadata.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    groups: Mapping[str, Mapping[str, str]] = {"console_scripts": project["scripts"], **project["entry-points"]}
    metadata.joinpath("entry_points.txt").write_text(
        "\n".join(
            f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in groups.items()
        )
    )
    kernels = checkout / name / "kernels"
    if not kernels.exists():
        kernels.symlink_to(Path("..", "kernels"))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    link(*map(Path, sys.argv[1:]))
