# SPDX-License-Identifier: Apache-2.0
"""What `bench kernels` runs: each kernel on the shapes of serving, with what its result is checked against and timed beside."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from vllm_spec_plugins import choices
from vllm_spec_plugins.proposers.base import StepContext
from vllm_spec_plugins.proposers.history import LATER, REPEATS, SEARCHED, history_guesses
from vllm_spec_plugins.proposers.pool import NgramPool
from vllm_spec_plugins.proposers.window import LookaheadWindow
from vllm_spec_plugins.tree import builders
from vllm_spec_plugins.tree.accept import Walk
from vllm_spec_plugins.tree.calibration import Calibration
from vllm_spec_plugins.tree.ranks import Ranks
from vllm_spec_plugins.tree.topology import Topology, from_choices
from vllm_spec_plugins.tree.tree import TokenTree
from vllm_spec_plugins.tree.union import Forest
from vllm_spec_plugins.tree.union import union as merged

# One layer of a model of 7 to 8 B parameters: query heads, K/V heads, head size; and how vLLM pages its K/V.
HEADS, GROUPS, DIM, PAGE = 32, 8, 128, 16
LAYERS, VOCABULARY = 32, 128_256

CONTEXTS, BATCHES = (1024, 4096, 16384, 65536), (1, 8, 32, 64)

# 63 nodes and the root: 64 rows.
TREE = from_choices(choices.read("mc_sim_7b_63"))

SEED = 20

# The same in torch operations, and what is asked of the kernels whose launch costs more than their bytes.
REFERENCE = "torch"
NOT_SLOWER = f"time to {REFERENCE} <= 1"


Results = tuple[Tensor, ...]
Launch = Callable[[], object]


class Mismatch(Exception):
    """A kernel's result is not its reference's; the message says where and by how much."""


@dataclass(frozen=True)
class Case:
    """A kernel on one shape, its inputs made.

    Attributes:
        launch: the kernel, as the engine calls it; outputs are there already.
        check: calls what it is given, `launch` or a graph that holds it, and raises Mismatch where the result is not the
            reference's.
        traffic: bytes that it must move at least; None = the launch costs more than they do.
        beside: what it is timed beside, by name.
    """

    kernel: str
    launch: Launch
    check: Callable[[Launch], None]
    traffic: int | None = None
    beside: Mapping[str, Launch] = field(default_factory=dict)


@dataclass(frozen=True)
class Setup:
    """A case to be made on a device.

    Attributes:
        bytes: what its tensors take, about.
        bound: what is asked of it, such as "share of the copy >= 0.8" (`Figure.achieved` has the names), several with "; "
            between them; "" = nothing.
    """

    shape: str
    bytes: int
    make: Callable[[str], Case]
    bound: str = ""


def equal(what: str, mine: Tensor, expected: Tensor) -> None:
    """Raises Mismatch unless integers are equal and floats close: 2e-2 in bfloat16 and float16, 1e-5 in float32."""
    if mine.shape != expected.shape:
        raise Mismatch(f"{what} has shape {list(mine.shape)}, not {list(expected.shape)}")
    if mine.dtype.is_floating_point:
        tolerance = 1e-5 if mine.dtype in (torch.float32, torch.float64) else 2e-2
        mine, expected = mine.double(), expected.double()
        wrong = ~torch.isclose(mine, expected, rtol=tolerance, atol=tolerance)
    else:
        wrong = mine != expected
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        raise Mismatch(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} values differ, first at {at}: "
            f"{mine[tuple(at)].item():g} instead of {expected[tuple(at)].item():g}"
        )


def poison(out: Sequence[Tensor]) -> None:
    """NaN, or integers that no kernel writes: what a launch leaves out shows."""
    for each in out:
        each.fill_(float("nan") if each.dtype.is_floating_point else -(1 << 30))


def compare(names: Sequence[str], out: Sequence[Tensor], reference: Callable[[], Results], launch: Launch) -> None:
    """Launch, and raise Mismatch where `out` is not the reference's."""
    poison(out)
    launch()
    for name, mine, expected in zip(names, out, reference(), strict=True):
        equal(name, mine, expected)


@contextmanager
def in_torch() -> Iterator[None]:
    """Inside, the package's own code takes torch operations, whatever the device: not loops, and not kernels."""
    modules = [module for name, module in sys.modules.items() if name.startswith("vllm_spec_plugins.")]
    with ExitStack() as stack:
        for module in modules:
            for choice in ("loops_for", "kernels_for"):
                if hasattr(module, choice):
                    stack.enter_context(patch.object(module, choice, lambda tensor: False))
        yield


