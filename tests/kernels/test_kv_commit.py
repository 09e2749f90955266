# SPDX-License-Identifier: Apache-2.0
"""Moving accepted nodes' K/V as a kernel, against its reference and against a move of one node after the other."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import Cases
from vllm_spec_plugins.kernels import kv_commit as module
from vllm_spec_plugins.kernels.kv_commit import Pointers, kv_commit, kv_commit_reference

LAYOUTS = ("heads first", "positions first", "layers together", "padded")


@dataclass
class Memory:
    """Caches of random bytes, and all the memory that they stand in, what lies between and behind them included."""

    everything: Tensor
    caches: list[Tensor]


@dataclass
class Step:
    """Arguments of a commit. B requests, block tables of R rows."""

    block_table: Tensor
    root: Tensor
    path: Tensor
    num_accepted: Tensor
    slots: Tensor | None


def pick(low: int, high: int, rng: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=rng))


def memory(layers: int, shape: tuple[int, ...], dtype: torch.dtype, layout: str, rng: torch.Generator) -> Memory:
    """Caches [blocks, G, P, E], the same logical shape in different physical orders."""
    blocks, heads, positions, length = shape
    gap = 3 if layout == "padded" else 0
    size = layers * blocks * heads * positions * (length + gap) + 16
    everything = torch.randint(256, (size * dtype.itemsize,), generator=rng, dtype=torch.uint8)
    content = everything.view(dtype)[:-16]
    if layout == "layers together":
        caches = content.view(blocks, layers, heads, positions, length).unbind(1)
    elif layout == "positions first":
        caches = content.view(layers, blocks, positions, heads, length).transpose(2, 3).unbind(0)
    else:
        caches = content.view(layers, blocks, heads, positions, length + gap)[..., :length].unbind(0)
    return Memory(everything, list(caches))


def random_step(batch: int, depth: int, block_size: int, blocks: int, rng: torch.Generator) -> Step:
    """Roots anywhere, ascending paths, blocks that no two requests share."""
    count = torch.randint(depth + 1, (batch,), generator=rng)
    path = torch.randint(1 << 40, (batch, depth), generator=rng)  # what stands behind the last node is never read
    most = blocks // batch
    root = torch.empty(batch, dtype=torch.int64)
    for b in range(batch):
        accepted = int(count[b])
        nodes = accepted + pick(0, 1, rng) * pick(0, 12, rng)  # often just a chain
        path[b, :accepted] = (torch.randperm(nodes, generator=rng)[:accepted] + 1).sort().values
        root[b] = pick(0, most * block_size - 1 - nodes, rng)
    rows = batch + pick(0, 3, rng)
    order = torch.randperm(rows, generator=rng)[:batch]
    table = torch.full((rows, most), 1 << 30, dtype=torch.int32)
    table[order] = torch.randperm(blocks, generator=rng)[: batch * most].view(batch, most).int()
    if pick(0, 1, rng):
        return Step(table, root, path, count, order.to((torch.int32, torch.int64)[pick(0, 1, rng)]))
    return Step(table[order], root, path, count, None)


def moved(before: Memory, after: Memory, step: Step) -> None:
    """Write into `after`, node by node, what stands in `before`."""
    size = before.caches[0].shape[2]
    for b in range(len(step.root)):
        table = step.block_table[b if step.slots is None else int(step.slots[b])]
        for k in range(int(step.num_accepted[b])):
            source, target = int(step.root[b] + step.path[b, k]), int(step.root[b]) + k + 1
            for old, new in zip(before.caches, after.caches, strict=True):
                content = old[table[source // size], :, source % size]
                new[table[target // size], :, target % size] = content


def twin(of: Memory) -> Memory:
    """A copy, its caches at the same places."""
    everything = of.everything.clone()
    dtype, start = of.caches[0].dtype, of.everything.data_ptr()
    whole = everything.view(dtype)
    places = [(each, (each.data_ptr() - start) // dtype.itemsize) for each in of.caches]
    return Memory(everything, [whole.as_strided(each.shape, each.stride(), at) for each, at in places])


def test_every_byte_is_where_a_move_of_one_node_after_the_other_leaves_it(
    cases: Cases, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TILE_ELEMENTS", 32)
    met = set()
    for draw in cases(module.kv_commit_kernel):
        monkeypatch.setattr(module, "TILE_NODES", draw.one_of(1, 2, 4, 4, 8))
        # vLLM allocates caches of 8-bit floats as bytes.
        dtype, layout = (
            draw.one_of(torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn),
            draw.one_of(*LAYOUTS),
        )
        met |= {dtype, layout}
        batch, depth, size = draw.number(1, 4), draw.number(1, 9), draw.one_of(4, 5, 16)
        blocks = batch * (2 + -(-(depth + 13) // size)) + draw.number(0, 3)
        shape = (blocks, draw.number(1, 3), size, 2 * draw.number(1, 13))
        before = memory(draw.number(1, 3), shape, dtype, layout, rng)
        got, right, expected = twin(before), twin(before), twin(before)
        step = random_step(batch, depth, size, blocks, rng)
        arguments = (step.block_table, step.root, step.path, step.num_accepted, step.slots)
        moved(before, expected, step)
        kv_commit(Pointers.of(got.caches), *arguments)
        kv_commit_reference(Pointers.of(right.caches), *arguments)
        assert torch.equal(got.everything, expected.everything)
        assert torch.equal(right.everything, expected.everything)
    assert len(met) == 4 + len(LAYOUTS)


def test_a_path_whose_targets_are_its_own_sources_is_moved_as_if_all_were_read_first(rng: torch.Generator) -> None:
    """Rows 2 to 21 go to 1 to 20: every target but the first is a source, within a tile and between tiles."""
    before = memory(2, (3, 2, 16, 8), torch.float32, "heads first", rng)
    expected, got = twin(before), twin(before)
    path = torch.arange(2, 22).unsqueeze(0)
    step = Step(torch.tensor([[2, 0]], dtype=torch.int32), torch.tensor([3]), path, torch.tensor([20]), None)
    moved(before, expected, step)
    kv_commit(Pointers.of(got.caches), step.block_table, step.root, step.path, step.num_accepted)
    assert torch.equal(got.everything, expected.everything)
    assert not torch.equal(got.everything, before.everything)


def test_a_chain_and_a_rejected_tree_touch_no_cache() -> None:
    """The addresses lead nowhere: any access would end the process."""
    cache = torch.zeros(2, 1, 4, 8)
    nowhere = Pointers((cache,), torch.tensor([8]), 4, False)
    table = torch.zeros(3, 1, dtype=torch.int32)
    path = torch.tensor([[1, 2, 3], [2, 3, 0], [1, 2, 9]])
    kv_commit(nowhere, table, torch.zeros(3, dtype=torch.int64), path, torch.tensor([3, 0, 2]))


def test_nothing_is_launched_for_no_request_and_for_trees_without_depth() -> None:
    caches = Pointers.of([torch.zeros(2, 1, 4, 8)])
    none = torch.zeros(0, dtype=torch.int64)
    kv_commit(caches, torch.zeros(0, 1, dtype=torch.int32), none, torch.zeros(0, 3, dtype=torch.int64), none)
    one = torch.zeros(1, dtype=torch.int64)
    kv_commit(caches, torch.zeros(1, 1, dtype=torch.int32), one, torch.zeros(1, 0, dtype=torch.int64), one)


@pytest.mark.parametrize(
    ("dtype", "length", "gap", "unit", "aligned"),
    [
        (torch.bfloat16, 64, 0, 4, True),
        (torch.float32, 3, 0, 4, False),
        (torch.bfloat16, 6, 1, 2, False),
        (torch.float8_e4m3fn, 32, 0, 4, True),
        (torch.uint8, 64, 0, 4, True),
        (torch.float8_e4m3fn, 6, 0, 2, False),
        (torch.float8_e4m3fn, 7, 0, 1, False),
    ],
)
def test_elements_are_moved_in_the_widest_words_that_divide_them(
    dtype: torch.dtype, length: int, gap: int, unit: int, aligned: bool
) -> None:
    base = torch.zeros(2, 4, 1, 4, length + gap, dtype=torch.float32).to(dtype)
    caches = Pointers.of(list(base[..., :length].unbind(0)))
    assert (caches.unit, caches.aligned) == (unit, aligned)
    assert caches.table.tolist() == [each.data_ptr() for each in base]


def test_a_cache_that_two_layers_share_is_moved_once(rng: torch.Generator) -> None:
    before = memory(2, (3, 2, 16, 8), torch.float32, "heads first", rng)
    expected, got = twin(before), twin(before)
    table = torch.tensor([[2, 0]], dtype=torch.int32)
    step = Step(table, torch.tensor([3]), torch.arange(2, 7).unsqueeze(0), torch.tensor([5]), None)
    moved(before, expected, step)
    layers = [*got.caches, got.caches[1], got.caches[0].view_as(got.caches[0])]
    kv_commit(Pointers.of(layers), step.block_table, step.root, step.path, step.num_accepted)
    assert torch.equal(got.everything, expected.everything)


def test_caches_that_one_table_cannot_serve_are_refused() -> None:
    cache = torch.zeros(4, 2, 8, 6)
    for others, sentence in (
        ([torch.zeros(4, 2, 8, 8)], "geometry"),
        ([torch.zeros(4, 8, 2, 6).transpose(1, 2)], "geometry"),
        ([torch.zeros(4, 2, 8, 6, dtype=torch.int32)], "type"),
    ):
        with pytest.raises(AssertionError, match=sentence):
            Pointers.of([cache, *others])
    with pytest.raises(AssertionError, match="strides"):
        Pointers.of([cache.transpose(2, 3)])


def test_arguments_of_another_shape_or_type_are_refused() -> None:
    caches = Pointers.of([torch.zeros(4, 1, 4, 8)])
    table, number = torch.zeros(2, 2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    path = torch.zeros(2, 3, dtype=torch.int64)
    for broken in (
        (table.long(), number, path, number, None),
        (table, number[:1], path, number, None),
        (table, number, path.int(), number, None),
        (table, number, path, number.int(), None),
        (table[:1], number, path, number, None),
        (table, number, path, number, number[:1]),
        (table, number, path.T.contiguous().T, number, None),
    ):
        with pytest.raises(AssertionError):
            kv_commit(caches, *broken)


def test_the_comparison_notices_one_node_in_the_wrong_place(rng: torch.Generator) -> None:
    """A control: the path of the comparison is off by one row."""
    before = memory(1, (8, 2, 4, 6), torch.bfloat16, "positions first", rng)
    expected, got = twin(before), twin(before)
    table = torch.arange(8, dtype=torch.int32).unsqueeze(0)
    step = Step(table, torch.tensor([5]), torch.tensor([[1, 3, 6]]), torch.tensor([3]), None)
    moved(before, expected, step)
    kv_commit(Pointers.of(got.caches), step.block_table, step.root, torch.tensor([[1, 3, 7]]), step.num_accepted)
    assert not torch.equal(got.everything, expected.everything)
