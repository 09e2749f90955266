# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter with all programs of a launch in step, for engines in the interpreted lane.

The interpreter runs one program after the other, and an operation costs it 20 to 60 us of Python whatever its size. Here a value
is one array for all programs, [P, ...], or [1, ...] where they have it in common, so an operation is paid for once. Programs that
a branch or a loop's bound sends different ways part: those that go the way of most go on, the others begin anew by themselves,
once what they had written is taken back. All loads of a step come before its stores, which programs on a GPU may do as well.

Written against Triton 3.9, whose interpreter keeps scalars as arrays of one element: here they have one per program.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

# Of one launch, at a time. Arrays of a kernel's largest blocks stay within some MiB.
MOST_PROGRAMS = 512

Array = np.ndarray[Any, Any]


class Programs:
    """Programs that have gone the same way so far.

    Attributes:
        index: [P, 3] int32, their places in the grid.
        parted: those of them that have to begin anew: lists of their places.
        atomic: something was changed in a way that cannot be taken back.
    """

    def __init__(self, index: Array) -> None:
        self.index = index
        self.parted: list[Array] = []
        self.atomic = False
        self._active: Array | None = None  # [P] bool; None: all
        self._written: list[tuple[Array, Array, Array]] = []  # pointers, what stood there, mask

    def agreed(self, scalar: Array) -> Any:
        """The value [P] or [1] that the programs go on with."""
        if len(scalar) == 1:
            return scalar[0]
        live = scalar if self._active is None else scalar[self._active]
        if (live == live[0]).all():
            return live[0]
        values, counts = np.unique(live, return_counts=True)
        kept = values[counts.argmax()]
        self._part(scalar != kept)
        return kept

    def each(self, rank: int) -> tuple[int, ...]:
        """The shape of a scalar per program among arrays of `rank` dimensions."""
        return len(self.index), *[1] * (rank - 1)

    def masked(self, pointers: Array, mask: Array) -> Array:
        """`mask` without programs that have parted."""
        if self._active is None or (len(pointers) == 1 and len(mask) == 1):
            return mask
        return mask & self._active.reshape(self.each(pointers.ndim))

    def load(self, pointers: Array, mask: Array, other: Array, dtype: Any) -> Array:
        shape = np.broadcast_shapes(pointers.shape, mask.shape, other.shape)
        given = (np.ascontiguousarray(np.broadcast_to(each, shape)) for each in (pointers, mask, other))
        return interpreter._interpreter.load(*given, dtype)

    def store(self, pointers: Array, values: Array, mask: Array) -> None:
        shape = np.broadcast_shapes(pointers.shape, mask.shape, values.shape)
        pointers, values, mask = (
            np.ascontiguousarray(np.broadcast_to(each, shape)) for each in (pointers, values, mask)
        )
        if len(pointers) > 1:
            self._written.append((pointers, self.load(pointers, mask, np.zeros_like(values), values.dtype), mask))
        interpreter._interpreter.store(pointers, values, mask)

    def _part(self, rows: Array) -> None:
        if self.atomic:
            raise NotImplementedError("programs part behind an atomic operation")
        if self._active is None:
            self._active = np.ones(len(self.index), dtype=np.bool_)
        rows = rows & self._active
        self._active &= ~rows
        for pointers, old, mask in reversed(self._written):
            interpreter._interpreter.store(pointers[rows], old[rows], mask[rows])
        self.parted.append(self.index[rows])


def _shaped(data: Array, *shape: int) -> Array:
    return data.reshape(len(data), *shape)


# Atomic operations that may be done twice.
_OPS = interpreter._ir.ATOMIC_OP
_REPEATABLE = (_OPS.AND, _OPS.OR, _OPS.MAX, _OPS.MIN, _OPS.UMAX, _OPS.UMIN)


