# SPDX-License-Identifier: Apache-2.0
"""The detector itself: what makes the host wait is caught, and what does not is let past, with the right result."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.no_sync import DEVICE, DeviceTensor, Synchronised, device, hosted, no_sync, on_device, on_host


@pytest.fixture(autouse=True)
def _() -> Iterator[None]:
    with torch.inference_mode(), device():
        yield


def assign_where(x: Tensor) -> None:
    x[x > 1] = 0


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "int": lambda x: int(x[0]),
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool((x > 1).any()),
    "if": lambda x: 1 if (x > 1).all() else 0,
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "asarray": lambda x: np.asarray(x),
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu"),
    "to cpu, lazily": lambda x: x.to("cpu", non_blocking=True),
    "copied into the host's": lambda x: torch.empty(3, dtype=torch.int64).copy_(x),
    "nonzero": lambda x: x.nonzero(),
    "nonzero as tuple": lambda x: x.nonzero(as_tuple=True),
    "where with one argument": lambda x: torch.where(x > 1),
    "masked_select": lambda x: x.masked_select(x > 1),
    "boolean index": lambda x: x[x > 1],
    "boolean index_put": assign_where,
    "unique": lambda x: x.unique(),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "bincount": lambda x: x.bincount(),
    "equal": lambda x: torch.equal(x, x + 0),
    "repeat_interleave": lambda x: torch.arange(3, device=DEVICE).repeat_interleave(x),
    "repeat_interleave of counts": lambda x: torch.repeat_interleave(x),
    "slice by a tensor": lambda x: x[: x[0]],
    "range by a tensor": lambda x: range(x[0]),
    "host tensor beside": lambda x: x + torch.arange(3),
    "host index": lambda x: x[torch.arange(2)],
    "host array": lambda x: x + torch.from_numpy(np.arange(3)),
    "made from a list": lambda x: torch.tensor([1, 2], device=x.device),
    "as_tensor": lambda x: torch.as_tensor([1, 2], device=x.device),
    "sent without non_blocking": lambda x: torch.arange(3).to(x.device),
    "host assigned": lambda x: x[:2].copy_(torch.arange(2)),
}


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("name", WAITS)
def test_what_makes_the_host_wait_is_caught(name: str, inference: bool) -> None:
    with torch.inference_mode(inference):
        x = on_device(torch.tensor([1, 2, 3]))
        with pytest.raises(Synchronised), no_sync():
            WAITS[name](x)


def assigned(x: Tensor) -> Tensor:
    x[0] = 7
    x[x - x] = 8
    x[1:].fill_(9)
    return x


PASSES: dict[str, Callable[[Tensor], Tensor]] = {
    "arithmetic": lambda x: (x + 1) * x.float() / 2,
    "reductions": lambda x: x.sum() + x.max() + x.cumsum(0),
    "masks": lambda x: x.where(x > 1, 0) + x.masked_fill(x > 1, 5),
    "integer index": lambda x: x[(x - 1).clamp(max=1)],
    "gather": lambda x: x.gather(0, x - 1),
    "scatter": lambda x: torch.zeros_like(x).scatter_(0, x - 1, x),
    "sort": lambda x: x.sort(descending=True).values + x.topk(3).indices,
    "made here": lambda x: torch.arange(3, device=x.device) + torch.full((3,), 2, device=x.device) + x.new_zeros(3),
    "number of the host": lambda x: x + torch.tensor(3),
    "sent": lambda x: x + torch.arange(3).to(x.device, non_blocking=True),
    "assigned": assigned,
    "repeated": lambda x: x.repeat_interleave(2) + x.repeat(2),
    "repeated, told how often": lambda x: torch.arange(3, device=x.device).repeat_interleave(x, output_size=6),
    "split": lambda x: torch.cat(x.split([1, 2])[::-1]),
    "in place": lambda x: x.add_(1).clamp_(max=3).view(3, 1).expand(3, 2).contiguous(),
}


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("name", PASSES)
def test_what_lets_the_host_go_on_computes_what_it_computes_there(name: str, inference: bool) -> None:
    with torch.inference_mode(inference):
        x = on_device(torch.tensor([1, 2, 3]))
        with no_sync():
            found = PASSES[name](x)
        assert isinstance(found, DeviceTensor) and found.device == DEVICE
        expected = PASSES[name](torch.tensor([1, 2, 3]))
        assert torch.equal(on_host(found), expected)


def test_memory_is_shared_with_the_host_tensor_in_disguise() -> None:
    x = torch.zeros(3)
    on_device(x)[1:].fill_(2.0)
    assert x.tolist() == [0.0, 2.0, 2.0]


def test_what_is_not_examined_sees_host_tensors_and_returns_to_the_device() -> None:
    seen = []

    def reads(x: Tensor, scale: int) -> tuple[Tensor, int]:
        seen.append(x.device.type)
        return torch.from_numpy(x.numpy() * scale), int(x[0])

    x = on_device(torch.tensor([1, 2]))
    with no_sync():
        y, number = hosted(reads)(x, scale=3)
        z = y + x
    assert seen == ["cpu"] and number == 1 and on_host(z).tolist() == [4, 8]


def test_before_no_sync_what_waits_is_done() -> None:
    assert on_device(torch.tensor([5, 6]))[0].item() == 5
    assert torch.tensor([1, 2], device=DEVICE).device == DEVICE
