# SPDX-License-Identifier: Apache-2.0
"""Finds what would make the host wait for a GPU, on a machine without one.

A tensor on `DEVICE` is a host tensor in disguise: it says that it lives elsewhere and computes on the host's memory. Code that
is run on such tensors takes the way that it takes on every other device than a CPU; what would read them back, mix them with
the host's tensors or copy without saying `non_blocking` raises `Synchronised`. On a GPU `no_sync` asks CUDA to say so instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

T = TypeVar("T")

# torch has this type everywhere, computes nothing on it, and needs no driver for it.
DEVICE = torch.device("meta")

# How many values come out, or what the host decides next, depends on the values that go in.
READS = {
    "item", "_local_scalar_dense", "is_nonzero", "nonzero", "nonzero_numpy", "argwhere", "masked_select", "equal", "allclose",
    "_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "bincount", "multinomial",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
COPIES = {"to", "_to_copy", "copy_", "cpu", "cuda"}


class Synchronised(AssertionError):
    """The host would have waited for the device."""


class DeviceTensor(Tensor):
    """`inner`, a host tensor, in disguise."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> DeviceTensor:
        assert not isinstance(inner, DeviceTensor)
        disguised = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE,
        )  # fmt: skip
        disguised.inner = inner
        return disguised

    def __repr__(self) -> str:
        return f"DeviceTensor({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    # torch refuses these by itself for every subclass, with another exception.
    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise Synchronised("numpy() of a tensor on the device")

    def tolist(self) -> Any:
        raise Synchronised("tolist() of a tensor on the device")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise Synchronised("a NumPy array of a tensor on the device")


class _Device(TorchDispatchMode):
    """Makes what is asked for on DEVICE, and lets nothing past that the host would wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_strict = False


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    disguised = any(isinstance(leaf, DeviceTensor) for leaf in given)
    asked = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)), None)
    lands = disguised if asked is None else asked == DEVICE
    if _strict and (reason := _waits(func, args, kwargs, given, disguised, lands)):
        raise Synchronised(f"{func}: {reason}")
    args, kwargs = tree_map(_undisguised, (args, kwargs))
    out = func(*args, **kwargs)
    return tree_map(lambda leaf: DeviceTensor(leaf) if isinstance(leaf, Tensor) else leaf, out) if lands else out


def _undisguised(leaf: Any) -> Any:
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    return leaf.inner if isinstance(leaf, DeviceTensor) else leaf


def _waits(func: Any, args: Any, kwargs: dict[str, Any], given: list[Tensor], disguised: bool, lands: bool) -> str:
    """Why the host would wait for this, or ""."""
    name = func.overloadpacket._qualified_op_name.split("::")[-1]
    if name in COPIES:
        return _waits_for_copy(name, args, kwargs, disguised, lands)
    if not disguised:
        return ""
    if name in READS or (name == "where" and func._overloadname == "default"):
        return "reads values of the device"
    if name == "repeat_interleave" and func._overloadname in ("Tensor", "self_Tensor"):
        return "" if kwargs.get("output_size") is not None else "reads how often of the device; give output_size"
    if name in INDEXING and any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
        return "asks the device how many are true; use where or masked_fill"
    if any(not isinstance(leaf, DeviceTensor) and leaf.dim() > 0 for leaf in given):
        return "a tensor of the host among those of the device"
    return ""


def _waits_for_copy(name: str, args: Any, kwargs: dict[str, Any], disguised: bool, lands: bool) -> str:
    source, target = args[1 if name == "copy_" else 0], lands
    if name == "copy_":
        target = isinstance(args[0], DeviceTensor)
        lazily = (args[2] if len(args) > 2 else False) or kwargs.get("non_blocking", False)
    else:
        lazily = kwargs.get("non_blocking", False) or any(leaf is True for leaf in args[2:3])
    from_device = isinstance(source, DeviceTensor)
    if from_device == target:
        return ""
    if from_device:
        return "copies from the device to the host"
    return "" if lazily or (name == "copy_" and source.dim() == 0) else "copies to the device without non_blocking"


def _tensor(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.tensor` and the like, which fill a host tensor behind a mode's back and copy it, waiting."""

    @wraps(make)
    def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None or torch.device(device) != DEVICE:
            return make(*args, device=device, **kwargs)
        if _strict:
            raise Synchronised(f"torch.{make.__name__} on the device: copies from the host and waits")
        with _disable_current_modes():
            return DeviceTensor(make(*args, **kwargs))

    return made


@contextmanager
def device() -> Iterator[torch.device]:
    """DEVICE can be used. Nothing is refused yet: what is made once, and kept, may wait."""
    originals = {name: getattr(torch, name) for name in ("tensor", "as_tensor")}
    for name, make in originals.items():
        setattr(torch, name, _tensor(make))
    try:
        with _Device():
            yield DEVICE
    finally:
        for name, make in originals.items():
            setattr(torch, name, make)


@contextmanager
def no_sync(at: torch.device = DEVICE) -> Iterator[None]:
    """What makes the host wait for `at` raises: Synchronised on DEVICE, RuntimeError on a GPU."""
    global _strict
    if at.type == "cuda":
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return
    assert at == DEVICE, f"nothing is known of waiting for {at}"
    before, _strict = _strict, True
    try:
        yield
    finally:
        _strict = before


def on_device(value: T) -> T:
    """`value` with each tensor disguised: tensors, containers and dataclasses of them. Memory is shared."""
    return _mapped(value, lambda leaf: leaf if isinstance(leaf, DeviceTensor) else DeviceTensor(leaf))


def on_host(value: T) -> T:
    """The way back, for who looks from outside: nobody waits for a comparison in a test."""
    return _mapped(value, lambda leaf: leaf.inner if isinstance(leaf, DeviceTensor) else leaf)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(
            **{each.name: _mapped(getattr(value, each.name), change) for each in fields(value) if each.init}
        )
    if isinstance(value, dict):
        return {key: _mapped(each, change) for key, each in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_mapped(each, change) for each in value)
    return value


def hosted(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which is not examined: it gets tensors of the host, and what it returns is on DEVICE. For what runs kernels of
    its own on a GPU, as vLLM's sampler does.
    """

    @wraps(function)
    def there(*args: Any, **kwargs: Any) -> Any:
        disguised = any(isinstance(each, DeviceTensor) for each in (*args, *kwargs.values()))
        with _disable_current_modes():
            out = function(*map(on_host, args), **{name: on_host(each) for name, each in kwargs.items()})
            return on_device(out) if disguised else out

    return there