class Builder(interpreter.InterpreterBuilder):
    """The interpreter's operations whose arguments speak of shapes and axes, and those of memory."""

    programs: Programs

    def __init__(self) -> None:
        super().__init__()
        # Each sum of int32 would be done again in int64, to look for what does not fit: half of the time.
        self.options = interpreter.InterpreterOptions(sanitize_overflow=False)

    def create_get_program_id(self, axis: int) -> Any:
        return TensorHandle(self.programs.index[:, axis], tl.int32)

    def create_masked_load(self, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        element = ptrs.get_element_ty()
        dtype = interpreter._get_np_dtype(element)
        default = np.zeros((1,) * ptrs.data.ndim, dtype) if other is None else other.data
        seen = self.programs.masked(ptrs.data, mask.data.astype(np.bool_, copy=False))
        return TensorHandle(self.programs.load(ptrs.data, seen, default, dtype), element)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *rest: Any) -> None:
        pointers = ptrs.data if len(value.data) == 1 else np.broadcast_to(ptrs.data, value.data.shape)
        self.programs.store(pointers, value.data, self.programs.masked(pointers, mask.data.astype(np.bool_, copy=False)))

    def create_reshape(self, arg: Any, shape: Any, allow_reorder: bool) -> Any:
        return TensorHandle(_shaped(arg.data, *shape), arg.dtype.scalar)

    def create_trans(self, arg: Any, perm: Any) -> Any:
        return TensorHandle(np.transpose(arg.data, (0, *(axis + 1 for axis in perm))), arg.dtype.scalar)

    def create_make_range(self, ret_ty: Any, start: int, stop: int) -> Any:
        return TensorHandle(np.arange(start, stop, dtype=np.int32)[None], tl.int32)

    def create_gather(self, src: Any, indices: Any, axis: int) -> Any:
        count = max(len(src.data), len(indices.data))
        data, at = (np.broadcast_to(each.data, (count, *each.data.shape[1:])) for each in (src, indices))
        return TensorHandle(np.take_along_axis(data, at, axis=axis + 1), src.dtype.scalar)

    def create_expand_dims(self, arg: Any, axis: int) -> Any:
        return TensorHandle(np.expand_dims(arg.data, axis + 1), arg.dtype.scalar)

    def create_broadcast(self, arg: Any, shape: Any) -> Any:
        return TensorHandle(np.broadcast_to(arg.data, (len(arg.data), *shape)), arg.dtype.scalar)

    def create_cat(self, lhs: Any, rhs: Any) -> Any:
        count = max(len(lhs.data), len(rhs.data))
        both = [np.broadcast_to(each.data, (count, *each.data.shape[1:])) for each in (lhs, rhs)]
        return TensorHandle(np.concatenate(both, 1), lhs.dtype.scalar)

    def create_join(self, lhs: Any, rhs: Any) -> Any:
        return TensorHandle(np.stack(np.broadcast_arrays(lhs.data, rhs.data), -1), lhs.dtype.scalar)

    def create_splat(self, ret_ty: Any, arg: Any) -> Any:
        shape = ret_ty.shape
        data = _shaped(arg.data, *[1] * len(shape))
        return TensorHandle(np.broadcast_to(data, (len(data), *shape)), arg.dtype.scalar)

    def create_unsplat(self, arg: Any) -> Any:
        return TensorHandle(_shaped(arg.data), arg.dtype.scalar)

    def create_atomic_rmw(self, rmwOp: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any) -> Any:
        shape = np.broadcast_shapes(ptr.data.shape, val.data.shape, mask.data.shape, self.programs.each(ptr.data.ndim))
        pointers, values, seen = (
            TensorHandle(np.ascontiguousarray(np.broadcast_to(each.data, shape)), each.dtype)
            for each in (ptr, val, mask)
        )
        seen.data = self.programs.masked(pointers.data, seen.data)
        self.programs.atomic |= rmwOp not in _REPEATABLE
        return super().create_atomic_rmw(rmwOp, pointers, values, seen, sem, scope)

    def _refuse(self, *given: Any, **named: Any) -> Any:
        raise NotImplementedError("programs in step know no such operation")

    create_atomic_cas = create_atomic_load = create_atomic_store = create_atomic_poll = _refuse
    create_histogram = create_make_tensor_descriptor = _refuse


