# SPDX-License-Identifier: Apache-2.0
"""K/V commit: the accepted nodes' keys and values move to the slots that plain decoding would have written.

Node path[k] (its row) of a request stands at position root + path[k]; plain decoding has it at root + k + 1. All layers are
moved by one launch: they have the same geometry, and a table on the device says where each begins. Only bytes are moved,
whatever the type.

Memory traffic: 2 * layers * heads * 2 * D * itemsize bytes for each node that moves, none for one that stands right (all of
a chain's). With 32 layers, 8 heads, D = 128 and bfloat16 that is 256 KiB per node: batch 64 with three nodes each to move is
50 MB, 12 us at 4.3 TB/s (arithmetic, not measured).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Nodes and elements that one program holds in registers between reading and writing.
TILE_NODES, TILE_ELEMENTS = 8, 512


@dataclass(frozen=True, eq=False)
class Pointers:
    """Paged caches of one geometry, [blocks, G, P, E] each, and the table of where they begin.

    Attributes:
        caches: each once; kept, so that the addresses stay valid.
        table: [L] int64 addresses, on the caches' device.
        unit: bytes that are moved as one element: 4, 2 or 1, which divides everything below.
        aligned: every address, stride and length is a multiple of 16 bytes, so that loads can be wide.
    """

    caches: tuple[Tensor, ...]
    table: Tensor
    unit: int
    aligned: bool

    @classmethod
    def of(cls, caches: Sequence[Tensor]) -> Pointers:
        """Copies the addresses to the device: once, not in a step. Caches of different geometry need a table each; a cache that
        several layers share stands in it once, for it must be moved once.
        """
        caches = list({cache.data_ptr(): cache for cache in caches}.values())
        first = caches[0]
        assert first.dim() == 4 and first.stride(3) == 1, f"cache of {tuple(first.shape)}, strides {first.stride()}"
        for cache in caches:
            assert cache.shape == first.shape and cache.stride() == first.stride(), "caches differ in geometry"
            assert cache.dtype == first.dtype and cache.device == first.device, "caches differ in type or device"
        addresses = [cache.data_ptr() for cache in caches]
        sizes = [each * first.itemsize for each in (*first.stride()[:3], first.shape[3])]
        divides = {width: all(size % width == 0 for size in (*sizes, *addresses)) for width in (1, 2, 4, 16)}
        unit = max(width for width in (1, 2, 4) if divides[width])
        return cls(tuple(caches), torch.tensor(addresses, device=first.device), unit, divides[16])


def kv_commit_reference(
    caches: Pointers,
    block_table: Tensor,
    root: Tensor,
    path: Tensor,
    num_accepted: Tensor,
    slots: Tensor | None = None,
) -> None:
    """As `kv_commit`, in torch: every source is read before any target is written; a gather and a scatter per layer."""
    block_size = caches.caches[0].shape[2]
    step = torch.arange(path.shape[1], device=path.device)
    request, place = (step < num_accepted.unsqueeze(1)).nonzero(as_tuple=True)
    line = request if slots is None else slots[request].long()

    def slot(position: Tensor) -> tuple[Tensor, Tensor]:
        return block_table[line, position // block_size].long(), position % block_size

    source, target = slot(root[request] + path[request, place]), slot(root[request] + place + 1)
    for cache in caches.caches:
        # As integers: not every type can be indexed.
        content = cache.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[cache.itemsize])
        content[target[0], :, target[1]] = content[source[0], :, source[1]]


@triton.jit
def kv_commit_kernel(
    caches_ptr,
    block_table_ptr,
    block_table_row_stride,
    root_ptr,
    path_ptr,
    path_row_stride,
    num_accepted_ptr,
    slots_ptr,
    block_stride,
    head_stride,
    slot_stride,
    num_elements,
    max_depth,
    HAS_SLOTS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    TILE_NODES: tl.constexpr,
    TILE_ELEMENTS: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    count = tl.load(num_accepted_ptr + request).to(tl.int32)
    path_ptr += request * path_row_stride
    place = tl.arange(0, BLOCK_DEPTH)
    rows = tl.load(path_ptr + place, mask=(place < count) & (place < max_depth), other=0)
    # A path's rows ascend, so rows that stand right are its first ones, and 0 (nothing) is below any place.
    first = tl.sum((rows == place + 1).to(tl.int32), axis=0)
    if first >= count:
        return
    line = request
    if HAS_SLOTS:
        line = tl.load(slots_ptr + request).to(tl.int64)
    block_table_ptr += line * block_table_row_stride
    root = tl.load(root_ptr + request).to(tl.int32)

    address = tl.load(caches_ptr + tl.program_id(1))
    if UNIT == 4:
        cache_ptr = address.to(tl.pointer_type(tl.int32))
    elif UNIT == 2:
        cache_ptr = address.to(tl.pointer_type(tl.int16))
    else:
        cache_ptr = address.to(tl.pointer_type(tl.int8))
    if ALIGNED:
        cache_ptr = tl.multiple_of(cache_ptr, 16)
    element = tl.program_id(2) * TILE_ELEMENTS + tl.arange(0, TILE_ELEMENTS)
    head = element // HEAD_SIZE
    within = (head.to(tl.int64) * head_stride + element % HEAD_SIZE)[None, :]
    exists = (element < num_elements)[None, :]

    # Nobody else touches these elements of the request's slots, and the nodes of a tile are all read before any is written:
    # the barrier sees to it across the program's threads. Tiles follow each other safely because rows ascend (path[k] > k):
    # what a tile reads lies behind every place that earlier ones wrote, and what it writes it writes behind its own
    # barrier, which all reads of earlier tiles have passed.
    for begin in range(first, count, TILE_NODES):
        step = begin + tl.arange(0, TILE_NODES)
        moves = step < count
        source = root + tl.load(path_ptr + step, mask=moves, other=0).to(tl.int32)
        target = root + step + 1
        from_block = tl.load(block_table_ptr + source // BLOCK_SIZE, mask=moves, other=0).to(tl.int64)
        to_block = tl.load(block_table_ptr + target // BLOCK_SIZE, mask=moves, other=0).to(tl.int64)
        from_slot = from_block * block_stride + (source % BLOCK_SIZE) * slot_stride
        to_slot = to_block * block_stride + (target % BLOCK_SIZE) * slot_stride
        mask = moves[:, None] & exists
        content = tl.load(cache_ptr + from_slot[:, None] + within, mask=mask)
        tl.debug_barrier()
        tl.store(cache_ptr + to_slot[:, None] + within, content, mask=mask)


def kv_commit(
    caches: Pointers,
    block_table: Tensor,
    root: Tensor,
    path: Tensor,
    num_accepted: Tensor,
    slots: Tensor | None = None,
) -> None:
    """Move the accepted nodes' K/V, in all layers of `caches`.

    Args:
        caches: L layers of [blocks, G, P, E]: G heads, P positions per block, E contiguous elements of a head and position (keys
            and values). In memory heads and positions may stand in either order.
        block_table: [B, M] int32, the blocks of each request; with `slots` [R, M].
        root: [B] int64, position of each request's root.
        path: [B, D] int64, rows of the accepted nodes, ascending (`Acceptance.path`).
        num_accepted: [B] int64, accepted nodes; 0 = nothing to do, and then the request's other arguments are not read.
        slots: [B] int32 or int64, each request's row of `block_table`; None = request b has row b.
    """
    _, heads, block_size, length = caches.caches[0].shape
    batch, max_depth = path.shape
    assert root.shape == num_accepted.shape == (batch,) and root.is_contiguous() and num_accepted.is_contiguous()
    assert root.dtype == path.dtype == num_accepted.dtype == torch.int64 and block_table.dtype == torch.int32
    assert path.stride(1) == 1 or max_depth <= 1
    assert block_table.dim() == 2 and block_table.stride(1) == 1
    if slots is None:
        assert len(block_table) == batch
    else:
        assert slots.shape == (batch,) and slots.is_contiguous() and slots.dtype in (torch.int32, torch.int64)
    if batch == 0 or max_depth == 0:
        return
    first, unit = caches.caches[0], caches.unit
    block_stride, head_stride, slot_stride = (stride * first.itemsize // unit for stride in first.stride()[:3])
    head_size = length * first.itemsize // unit
    kv_commit_kernel[(batch, len(caches.caches), triton.cdiv(heads * head_size, TILE_ELEMENTS))](
        caches.table,
        block_table,
        block_table.stride(0),
        root,
        path,
        path.stride(0),
        num_accepted,
        slots,
        block_stride,
        head_stride,
        slot_stride,
        heads * head_size,
        max_depth,
        HAS_SLOTS=slots is not None,
        HEAD_SIZE=head_size,
        BLOCK_SIZE=block_size,
        UNIT=unit,
        ALIGNED=caches.aligned,
        BLOCK_DEPTH=triton.next_power_of_2(max_depth),
        TILE_NODES=TILE_NODES,
        TILE_ELEMENTS=TILE_ELEMENTS,
        num_warps=4,
        num_stages=1,
    )
