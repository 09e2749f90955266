# SPDX-License-Identifier: Apache-2.0
"""Tree attention as it would be launched on GPUs that are not here: compiled, without spills, and in what parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.unit.kernels.aot import SHARED_LIMIT, Usage, compile_for
from vllm_spec_plugins.kernels import tree_attention as module

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Launches(dict[Any, Any]):
    """Stands for a kernel: remembers what it would have been launched with."""

    def __missing__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.update({grid: (args, kwargs)})


def launched(
    monkeypatch: pytest.MonkeyPatch,
    capability: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    cache: torch.dtype | None = None,
    dim: int = 128,
    batch: int = 8,
    groups: int = 8,
    rows: int = 64,
    words: int = 1,
    size: int = 16,
    **arguments: Any,
) -> dict[str, tuple[tuple[int, ...], Usage]]:
    """Grid and usage of each kernel that `tree_attention` launches for tensors of these shapes."""

    def tensor(*shape: int, of: torch.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=of, device="meta")

    monkeypatch.setattr(module, "_machine", lambda device: (capability, 132))
    names = ("tree_attention_kernel", "merge_kernel")
    kernels = {name: getattr(module, name) for name in names}
    calls = {name: Launches() for name in names}
    for name in names:
        monkeypatch.setattr(module, name, calls[name])
    blocks = tensor(64, groups, size, 2 * dim, of=cache or dtype)
    query = tensor(batch * rows, 4 * groups, dim, of=dtype)
    scale = tensor(1, of=torch.float32) if cache else None
    module.tree_attention(
        query,
        *blocks.transpose(1, 2).split(dim, -1),
        torch.empty_like(query),
        start=tensor(batch + 1, of=torch.int32),
        prefix=tensor(batch, of=torch.int32),
        behind=tensor(batch, of=torch.int32),
        words=tensor(batch * rows, words, of=torch.int64),
        block_table=tensor(batch, 512, of=torch.int32),
        max_rows=rows,
        scale=dim**-0.5,
        depth=tensor(batch * rows, of=torch.int32),
        k_scale=scale,
        v_scale=scale,
        **arguments,
    )
    monkeypatch.undo()
    usages = {}
    for name, call in calls.items():
        for grid, (args, kwargs) in call.items():
            usages[name] = (grid, usage(kernels[name], args, dict(kwargs), capability))
    return usages


def usage(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], capability: int) -> Usage:
    warps, stages = kwargs.pop("num_warps"), kwargs.pop("num_stages", 3)
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    fixed = {param.name for param in kernel.params if param.is_constexpr}
    plain = (name for name, value in values.items() if value is None or (type(value) is int and value == 1))
    constants = {name: values[name] for name in {*fixed, *plain}}
    signature = {
        name: TYPES[value.dtype] if isinstance(value, torch.Tensor) else "fp32" if isinstance(value, float) else "i32"
        for name, value in values.items()
        if name not in constants
    }
    aligned = [name for name in signature if isinstance(values[name], int) and values[name] % 16 == 0]
    return compile_for(kernel, signature, constants, capability, warps, stages, aligned=aligned)


@pytest.mark.parametrize(
    ("capability", "shapes"),
    [
        (90, {"splits": 1}),
        (80, {"splits": 1}),
        (90, {"rows": 4, "batch": 1, "cache": torch.float8_e4m3fn, "words": 4, "soft_cap": 30.0}),
        (80, {"dim": 256, "rows": 16, "window": 4096, "splits": 1}),
        (90, {"dtype": torch.float32, "rows": 4, "splits": 1}),
    ],
)
def test_what_is_launched_fits_the_gpu_and_does_not_spill(
    capability: int, shapes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = launched(monkeypatch, capability, **shapes)
    assert kernels.keys() == {"tree_attention_kernel", *([] if "splits" in shapes else ["merge_kernel"])}
    # Tiles for 9.0 alone may have what 9.0 has, all others run everywhere.
    limit = SHARED_LIMIT[90] if (capability, shapes) == (90, {"splits": 1}) else min(SHARED_LIMIT.values())
    for grid, used in kernels.values():
        assert used.spills == 0, (grid, used)
        assert used.shared < limit, (grid, used)


def test_the_smallest_tile_that_holds_all_pairs_is_taken() -> None:
    for pairs, tile in ((1, 16), (16, 16), (17, 32), (33, 64), (65, 128), (128, 128)):
        assert module.tile_for(torch.bfloat16, 80, pairs).pairs == tile


def test_more_pairs_than_a_tile_holds_take_the_largest_that_is_not_mostly_padding() -> None:
    for pairs, tile in ((132, 64), (171, 128), (256, 128), (260, 128), (2000, 128)):
        assert module.tile_for(torch.bfloat16, 128, pairs).pairs == tile
    assert module.tile_for(torch.float16, 256, 65).pairs == 32
    assert module.tile_for(torch.float32, 128, 17).pairs == module.tile_for(torch.float32, 128, 2000).pairs == 16


def test_only_9_0_takes_the_tiles_that_only_it_has_room_for() -> None:
    tokens = [module.tile_for(torch.bfloat16, 128, 128, capability).tokens for capability in (80, 89, 90, 100, 120)]
    assert tokens == [32, 32, 64, 32, 32]


def test_tiles_ascend_and_their_steps_fit_one_shift_of_two_words() -> None:
    for tiles in module._TILES.values():
        assert [tile.pairs for tile in tiles] == sorted({tile.pairs for tile in tiles})
        assert all(16 <= tile.tokens <= 64 and tile.pairs >= 16 for tile in tiles)
    assert all(tile.tokens <= 64 and tile.pairs == key[2] for key, tile in module._TILES_90.items())


@pytest.mark.parametrize(
    ("pairs", "batch", "bound", "splits"),
    [
        (256, 8, 32768, 1),  # 128 programs of a machine that runs 132
        (256, 1, 32768, 8),  # 16 programs
        (16, 1, 32768, 32),  # 8 programs, 396 places: no more than the most
        (16, 1, 1024, 8),  # two steps of 64 tokens each
        (16, 1, 100, 1),
        (16, 64, 32768, 1),  # more programs than places
    ],
)
def test_a_context_is_split_until_the_machine_is_full(pairs: int, batch: int, bound: int, splits: int) -> None:
    tile = module.tile_for(torch.bfloat16, 128, pairs)
    assert module.choose_splits(tile, pairs, batch, 8, bound, 132) == splits


def test_traffic_is_keys_and_values_once_and_queries_and_outputs() -> None:
    key = torch.empty(1000, 8, 128, dtype=torch.bfloat16)
    query = torch.empty(64, 32, 128, dtype=torch.bfloat16)
    assert module.traffic(1000, 64, 32, 8, 128, torch.bfloat16) == 2 * key.nbytes + 2 * query.nbytes
    quantized = module.traffic(1000, 64, 32, 8, 128, torch.bfloat16, torch.float8_e5m2)
    assert quantized == key.nbytes + 2 * query.nbytes
