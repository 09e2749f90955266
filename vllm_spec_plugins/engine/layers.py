# SPDX-License-Identifier: Apache-2.0
"""Running part of a vLLM model: a layer plan takes effect for one forward pass, and leaves nothing behind.

A skipped layer hands on what it was given; a skipped block adds zeros to the residual stream. Both are installed as
`forward` of the layer's or block's instance while a pass runs, so the model that torch.compile sees, and every pass without a
plan, is vLLM's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context, set_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import LinearBase

from vllm_spec_plugins.layers.plan import LayerPlan

# Arguments of a layer that are rows of the batch, by their names in vLLM's models.
HIDDEN, RESIDUAL = "hidden_states", "residual"
POSITIONS = ("positions", "position_ids")


class UnsupportedModel(RuntimeError):
    """Part of this model cannot be run; the message says why."""


class Layers:
    """The decoder layers of a loaded model.

    Layers take `hidden_states` [n, H], maybe `positions` [n] and `residual` [n, H] | None, and return the new hidden states,
    alone or with the residual. Raises UnsupportedModel where that is not so.

    Attributes:
        layers: L modules.
        names: per layer, of its attention in vLLM's table of layers.
        separable: attention and MLP can be skipped apart.
    """

    def __init__(self, model: nn.Module, vllm_config: VllmConfig) -> None:
        self.model, self.config = model, vllm_config
        self.what = type(model).__name__
        self.layers = list(_decoder_layers(model, self.what))
        self.names = [self._attention_name(layer) for layer in self.layers]
        self.parameters = list(inspect.signature(type(self.layers[0]).forward).parameters.values())[1:]
        self._check_parameters()
        self.with_residual = any(p.name == RESIDUAL for p in self.parameters)
        self._blocks = [_blocks(layer) for layer in self.layers]
        self._check_convention()

    def __len__(self) -> int:
        return len(self.layers)

    @contextmanager
    def running(self, plan: LayerPlan, after: Callable[[int, Tensor], None] | None = None) -> Iterator[None]:
        """Forward passes inside run `plan`. Compiled code has its control flow baked in: see `skip_compiled`.

        Args:
            after: called with the number of a layer that has run and the residual stream [n, H] behind it.
        """
        if plan.num_layers != len(self):
            raise ValueError(f"a plan for {plan.num_layers} layers does not fit the {len(self)} of {self.what}")
        replaced: list[nn.Module] = []

        def install(module: nn.Module, forward: Callable[..., Any]) -> None:
            module.__dict__["forward"] = forward
            replaced.append(module)

        try:
            for number, layer in enumerate(self.layers):
                attention, mlp = plan.attention[number], plan.mlp[number]
                if not attention and not mlp:
                    install(layer, self.hand_on)
                    continue
                if not attention or not mlp:
                    for module, forward in self._silent(number, attention, mlp):
                        install(module, forward)
                if after is not None:
                    install(layer, self._tapped(layer, number, after))
            yield
        finally:
            for module in replaced:
                del module.__dict__["forward"]

    def blocks(self, number: int) -> tuple[nn.Module, list[nn.Module]]:
        """A layer's attention block and the modules of its MLP block."""
        found = self._blocks[number]
        assert found is not None, "checked when the layers were found"
        return found

    @contextmanager
    def running_rows(self, rows: Mapping[int, Tensor]) -> Iterator[None]:
        """Forward passes inside run some layers on some of the rows only; for compiled code see `skip_compiled`.

        Args:
            rows: by number of a layer that not every row runs, [m] int64, those that do; they may be none. Behind the layer's
                name in `names`, the forward context must hold the attention metadata and slot mapping of just these rows.
        """
        forwards = {
            self.layers[number]: self._on_rows(self.layers[number], some) if len(some) else self.hand_on
            for number, some in rows.items()
        }
        try:
            for layer, forward in forwards.items():
                layer.__dict__["forward"] = forward
            yield
        finally:
            for layer in forwards:
                layer.__dict__.pop("forward", None)

    def check_rows(self) -> None:
        """Raise UnsupportedModel unless layers can run on part of the rows."""
        table = self.config.compilation_config.static_forward_context
        if shared := [name for name in self.names if getattr(table[name], "kv_sharing_target_layer_name", None)]:
            raise UnsupportedModel(
                f"{len(shared)} layers of {self.what} read the K/V of other layers, which a row may have skipped"
            )

    @contextmanager
    def ending(self, stream: Tensor) -> Iterator[None]:
        """Forward passes inside run no layer: they end with what the final norm makes of `stream` [n, H]."""
        given: Any = stream
        if self.with_residual:
            given = (torch.zeros_like(stream), stream) if self.pending else (stream, None)
        self.layers[0].__dict__["forward"] = lambda *args, **kwargs: given
        try:
            for layer in self.layers[1:]:
                layer.__dict__["forward"] = self.hand_on
            yield
        finally:
            for layer in self.layers:
                layer.__dict__.pop("forward", None)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """A layer's arguments by name."""
        return dict(zip((p.name for p in self.parameters), args, strict=False)) | kwargs

    def hand_on(self, *args: Any, **kwargs: Any) -> Any:
        """`forward` of a layer that is skipped."""
        given = self.bind(args, kwargs)
        return (given[HIDDEN], given[RESIDUAL]) if self.with_residual else given[HIDDEN]

    def _on_rows(self, layer: nn.Module, rows: Tensor) -> Callable[..., Any]:
        forward = layer.forward

        def some(*args: Any, **kwargs: Any) -> Any:
            given = self.bind(args, kwargs)
            for name, each in given.items():
                if each is not None and name not in (HIDDEN, RESIDUAL, *POSITIONS):
                    raise UnsupportedModel(
                        f"layers of {self.what} are given {name}, of which a row's part is not known"
                    )
            output = forward(
                **{name: each if each is None else each.index_select(0, rows) for name, each in given.items()}
            )
            if not self.with_residual:
                return given[HIDDEN].index_copy(0, rows, output)
            hidden, residual = output
            before = given[RESIDUAL]
            if before is None:  # the first layer: all of a skipped row's stream stands in its hidden state
                before = residual.new_zeros(len(given[HIDDEN]), *residual.shape[1:])
            return given[HIDDEN].index_copy(0, rows, hidden), before.index_copy(0, rows, residual)

        return some

    def stream(self, output: Any) -> Tensor:
        """[n, H], the residual stream behind a layer that returned `output`."""
        if not self.with_residual:
            return output
        hidden, residual = output
        return hidden + residual if self.pending else hidden

    def _tapped(self, layer: nn.Module, number: int, after: Callable[[int, Tensor], None]) -> Callable[..., Any]:
        forward = layer.forward

        def tapped(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            after(number, self.stream(output))
            return output

        return tapped

    def _silent(self, number: int, attention: bool, mlp: bool) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        """The modules of the blocks that do not run, and what stands in for them."""
        if not self.separable:
            raise UnsupportedModel(
                f"attention and MLP of {type(self.layers[0]).__name__} cannot be told apart; skip whole layers"
            )
        own, others = self._blocks[number]  # type: ignore[misc]
        size = self.config.model_config.get_hidden_size()

        def zeros(*args: Any, **kwargs: Any) -> Tensor:
            rows = kwargs[HIDDEN] if HIDDEN in kwargs else next(a for a in args if a.is_floating_point())
            return rows.new_zeros(len(rows), size)

        if not attention:
            yield own, zeros
        if not mlp:
            for linear in others[:-1]:
                yield linear, lambda rows: (rows, None)
            last = others[-1]
            yield last, (lambda rows: (zeros(rows), None)) if isinstance(last, LinearBase) else zeros

    def _attention_name(self, layer: nn.Module) -> str:
        found = [module for module in layer.modules() if isinstance(module, AttentionLayerBase)]
        if len(found) != 1:
            raise UnsupportedModel(f"a layer of {self.what} has {len(found)} attention layers, not one")
        return found[0].layer_name

    def _check_parameters(self) -> None:
        names = {p.name for p in self.parameters}
        needed = [p.name for p in self.parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        strange = [name for name in needed if name not in (HIDDEN, RESIDUAL, *POSITIONS)]
        if HIDDEN not in names or strange:
            raise UnsupportedModel(
                f"layers of {self.what} are called with {', '.join(needed)}; supported are {HIDDEN}, {RESIDUAL}, positions"
            )

    def _check_convention(self) -> None:
        """Show, on one made-up token, that layers add to a residual stream: with its blocks silent, a layer changes nothing.

        That tells whether the residual's addition is still to come (Llama: the stream is the sum of both) or done
        (Cohere), and refuses models that normalise the stream itself (OPT-350M).
        """
        self.separable = all(
            blocks is not None
            and blocks[1]
            and (len(blocks[1]) == 1 or all(isinstance(b, LinearBase) for b in blocks[1]))
            for blocks in self._blocks
        )
        if not self.separable:
            raise UnsupportedModel(
                f"the blocks of {type(self.layers[0]).__name__} cannot be told apart, so that it adds to a residual stream "
                f"cannot be shown"
            )
        weight = next(self.layers[0].parameters())
        rows = torch.linspace(-1, 1, self.config.model_config.get_hidden_size(), device=weight.device)[None]
        rows = rows.to(self.config.model_config.dtype)
        given = {
            HIDDEN: rows.clone(),
            RESIDUAL: None,
            "positions": torch.zeros(1, dtype=torch.int64, device=weight.device),
        }
        given["position_ids"] = given["positions"]
        given = {p.name: given[p.name] for p in self.parameters if p.name in given}
        self.pending = False
        silent = list(self._silent(0, attention=False, mlp=False))
        try:
            for module, forward in silent:
                module.__dict__["forward"] = forward
            with torch.inference_mode(), set_forward_context(None, self.config, skip_compiled=True):
                output = self.layers[0](**given)
        finally:
            for module, _ in silent:
                module.__dict__.pop("forward", None)
        kind = [type(each).__name__ for each in output] if isinstance(output, tuple) else type(output).__name__
        if isinstance(output, tuple) != self.with_residual or (self.with_residual and len(output) != 2):
            raise UnsupportedModel(
                f"layers of {self.what} return {kind}; supported are the hidden states, with the residual if they take one"
            )
        self.pending = self.with_residual and not torch.equal(output[0], rows)
        if not torch.equal(self.stream(output), rows):
            raise UnsupportedModel(
                f"layers of {self.what} do more to the residual stream than add to it, so that none of them can be skipped"
            )


def skip_compiled() -> None:
    """Let the forward pass that is about to start leave compiled code out."""
    get_forward_context().skip_compiled = True


def _decoder_layers(model: nn.Module, what: str) -> nn.ModuleList:
    """The list that `make_layers` made: its owner knows where it starts and ends."""
    for module in model.modules():
        start, end = getattr(module, "start_layer", None), getattr(module, "end_layer", None)
        if not isinstance(start, int) or not isinstance(end, int):
            continue
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == end - start:
                if len({type(layer) for layer in child}) > 1:
                    raise UnsupportedModel(f"{what} has layers of several kinds")
                return child
    raise UnsupportedModel(f"{what} has no list of decoder layers")


def _blocks(layer: nn.Module) -> tuple[nn.Module, list[nn.Module]] | None:
    """The layer's attention block and the modules of its MLP block in order; None when they are not its children.

    What has matrices and is not attention is the MLP's. Matrices are known by their `quant_method`: a CPU packs the weights
    away.
    """
    attention, others = [], []
    for child in layer.children():
        if any(isinstance(module, AttentionLayerBase) for module in child.modules()):
            attention.append(child)
        elif any(hasattr(module, "quant_method") for module in child.modules()):
            others.append(child)
    return (attention[0], others) if len(attention) == 1 else None
