# SPDX-License-Identifier: Apache-2.0
"""Top-k and top-p keep what their definition says: checked against a plain reference in double precision."""

from __future__ import annotations

import pytest
import torch

from vllm_spec_plugins.cpu.kernels.nucleus import apply_top_k_top_p

INF = float("inf")


def reference(logits: torch.Tensor, k: int | None, p: float | None) -> tuple[set[int], float]:
    """Tokens kept of one row, and how close the nucleus' edge came to the next token (as probability).

    The k largest with all equals of the k-th; of those, masked from the least probable on (of equals, lower ids first)
    while the masked mass is at most 1 - p; the largest stays.
    """
    order = sorted(range(len(logits)), key=lambda token: (float(logits[token]), token))
    if k is not None and k < len(logits):
        edge = float(logits[order[-k]])
        order = [token for token in order if float(logits[token]) >= edge]
    if p is None:
        return set(order), 1.0
    probabilities = torch.softmax(logits[order].double(), 0).tolist()
    outside = float(torch.tensor(1.0) - torch.tensor(p))
    masked, mass, margin = 0, 0.0, 1.0
    for probability in probabilities[:-1]:
        mass += probability
        margin = min(margin, abs(mass - outside))
        if mass > outside:
            break
        masked += 1
    return set(order[masked:]), margin


@pytest.mark.parametrize("vocab_size", [2, 33, 300, 3000])
@pytest.mark.parametrize("shape", ["flat", "peaked", "ties", "holes"])
def test_keeps_what_the_definition_keeps(seed: int, vocab_size: int, shape: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = {"flat": 0.3, "peaked": 8.0, "ties": 3.0, "holes": 3.0}[shape]
    compared = 0
    for _ in range(12):
        rows = int(torch.randint(1, 5, (), generator=generator))
        logits = torch.randn(rows, vocab_size, generator=generator) * scale
        if shape == "ties":
            logits = logits.round()
        if shape == "holes":
            logits[torch.rand(logits.shape, generator=generator) < 0.5] = -INF
            logits[:, 0] = 0.0
        use_k, use_p = (int(n) for n in torch.randint(0, 2, (2,), generator=generator))
        k = torch.randint(1, vocab_size + 1, (rows,), generator=generator).int() if use_k else None
        p = torch.rand(rows, generator=generator).clamp(min=1e-3) if use_p or not use_k else None
        found = apply_top_k_top_p(logits.clone(), k, p)
        for row in range(rows):
            kept, margin = reference(
                logits[row], None if k is None else int(k[row]), None if p is None else float(p[row])
            )
            if margin < 1e-5:
                continue  # the edge itself is a rounding error
            alive = {token for token in kept if logits[row, token] > -INF}
            assert {int(token) for token in (found[row] > -INF).nonzero()} == alive
            untouched = found[row] > -INF
            assert torch.equal(found[row][untouched], logits[row][untouched])
            compared += 1
    assert compared > 10


def test_no_mass_outside_keeps_every_token_that_has_a_probability() -> None:
    logits = torch.tensor([[0.0, -5.0, -200.0, -INF]])
    found = apply_top_k_top_p(logits.clone(), None, torch.tensor([1.0]))
    assert (found > -INF).tolist() == [[True, True, False, False]]


def test_almost_no_mass_inside_keeps_the_largest() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    found = apply_top_k_top_p(logits.clone(), None, torch.tensor([1e-9]))
    assert found.tolist() == [[-INF, 3.0, -INF]]


def test_a_row_does_not_depend_on_the_others(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(16, 4096, generator=generator) * 4
    p = torch.full((16,), 0.9)
    together = apply_top_k_top_p(logits.clone(), None, p)
    for row in range(16):
        alone = apply_top_k_top_p(logits[row : row + 1].clone(), None, p[:1])
        assert torch.equal(alone[0], together[row])


def test_logits_of_another_dtype_are_copied() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.bfloat16)
    found = apply_top_k_top_p(logits, torch.tensor([2]), None)
    assert found.tolist() == [[-INF, 3.0, 2.0]]
    assert logits.tolist() == [[1.0, 3.0, 2.0]]
