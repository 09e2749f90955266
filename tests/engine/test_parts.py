# SPDX-License-Identifier: Apache-2.0
"""The engine's parts on their own: tree attention, K/V commit, chain layout, support checks, hooks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_spec_plugins.tree.tree import TokenTree


def random_tree(batch: int, nodes: int, generator: torch.Generator) -> TokenTree:
    parents = torch.stack([torch.randint(j + 1, (batch,), generator=generator) for j in range(nodes)], 1)
    return TokenTree(torch.randint(50, (batch, nodes), generator=generator), parents)


@pytest.mark.parametrize("soft_cap", [0.0, 20.0])
@pytest.mark.parametrize(("heads", "groups", "dim"), [(8, 4, 32), (4, 4, 64), (6, 1, 80)])
@pytest.mark.parametrize("window", [0, 10, 37, 500])
@pytest.mark.parametrize("loops", [True, False])
def test_tree_attention_equals_dense_attention_over_prefix_ancestors_and_self(
    heads: int,
    groups: int,
    dim: int,
    soft_cap: float,
    window: int,
    loops: bool,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm_spec_plugins import compiled
    from vllm_spec_plugins.engine import attention
    from vllm_spec_plugins.engine.state import StepTrees

    generator = torch.Generator().manual_seed(seed)
    size, nodes = 32, 9
    prefix = torch.tensor([0, 5, 64, 70])
    drafts = np.array([9, 4, 1, 7])
    count = len(drafts)
    tree = random_tree(count, nodes, generator).truncate(torch.from_numpy(drafts))
    rows = drafts + 1
    trees = StepTrees(tree, rows.astype(np.int64), count, torch.from_numpy(np.repeat(np.arange(count), rows)), True)

    blocks = 1 + torch.randperm(15, generator=generator)[: count * 3].view(count, 3)
    cache = torch.randn(16, groups, size, 2 * dim, generator=generator)  # poisoned: random where nothing was written
    keys = torch.randn(count, 128, groups, dim, generator=generator)
    values = torch.randn(count, 128, groups, dim, generator=generator)
    for b in range(count):
        for position in range(int(prefix[b] + rows[b])):
            block, offset = int(blocks[b, position // size]), position % size
            attention.key_blocks(cache)[block, :, :, offset] = keys[b, position]
            attention.value_blocks(cache)[block, :, offset] = values[b, position]
        # Blocks in front of a window have been freed.
        blocks[b, : max(0, int(prefix[b]) - window + 1) // size if window else 0] = 0

    class Common:
        query_start_loc = torch.tensor([0, *np.cumsum(rows)], dtype=torch.int32)
        seq_lens = (prefix + torch.from_numpy(rows)).int()
        block_table_tensor = blocks.int()

    meta: Any = Common()
    laid = attention.tree_rows(trees, meta, size)
    total = int(rows.sum())
    query = torch.randn(total, heads, dim, generator=generator)
    monkeypatch.setattr(compiled, "use_loops", loops)
    found = torch.empty(total, heads * dim)
    attention.attend_tree(query, cache, laid, dim**-0.5, soft_cap, found, window)
    found = found.view(total, heads, dim)

    start = 0
    for b in range(count):
        length = int(prefix[b] + rows[b])
        sees = torch.zeros(rows[b], length, dtype=torch.bool)
        sees[:, : prefix[b]] = True
        sees[:, prefix[b] :] = tree.ancestors()[b, : rows[b], : rows[b]]
        if window:
            position = prefix[b] + tree.depth[b, : rows[b]]
            sees[:, : prefix[b]] &= torch.arange(int(prefix[b])) > (position - window).unsqueeze(1)
        k = keys[b, :length].repeat_interleave(heads // groups, 1)
        v = values[b, :length].repeat_interleave(heads // groups, 1)
        scores = torch.einsum("rhd,lhd->hrl", query[start : start + rows[b]], k) * dim**-0.5
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        weights = scores.masked_fill(~sees, float("-inf")).softmax(-1)
        expected = torch.einsum("hrl,lhd->rhd", weights, v)
        torch.testing.assert_close(found[start : start + rows[b]], expected, rtol=1e-4, atol=1e-5)
        start += int(rows[b])


def test_the_layout_check_passes_for_what_is_read_and_refuses_another_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_spec_plugins.engine import attention

    attention.check_layout("vec", 32, 4, 32, torch.float32)
    attention.check_layout("vec", 128, 2, 64, torch.bfloat16)
    attention.check_layout("vec16", 64, 2, 80, torch.float32)
    monkeypatch.setattr(attention, "key_blocks", lambda cache: attention.value_blocks(cache).transpose(2, 3))
    with pytest.raises(RuntimeError, match=r"K/V cache layout of this CPU \(vec, torch.float32, blocks of 32\)"):
        attention.check_layout("vec", 32, 4, 32, torch.float32)


def test_commit_reads_every_source_before_it_writes(seed: int) -> None:
    from vllm_spec_plugins.engine import kv
    from vllm_spec_plugins.engine.attention import key_blocks, value_blocks
    from vllm_spec_plugins.engine.backend import on_triton

    def held(cache: torch.Tensor, block: int, offset: int) -> torch.Tensor:
        """Keys and values of a slot, as the lane lays them out."""
        if on_triton(cache.device):
            return cache[block, :, offset]
        return torch.cat((key_blocks(cache)[block, :, :, offset], value_blocks(cache)[block, :, offset]), 1)

    generator = torch.Generator().manual_seed(seed)
    cache = torch.randn(6, 2, 32, 16, generator=generator)
    before = cache.clone()
    # Request 0 sits across a block border: root at position 30, nodes in rows 1..5; request 1 accepts nothing.
    table = torch.tensor([[4, 2], [1, 3]], dtype=torch.int32)
    path = torch.tensor([[2, 3, 5], [0, 0, 0]])
    request, source, target = kv.moves(path, torch.tensor([3, 0]), torch.tensor([30, 10]))
    assert source.tolist() == [32, 33, 35]
    assert target.tolist() == [31, 32, 33]
    kv.commit([cache], table[request], 32, source, target)

    def slot(position: int) -> tuple[int, int]:
        return (4, position) if position < 32 else (2, position - 32)

    for read, write in zip(source.tolist(), target.tolist(), strict=True):
        assert torch.equal(held(cache, *slot(write)), held(before, *slot(read)))
    untouched = [block for block in range(6) if block not in (2, 4)]
    assert torch.equal(cache[untouched], before[untouched])


def test_a_cache_that_layers_share_is_moved_once() -> None:
    from vllm_spec_plugins.engine import kv

    cache, other = torch.zeros(2, 2, 32, 16), torch.zeros(2, 2, 32, 16)
    found = kv.distinct([cache, other, cache.view_as(cache)])
    assert [each.data_ptr() for each in found] == [cache.data_ptr(), other.data_ptr()]


def test_paths_are_committed_alike_whether_or_not_the_host_knows_the_moves(seed: int) -> None:
    from vllm_spec_plugins.engine import kv

    generator = torch.Generator().manual_seed(seed)
    moved = 0
    for _ in range(20):
        batch, depth, size = 3, 4, 32
        cache = torch.randn(12, 2, size, 16, generator=generator)
        before = cache.clone()
        table = (1 + torch.randperm(11, generator=generator)[:9]).view(batch, 3).int()
        # The last request is inside its prompt: what would be its root stands in a block that is another one's by now.
        table[2, 1:] = table[0, :2]
        path = torch.rand(batch, 9, generator=generator).topk(depth, 1).indices.sort(1).values + 1
        accepted = torch.randint(depth + 1, (batch,), generator=generator)
        accepted[2] = 0
        path = path.masked_fill(torch.arange(depth) >= accepted.unsqueeze(1), 0)
        root = torch.randint(50, (batch,), generator=generator)
        root[2] = 33
        request, source, target = kv.moves(path, accepted, root)
        kv.commit([before], table[request], size, source, target)
        kv.commit_paths([cache], table, size, root, path, accepted)
        assert torch.equal(cache, before)
        moved += len(request)
    assert moved > 0


def test_a_path_along_the_row_order_moves_nothing() -> None:
    from vllm_spec_plugins.engine import kv

    request, _, _ = kv.moves(torch.tensor([[1, 2, 3]]), torch.tensor([2]), torch.tensor([7]))
    assert len(request) == 0


def test_chain_layout_spells_every_rows_path(seed: int) -> None:
    from vllm_spec_plugins.engine.sampler import chain_layout
    from vllm_spec_plugins.engine.state import StepTrees

    generator = torch.Generator().manual_seed(seed)
    drafts = np.array([6, 0, 3])
    rows = (drafts + 1).astype(np.int64)
    tree = random_tree(3, 6, generator).truncate(torch.from_numpy(drafts))
    request = torch.from_numpy(np.repeat(np.arange(3), rows))
    starts = torch.tensor([0, *np.cumsum(rows)])
    local = torch.arange(int(rows.sum())) - starts[:-1][request]
    line, keep, depth = chain_layout(StepTrees(tree, rows, 3, request, True), starts, local)
    for row in range(int(rows.sum())):
        b, at = int(request[row]), int(local[row])
        path = [at]
        while path[0]:
            path.insert(0, int(tree.parents[b, path[0] - 1]))
        end = int(keep[row])
        begin = end - int(depth[end])
        assert depth[begin : end + 1].tolist() == list(range(len(path)))
        assert line[begin : end + 1].tolist() == [int(starts[b]) + step for step in path]


def test_hooks_fit_the_installed_vllm_and_refuse_another_shape() -> None:
    import dataclasses

    from vllm_spec_plugins import hook
    from vllm_spec_plugins.engine.hooks import ENGINE_HOOKS, FLAG_HOOKS

    assert len({h.target for h in FLAG_HOOKS + ENGINE_HOOKS}) == len(FLAG_HOOKS + ENGINE_HOOKS)
    for entry in FLAG_HOOKS + ENGINE_HOOKS:
        assert entry.why and entry.upstream and entry.signature
    (entry,) = (h for h in ENGINE_HOOKS if h.target.endswith(":init_speculator"))
    changed = dataclasses.replace(entry, target="vllm.v1.worker.gpu.states:RequestState.add_request")
    with pytest.raises(hook.HookMismatch, match=r"expects \(vllm_config, device, req_states\) as in vLLM 0\.32\.0"):
        hook.apply([changed])


@pytest.mark.parametrize("version", ["0.31.4", "0.33.0", "1.0.0"])
def test_an_untested_vllm_is_refused_naming_both_versions(version: str) -> None:
    from vllm_spec_plugins.config import SettingError
    from vllm_spec_plugins.engine.support import check_version

    check_version("0.32.0+cpu")
    check_version("0.32.1")
    with pytest.raises(SettingError, match=rf"works with vLLM 0\.32\.\*, but vLLM {version} is installed"):
        check_version(version)


@pytest.mark.parametrize(
    ("plugin", "cache_dtype", "quantised"),
    [("lookahead", "fp8", False), ("none", "fp8_e4m3", False), (None, "fp8", True), ("lookahead", "auto", True)],
)
def test_queries_keep_their_type_beside_8_bit_caches_where_a_plugin_is_on(
    plugin: str | None, cache_dtype: str, quantised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM quantises a query if its attention, on a CUDA device, says that it takes one and the cache has 8 bits."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends import triton_attn

    from vllm_spec_plugins import engine_args
    from vllm_spec_plugins.engine.triton_attention import TritonTreeImpl

    hopper = SimpleNamespace(
        is_cuda=lambda: True,
        is_xpu=lambda: False,
        has_device_capability=lambda _: True,
        get_device_capability=lambda: None,
        get_device_name=lambda: "",
        fp8_dtype=current_platform.fp8_dtype,
    )
    monkeypatch.setattr(triton_attn, "current_platform", hopper)
    config = VllmConfig(**(engine_args(plugin) if plugin else {}))
    with set_current_vllm_config(config):
        impl = TritonTreeImpl(8, 64, 0.125, 4, None, None, cache_dtype)
    assert impl.supports_quant_query_input is quantised
    assert impl.scaled is cache_dtype.startswith("fp8")