def generator(device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(SEED)


def paged_cache(blocks: int, groups: int, page: int, dim: int, dtype: torch.dtype, device: str) -> Tensor:
    """[blocks, G, P, 2 * D] with the heads of a token side by side in memory, as vLLM lays keys and values by default."""
    memory = torch.empty(blocks, page, groups, 2 * dim, dtype=dtype, device=device)
    return memory.normal_(generator=generator(device)).transpose(1, 2)


def block_table(batch: int, length: int, page: int, device: str) -> Tensor:
    """[B, M] int32: each request's blocks, scattered over the whole cache of B * M blocks."""
    blocks = -(-length // page)
    order = torch.randperm(batch * blocks, generator=generator(device), device=device)
    return order.view(batch, blocks).to(torch.int32)


def first_nodes(rows: int) -> Topology:
    """The first rows - 1 nodes of TREE; they are a tree."""
    return Topology(TREE.parents[: rows - 1], TREE.ranks[: rows - 1])


def tree_attention(
    device: str,
    *,
    batch: int,
    context: int,
    rows: int = TREE.num_nodes + 1,
    heads: int = HEADS,
    groups: int = GROUPS,
    dim: int = DIM,
    page: int = PAGE,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    """Trees of `rows` rows behind `context` tokens; beside vLLM's attention of a chain as long, and of one token."""
    from vllm.v1.attention.backends.triton_attn import MIN_LAUNCH_GRID_SIZE_2D, NUM_PAR_SOFTMAX_SEGMENTS
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    from vllm_spec_plugins.kernels import tree_attention as kernel

    table = block_table(batch, context + rows, page, device)
    cache = paged_cache(table.numel(), groups, page, dim, dtype, device)
    key, value = cache.transpose(1, 2).split(dim, -1)
    query = torch.randn(batch * rows, heads, dim, generator=generator(device), device=device).to(dtype)
    out, vllm_out = torch.empty_like(query), torch.empty_like(query)
    words = first_nodes(rows).tree(torch.zeros(1, rows - 1, dtype=torch.int64, device=device)).ancestor_words()
    ints = partial(torch.full, (batch,), dtype=torch.int32, device=device)
    start = torch.arange(0, (batch + 1) * rows, rows, dtype=torch.int32, device=device)
    given: dict[str, Any] = {
        "start": start,
        "prefix": ints(context),
        "behind": ints(rows),
        "words": words.repeat(batch, 1, 1).flatten(0, 1),
    }
    given |= {"block_table": table, "max_rows": rows, "scale": dim**-0.5}
    launch = partial(kernel.tree_attention, query, key, value, out, **given)

    def check(launch: Launch) -> None:
        """The first and the last request; the reference takes a request at a time, and much memory."""
        launch()
        for request in {0, batch - 1}:
            mine = slice(request * rows, (request + 1) * rows)
            alone = {name: each[request : request + 1] for name, each in given.items() if name in _PER_REQUEST}
            rest = {**given, **alone, "start": start[:2], "words": given["words"][mine]}
            expected = torch.empty_like(out[mine])
            kernel.reference(query[mine], key, value, expected, **rest)
            equal(f"request {request}", out[mine], expected)

    # As vLLM's backend has it (its builder): parts of the context side by side for small batches of single tokens.
    most, segments = MIN_LAUNCH_GRID_SIZE_2D // groups, NUM_PAR_SOFTMAX_SEGMENTS
    padded = 1 << (dim - 1).bit_length()
    scratch = torch.empty(most, heads, segments, padded, device=device)
    peaks, sums = (torch.empty(most, heads, segments, device=device) for _ in range(2))

    def vllm(tokens: int) -> Launch:
        return partial(
            unified_attention,
            query[: batch * tokens],
            key,
            value,
            vllm_out[: batch * tokens],
            torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=device),
            tokens,
            ints(context + tokens),
            context + tokens,
            dim**-0.5,
            True,
            (-1, -1),
            table,
            0,
            None,
            None,
            None,
            seq_threshold_3D=most,
            num_par_softmax_segments=segments,
            softmax_segm_output=scratch,
            softmax_segm_max=peaks,
            softmax_segm_expsum=sums,
        )

    beside = {CHAIN: vllm(rows), ONE: vllm(1)}
    traffic = kernel.traffic(batch * (context + rows), batch * rows, heads, groups, dim, dtype)
    return Case("tree_attention", launch, check, traffic, beside)


CHAIN, ONE = "vLLM's of a chain as long", "vLLM's of one token"
_PER_REQUEST = ("prefix", "behind", "block_table")


def _attention_setups() -> list[Setup]:
    setups = []
    for context in CONTEXTS:
        for batch in BATCHES:
            bounds = ["share of the copy >= 0.8"] if context >= (4096 if batch >= 8 else 16384) else []
            bounds.append(f"time to {CHAIN} <= 1.1")
            if (batch, context) == (8, 4096):
                bounds.append(f"time to {ONE} <= 1.25")
            # The cache, and for the check one request's scores and its keys and values per query head, in float32.
            size = 4 * batch * (context + 64) * GROUPS * DIM + 4 * context * HEADS * (3 * 64 + 4 * DIM)
            make = partial(tree_attention, batch=batch, context=context)
            setups.append(Setup(f"batch {batch:2}, context {context // 1024:2}k", size, make, "; ".join(bounds)))
    return setups


def tree_walk(device: str, *, batch: int, topology: Topology = TREE) -> Case:
    """Draws that follow the tree one time in two."""
    from vllm_spec_plugins.kernels import tree_walk as kernel

    rng, nodes, depth = generator(device), topology.num_nodes, topology.max_depth
    tokens = torch.randint(2, (batch, nodes), generator=rng, device=device)
    drawn = torch.randint(2, (batch, nodes + 1), generator=rng, device=device)
    parents = topology.tree(tokens).parents.contiguous()
    out = kernel.tree_walk(tokens, parents, drawn, depth)
    launch = partial(kernel.tree_walk, tokens, parents, drawn, depth, out=out)

    def in_torch() -> Results:
        kept = Walk()(TokenTree(tokens, parents, depth), drawn)
        return kept.path, kept.num_accepted, kept.emitted, kept.num_emitted

    names = ("path", "num_accepted", "emitted", "num_emitted")
    return Case("tree_walk", launch, partial(compare, names, out, in_torch), beside={REFERENCE: in_torch})


def coupled_topk(device: str, *, rows: int, vocabulary: int = VOCABULARY, count: int = 4) -> Case:
    """Candidates of a draft's or of Medusa's rows, every second one of a greedy request."""
    from vllm_spec_plugins.kernels import coupled_topk as kernel

    rng = generator(device)
    logits = 3 * torch.randn(rows, vocabulary, generator=rng, device=device)
    temperature = 0.8 * (torch.arange(rows, device=device) % 2).float()
    seeds, position = (torch.randint(1 << 31, (rows,), generator=rng, device=device) for _ in range(2))
    given = (logits, temperature, seeds, position)
    out = kernel.coupled_topk(*given, count)
    launch = partial(kernel.coupled_topk, *given, count, out=out)
    reference = partial(kernel.coupled_topk_reference, *given, count)

    def check(launch: Launch) -> None:
        poison(out)
        launch()
        tokens, scores = kernel.coupled_topk_reference(*given, count + 1)
        equal("scores", out[1], scores[:, :count])
        # Equal to the last bit they need not be: a token that another one is level with may stand in either place.
        gaps = (scores[:, :-1] - scores[:, 1:]) > 1e-4
        clear = gaps & torch.nn.functional.pad(gaps[:, :-1], (1, 0), value=True)
        equal("tokens", out[0].where(clear, 0), tokens[:, :count].where(clear, 0))

    return Case("coupled_topk", launch, check, logits.numel() * 4, {REFERENCE: reference})


def kv_commit(
    device: str,
    *,
    batch: int,
    layers: int = LAYERS,
    groups: int = GROUPS,
    dim: int = DIM,
    page: int = PAGE,
    context: int = 256,
    rows: int = TREE.num_nodes + 1,
    moved: int = 3,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    """`moved` accepted nodes in every request, none of which stands where plain decoding would have it."""
    from vllm_spec_plugins.kernels import kv_commit as kernel

    rng = generator(device)
    table = block_table(batch, context + rows, page, device)
    caches = [paged_cache(table.numel(), groups, page, dim, dtype, device) for _ in range(layers)]
    root = torch.full((batch,), context, device=device)
    path = 2 + torch.rand(batch, rows - 2, generator=rng, device=device).argsort(1)[:, :moved].sort(1).values
    accepted = torch.full((batch,), moved, device=device)
    launch = partial(kernel.kv_commit, kernel.Pointers.of(caches), table, root, path, accepted)

    def check(launch: Launch) -> None:
        """Every byte of every cache, those that must stay as they are among them."""
        expected = [cache.clone() for cache in caches]
        kernel.kv_commit_reference(kernel.Pointers.of(expected), table, root, path, accepted)
        launch()
        for layer, (mine, right) in enumerate(zip(caches, expected, strict=True)):
            equal(f"layer {layer}", mine.view(torch.int16), right.view(torch.int16))

    traffic = 2 * batch * moved * layers * groups * 2 * dim * dtype.itemsize
    in_torch = partial(kernel.kv_commit_reference, *launch.args)
    return Case("kv_commit", launch, check, traffic, {REFERENCE: in_torch})


def pool_lookup(device: str, *, batch: int, guesses: int = 7, ngram: int = 5, buckets: int = 512) -> Case:
    from vllm_spec_plugins.kernels import ngram_pool as kernel

    pool, rows, ngrams = _filled_pool(device, batch, guesses, ngram, buckets)
    key = ngrams[:, 0, 0].contiguous()
    out = kernel.lookup(pool.entries, rows, key)
    launch = partial(kernel.lookup, pool.entries, rows, key, out=out)
    in_torch = partial(pool.lookup, rows, key)
    check = partial(compare, ("found",), (out,), lambda: (in_torch(),))
    return Case("pool_lookup", launch, check, beside={REFERENCE: in_torch})


def pool_insert(device: str, *, batch: int, guesses: int = 7, ngram: int = 5, buckets: int = 512) -> Case:
    """What a window of 15 columns finds in a step; inserting it again changes nothing."""
    from vllm_spec_plugins.kernels import ngram_pool as kernel

    pool, rows, ngrams = _filled_pool(device, batch, guesses, ngram, buckets)
    valid = torch.ones(ngrams.shape[:2], dtype=torch.bool, device=device)
    entries = pool.entries.clone()
    launch = partial(kernel.insert, entries, rows, ngrams, valid)
    in_torch = partial(pool.insert, rows, ngrams, valid)

    def check(launch: Launch) -> None:
        launch()
        in_torch()
        # The last bucket takes what is not to be stored, and is never read.
        equal("entries", entries[:, :-1], pool.entries[:, :-1])

    return Case("pool_insert", launch, check, beside={REFERENCE: in_torch})


def _filled_pool(device: str, batch: int, guesses: int, ngram: int, buckets: int) -> tuple[NgramPool, Tensor, Tensor]:
    """A pool that 4 steps have filled, its rows [B], and the n-grams [B, 15, ngram] of a fifth."""
    rng = generator(device)
    pool, rows = NgramPool(batch, buckets, guesses, ngram, torch.device(device)), torch.arange(batch, device=device)
    for _ in range(4):
        ngrams = torch.randint(20, (batch, 15, ngram), generator=rng, device=device)
        pool.insert(rows, ngrams, torch.ones(batch, 15, dtype=torch.bool, device=device))
    return pool, rows, torch.randint(20, (batch, 15, ngram), generator=rng, device=device)


def history(device: str, *, batch: int, context: int, guesses: int = 4, length: int = 16) -> Case:
    """Text of few words, so that endings are found."""
    from vllm_spec_plugins.kernels import history as kernel

    text = torch.randint(50, (batch, context), generator=generator(device), dtype=torch.int32, device=device)
    slots, lengths = torch.arange(batch, device=device), torch.full((batch,), context, device=device)
    chance = torch.tensor(REPEATS, device=device)
    odds = chance / (1 - chance) * LATER ** torch.arange(guesses, device=device).unsqueeze(1)
    given = (text, slots, lengths, context, guesses, length)
    out = kernel.history_guesses(*given, SEARCHED, odds)
    launch = partial(kernel.history_guesses, *given, SEARCHED, odds, out=out)
    in_torch = partial(history_guesses, *given)

    def check(launch: Launch) -> None:
        poison(out)
        launch()
        ngrams, chances = in_torch()
        equal("ngrams", out[0], ngrams)
        equal("odds", out[1].where(ngrams >= 0, 0.0).float(), chances.where(ngrams >= 0, 0.0).float())

    return Case("history", launch, check, text.numel() * text.element_size(), {REFERENCE: in_torch})


def trie(device: str, *, batch: int, guesses: int = 7, length: int = 16, nodes: int = 32) -> Case:
    """Guesses over two tokens, so that prefixes are shared."""
    from vllm_spec_plugins.kernels import trie as kernel

    rng = generator(device)
    ngrams = torch.randint(2, (batch, guesses, length), generator=rng, device=device)
    odds = torch.rand(batch, guesses, length, generator=rng, dtype=torch.float64, device=device) + 0.1
    out = kernel.trie(ngrams, nodes, nodes, odds, 0.0)
    launch = partial(kernel.trie, ngrams, nodes, nodes, odds, 0.0, out)

    def in_torch() -> Results:
        tree = builders.trie(ngrams, nodes, nodes, odds, 0.0)
        assert tree.chance is not None
        return tree.tokens, tree.parents, tree.chance

    check = partial(compare, ("tokens", "parents", "chance"), out, in_torch)
    return Case("trie", launch, check, beside={REFERENCE: in_torch})


def growth(device: str, *, batch: int, depth: int = 4, ranks: int = 10, nodes: int = TREE.num_nodes) -> Case:
    """Medusa's trees of the products of its heads' chances, which fall with the rank."""
    from vllm_spec_plugins.kernels import growth as kernel

    rng = generator(device)
    candidates = torch.randint(VOCABULARY, (batch, depth, ranks), generator=rng, device=device)
    chance = torch.rand(batch, depth, ranks, generator=rng, device=device).sort(2, descending=True).values
    table = builders._products(depth, ranks, nodes, torch.device(device))
    given = (candidates, chance, table.ranks, table.depth, table.parent, nodes, nodes, 0.0)
    out = kernel.ranked(*given)
    launch = partial(kernel.ranked, *given, out)

    def in_torch() -> Results:
        tree = builders.ranked(candidates, chance, nodes, nodes)
        assert tree.chance is not None
        return tree.tokens, tree.parents, tree.chance

    check = partial(compare, ("tokens", "parents", "chance"), out, in_torch)
    return Case("growth", launch, check, beside={REFERENCE: in_torch})


def union(device: str, *, batch: int, each: int = 31, nodes: int = 32) -> Case:
    """Two sources' trees of `each` nodes over few tokens, so that paths are shared."""
    from vllm_spec_plugins.kernels import union as kernel

    rng, trees = generator(device), []
    for _ in range(2):
        candidates = torch.rand(batch, 4, 6, generator=rng, device=device).argsort(2)
        chance = torch.rand(batch, 4, 6, generator=rng, device=device).sort(2, descending=True).values / 2
        trees.append(builders.ranked(candidates, chance, each, each))
    forest = Forest.of(trees)
    weights = torch.rand(batch, 2, generator=rng, dtype=torch.float64, device=device) + 0.5
    fields = (forest.tokens, forest.parents, forest.odds, forest.source, weights)
    given = (*fields, nodes, nodes, 0.0, forest.max_depth)
    out = kernel.union(*given)
    launch = partial(kernel.union, *given, out)

    def in_torch() -> Results:
        tree = merged(forest, weights, nodes)
        assert tree.chance is not None
        return tree.tokens, tree.parents, tree.chance

    check = partial(compare, ("tokens", "parents", "chance"), out, in_torch)
    return Case("union", launch, check, beside={REFERENCE: in_torch})


def ranks(device: str, *, batch: int, depth: int = 4, per_depth: int = 10) -> Case:
    """The chances of a head's candidates by rank, of some thousand places seen; counting them takes two such launches."""
    from vllm_spec_plugins.kernels import ranks as kernel

    rng, plain = generator(device), Ranks(batch, depth, per_depth, torch.device(device))
    plain.seen += torch.randint(1000, plain.seen.shape, generator=rng, device=device)
    plain.hits += plain.seen * torch.rand(plain.hits.shape, generator=rng, device=device) / per_depth
    slots = torch.arange(batch, device=device)
    given = (plain.hits, plain.seen, slots, plain.first, Ranks.PRIOR)
    out = kernel.rank_chances(*given)
    launch = partial(kernel.rank_chances, *given, out)

    def in_torch() -> Results:
        return (plain.chance(slots),)

    check = partial(compare, ("chance",), (out,), in_torch)
    return Case("ranks", launch, check, beside={REFERENCE: in_torch})


def calibration(device: str, *, batch: int, sources: int = 2) -> Case:
    """What each source's odds are multiplied with, of some thousand places seen; counting them takes two such launches."""
    from vllm_spec_plugins.kernels import calibration as kernel

    rng, plain = generator(device), Calibration(batch, [31] * sources, 8, torch.device(device))
    shares = torch.rand(batch + 1, sources, 3, generator=rng, device=device, dtype=torch.float64)
    plain.counts += 1000 * shares.sort(2, descending=True).values
    slots = torch.arange(batch, device=device)
    given = (slots, plain.counts, Calibration.PRIOR, Calibration.EXTREME)
    out = kernel.factors(*given)
    launch = partial(kernel.factors, *given, out)

    def in_torch() -> Results:
        return (plain.factors(slots),)

    check = partial(compare, ("factors",), (out,), in_torch)
    return Case("calibration", launch, check, beside={REFERENCE: in_torch})


def window(device: str, *, batch: int, width: int = 15, ngram: int = 5) -> Case:
    """Full windows take in a step that emitted one token."""
    from vllm_spec_plugins.kernels import window as kernel

    rng, plain = generator(device), LookaheadWindow(batch, width, ngram, [2], torch.device(device))
    plain.cells += torch.randint(3, VOCABULARY, plain.cells.shape, generator=rng, device=device)
    plain.level += ngram - 1
    plain.start += 1
    state = plain.cells.clone(), plain.level.clone(), plain.start.clone()
    slots, one = torch.arange(batch, device=device), torch.ones(batch, dtype=torch.int64, device=device)
    text = torch.randint(3, VOCABULARY, (batch, 100), generator=rng, device=device).int()
    drawn = torch.randint(3, VOCABULARY, (batch, plain.num_nodes + 1), generator=rng, device=device)
    context = StepContext(slots, text, 100 * one, 100, one, drawn)
    out = torch.empty(batch, width, ngram, dtype=torch.int64, device=device), torch.empty_like(drawn[:, :width])
    given = (slots, text, 100 * one, one, drawn, plain._eos)
    launch = partial(kernel.advance, *state, *given, out)

    def check(launch: Launch) -> None:
        """Both from the state that the kernel has come to."""
        for mine, theirs in zip(state, (plain.cells, plain.level, plain.start), strict=True):
            theirs.copy_(mine)
        poison(out)
        launch()
        ngrams, real = plain.advance(context)
        equal("n-grams", out[0], ngrams)
        equal("real", out[1], real.long())
        equal("cells", state[0], plain.cells)

    return Case("window", launch, check, beside={REFERENCE: partial(plain.advance, context)})


def _at(batches: Sequence[int], make: Callable[..., Case], also: str = "", **given: int) -> list[Setup]:
    return [Setup(f"batch {batch:2}{also}", 0, partial(make, batch=batch, **given), NOT_SLOWER) for batch in batches]


CASES: dict[str, list[Setup]] = {
    "tree_attention": _attention_setups(),
    "tree_walk": _at((1, 64), tree_walk, f", {TREE.num_nodes} nodes"),
    "coupled_topk": [
        Setup(f"{rows} rows of {VOCABULARY}, 4 children", 0, partial(coupled_topk, rows=rows), NOT_SLOWER)
        for rows in (8, 64, 256)
    ],
    "kv_commit": [
        Setup(
            f"batch {batch:2}, {LAYERS} layers, 3 nodes each",
            3 * LAYERS * batch * 20 * PAGE * GROUPS * 2 * DIM * 2,
            partial(kv_commit, batch=batch),
            "share of a step <= 0.02",
        )
        for batch in (8, 64)
    ],
    "pool_lookup": _at((1, 64), pool_lookup, ", 7 5-grams a bucket"),
    "pool_insert": _at((1, 64), pool_insert, ", 15 5-grams"),
    "history": [
        *_at((1, 64), history, ", 2k tokens", context=2048),
        *_at((64,), history, ", 32k tokens", context=32768),
    ],
    "trie": _at((1, 64), trie, ", 7 guesses of 16, 32 nodes"),
    "growth": _at((1, 64), growth, f", 4 heads of 10, {TREE.num_nodes} nodes"),
    "union": _at((1, 64), union, ", 31 and 31 nodes to 32"),
    "ranks": _at((1, 64), ranks, ", 4 heads of 10"),
    "calibration": _at((1, 64), calibration, ", 2 sources"),
    "window": _at((1, 64), window, ", 15 columns of 5-grams"),
}