def _tensor(data: Array, dtype: Any) -> Any:
    """A value of Triton's, of one scalar or block per program."""
    data = data.astype(interpreter._get_np_dtype(dtype), copy=False)
    shape = list(data.shape[1:])
    return tl.core.tensor(TensorHandle(data, dtype.scalar), tl.block_type(dtype, shape) if shape else dtype)


def _combined(function: Any, left: tuple[Any, ...], right: tuple[Any, ...]) -> tuple[Any, ...]:
    found = function.fn(*left, *right)
    return found if isinstance(found, tuple) else (found,)


_FOLDS: dict[Any, Callable[..., Any]] = {
    tl.standard._elementwise_max: np.nanmax,
    tl.standard._elementwise_min: np.nanmin,
    tl.standard._sum_combine: np.sum,
}
_PLACES = {
    tl.standard._argmin_combine_tie_break_left: (np.nanmin, np.nanargmin),
    tl.standard._argmin_combine_tie_break_fast: (np.nanmin, np.nanargmin),
    tl.standard._argmax_combine_tie_break_left: (np.nanmax, np.nanargmax),
    tl.standard._argmax_combine_tie_break_fast: (np.nanmax, np.nanargmax),
}


class Reduce(interpreter.ReduceOps):
    def apply_impl(self, input: tuple[Any, ...]) -> list[Any]:
        data, dtypes = [each.handle.data for each in input], [each.dtype for each in input]
        rank = data[0].ndim - 1
        if self.axis is None:
            data = [_shaped(each, -1) for each in data]
        at = 1 if self.axis is None else self.axis % rank + 1
        if self.combine_fn in _PLACES:
            highest, place = _PLACES[self.combine_fn]
            found, dtypes = [highest(data[0], axis=at), place(data[0], axis=at)], [dtypes[0], tl.int32]
        elif self.combine_fn in _FOLDS:
            found = [_FOLDS[self.combine_fn](data[0], axis=at)]
        else:
            found = self._fold(data, dtypes, at)
        if self.keep_dims:
            found = [_shaped(x, *[1] * rank) if self.axis is None else np.expand_dims(x, at) for x in found]
        return [_tensor(x, dtype) for x, dtype in zip(found, dtypes, strict=True)]

    def _fold(self, data: list[Array], dtypes: list[Any], at: int) -> list[Array]:
        parts = [
            tuple(_tensor(x.take(i, at), dtype) for x, dtype in zip(data, dtypes, strict=True))
            for i in range(data[0].shape[at])
        ]
        folded = parts[0]
        for part in parts[1:]:
            folded = _combined(self.combine_fn, folded, part)
        return [each.handle.data for each in folded]


class Scan(interpreter.ScanOps):
    def apply_impl(self, input: tuple[Any, ...]) -> list[Any]:
        data, dtypes, at = [each.handle.data for each in input], [each.dtype for each in input], self.axis + 1
        if self.reverse:
            data = [np.flip(each, at) for each in data]
        if self.combine_fn is tl.standard._sum_combine:
            found = [np.cumsum(data[0], axis=at)]
        elif self.combine_fn is tl.standard._prod_combine:
            found = [np.cumprod(data[0], axis=at)]
        else:
            lines: list[tuple[Any, ...]] = []
            for i in range(data[0].shape[at]):
                part = tuple(_tensor(x.take(i, at), dtype) for x, dtype in zip(data, dtypes, strict=True))
                lines.append(_combined(self.combine_fn, lines[-1], part) if lines else part)
            # A combined value may be the same for all programs while others are not.
            columns = ([each.handle.data for each in column] for column in zip(*lines, strict=True))
            found = [np.stack(np.broadcast_arrays(*column), at) for column in columns]
        if self.reverse:
            found = [np.flip(each, at) for each in found]
        return [_tensor(x, dtype) for x, dtype in zip(found, dtypes, strict=True)]


