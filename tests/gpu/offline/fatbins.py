# SPDX-License-Identifier: Apache-2.0
"""Drops the code of other GPUs from a CUDA extension, so that what is left compresses well. No offset and no size changes.

    python fatbins.py FILE                  says what is in it
    python fatbins.py FILE OUT 90 [...]     keeps compute capability 9.0 (and 9.0a) in OUT

An extension holds many fat binaries: a header of 16 bytes (magic, version, header size, size of what follows), then elements,
one per GPU, each with a header of its own: kind, header size, payload size and architecture. What is kept moves to the front,
the header's size says so, and zeros follow to the old end. Where a fat binary has nothing for the GPUs asked for, what they
can run is kept: PTX of an older one, or machine code of an older one with the same major number; where it has not even that, it
stays as it is.
"""

from __future__ import annotations

import struct
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

MAGIC = struct.pack("<I", 0xBA55ED50)
HEADER = struct.Struct("<IHHQ")  # magic, version, header size, size of the elements
ELEMENT = struct.Struct("<HHIQ")  # kind, version, header size, payload size
ARCHITECTURE = 28  # where it stands in an element's header, as an uint32
PTX, CODE = 1, 2


@dataclass(frozen=True)
class Element:
    begin: int
    size: int
    kind: int
    architecture: int


def fat_binaries(data: bytes | bytearray) -> Iterator[tuple[int, int, list[Element]]]:
    """(offset of the header, end, elements) of each fat binary. Raises ValueError on an element that makes no sense."""
    at = data.find(MAGIC)
    while at >= 0:
        _, version, header, size = HEADER.unpack_from(data, at) if at + HEADER.size <= len(data) else (0, 0, 0, 0)
        end = at + header + size
        if version != 1 or header != HEADER.size or size == 0 or end > len(data):
            at = data.find(MAGIC, at + 4)  # four bytes that look like one
            continue
        yield at, end, list(_elements(data, at + header, end))
        at = data.find(MAGIC, end)


def _elements(data: bytes | bytearray, at: int, end: int) -> Iterator[Element]:
    while at < end:
        kind, _, header, size = ELEMENT.unpack_from(data, at)
        if not 64 <= header <= 4096 or at + header + size > end:
            raise ValueError(f"no element of a fat binary at {at:#x}: kind {kind}, header {header}, payload {size}")
        (architecture,) = struct.unpack_from("<I", data, at + ARCHITECTURE)
        yield Element(at, header + size, kind, architecture & 0xFFFF)
        at += header + size


def reduce(data: bytearray, keep: Collection[int]) -> int:
    """Keep what GPUs of the compute capabilities `keep` (90 is 9.0) run; returns how many bytes became zeros."""
    zeros = 0
    for at, end, elements in fat_binaries(data):
        kept = [e for e in elements if e.kind == CODE and e.architecture in keep] or [
            e
            for e in elements
            if e.architecture <= max(keep) and (e.kind == PTX or e.architecture // 10 == max(keep) // 10)
        ]
        if not kept:
            continue
        content = b"".join(data[e.begin : e.begin + e.size] for e in kept)
        first = at + HEADER.size
        zeros += end - first - len(content)
        HEADER.pack_into(data, at, struct.unpack("<I", MAGIC)[0], 1, HEADER.size, len(content))
        data[first:end] = content.ljust(end - first, b"\0")
    return zeros


def main(path: str, out: str | None = None, *keep: str) -> None:
    data = bytearray(Path(path).read_bytes())
    sizes: Counter[tuple[int, int]] = Counter()
    for _, _, elements in fat_binaries(data):
        for element in elements:
            sizes[element.architecture, element.kind] += element.size
    for (architecture, kind), size in sorted(sizes.items()):
        print(
            f"{Path(path).name}: sm_{architecture} {({PTX: 'PTX', CODE: 'code'}).get(kind, kind)}: {size / 1e6:.1f} MB"
        )
    if out:
        print(f"{reduce(data, {int(each) for each in keep}) / 1e6:.1f} of {len(data) / 1e6:.1f} MB are zeros now")
        Path(out).write_bytes(data)


if __name__ == "__main__":
    if len(sys.argv) not in (2, *range(4, 20)):
        sys.exit(__doc__)
    main(*sys.argv[1:])