def _launch(self: Any, *given: Any, **named: Any) -> None:
    """`GridExecutor.__call__`. Tensors are the host's own: nothing is copied there and back."""
    if not hasattr(self.fn, "parameters"):
        self.fn.parameters = inspect.signature(self.fn).parameters
    named = {name: value for name, value in named.items() if name in self.fn.parameters}
    for hook in self.pre_run_hooks:
        hook(*given, **named)
    interpreter._patch_lang(self.fn)
    arguments = inspect.getcallargs(self.fn, *given, **named)
    arguments = {
        name: value if name in self.constexprs else interpreter._implicit_cvt(value)
        for name, value in arguments.items()
    }
    grid = self.grid(arguments) if callable(self.grid) else self.grid
    grid = (*grid, *[1] * (3 - len(grid)))
    builder = interpreter.interpreter_builder
    builder.set_grid_dim(*grid)
    whole = np.array(list(itertools.product(*map(range, grid))), dtype=np.int32)
    waiting = [whole[first : first + MOST_PROGRAMS] for first in range(0, len(whole), MOST_PROGRAMS)]
    while waiting:
        builder.programs = Programs(waiting.pop())
        try:
            self.fn(**arguments)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error
        waiting += builder.programs.parted


def enable() -> None:
    """Let every launch of this process run its programs in step. To be called once, when the interpreter is on."""
    if interpreter.GridExecutor.__call__ is _launch:
        return
    interpreter.interpreter_builder = Builder()
    interpreter.interpreter_semantic = type(interpreter.interpreter_semantic)(interpreter.interpreter_builder)
    interpreter.ReduceOps, interpreter.ScanOps = Reduce, Scan
    interpreter.GridExecutor.__call__ = _launch
    _patch_language_once()
    _remember_shapes()


def _patch_language_once() -> None:
    """The interpreter gives Triton's functions their meaning anew for every launch and call, 300 of them each time."""
    patch, patched = interpreter._patch_lang, set()

    def agreed(value: Any) -> Any:
        # The interpreter's own: a block is true.
        return True if value.type.is_block() else builder.programs.agreed(value.handle.data)

    def transposed(value: Any) -> Any:
        return tl.trans(value)

    def once(function: Any) -> Any:
        if id(function.__globals__) not in patched:
            patch(function)
            patched.add(id(function.__globals__))
            tl.tensor.__bool__ = lambda self: bool(agreed(self))
            tl.tensor.__index__ = lambda self: int(agreed(self))
            tl.tensor.T = property(transposed)
        return _Kept()

    builder = interpreter.interpreter_builder
    interpreter._patch_lang = once


class _Kept:
    def restore(self) -> None:
        """Nothing: the next launch needs the same."""


def _remember_shapes() -> None:
    """What Triton makes of a shape and of a type, anew for every value. Types of the same shape share it: equal at a glance."""
    shapes: dict[Any, tuple[Any, int, Any, Any]] = {}
    dtypes: dict[str, Any] = {}
    make_block, make_dtype, equal = tl.block_type.__init__, interpreter._get_np_dtype, tl.core.tuple.__eq__
    scalar = tl.core.tuple([]), tl.constexpr(1)

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.of_tensors if type.is_block() else scalar

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (*(s.value if isinstance(s, tl.constexpr) else s for s in shape),)
        if key not in shapes:
            make_block(self, element_ty, shape)
            of_tensors = tl.core.tuple([tl.constexpr(s) for s in key]), tl.constexpr(math.prod(key))
            shapes[key] = self.shape, self.numel, of_tensors, str(self.shape)
        self.element_ty = element_ty
        self.shape, self.numel, self.of_tensors, name = shapes[key]
        self.name = f"<{name}, {element_ty}>"

    def same(self: Any, other: Any) -> Any:
        return tl.constexpr(True) if self is other else equal(self, other)

    def np_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = make_dtype(dtype)
        return dtypes[name]

    tl.core.tensor.__init__, tl.block_type.__init__, tl.core.tuple.__eq__ = tensor, block, same
    interpreter._get_np_dtype = np_dtype
