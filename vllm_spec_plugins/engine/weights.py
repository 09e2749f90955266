# SPDX-License-Identifier: Apache-2.0
"""Weights that a plugin brings beside the target's: found, checked before the engine starts, read by vLLM's loaders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.weight_utils import (
    download_weights_from_hf,
    pt_weights_iterator,
    safetensors_weights_iterator,
)

# In the order of preference; a folder with both kinds holds the same weights twice.
_PATTERNS = ("*.safetensors", "*.bin", "*.pt")


class MissingWeights(ValueError):
    """There are no weights where the user said; the message says what was looked for."""


def files(model: str, load: LoadConfig) -> list[Path]:
    """The weight files of a folder or hub id (downloaded when it is one). Raises MissingWeights."""
    folder = Path(model)
    if not folder.is_dir():
        if not model or model.startswith((".", "/", "~")) or model.count("/") != 1:
            raise MissingWeights(f"{model or 'nothing'} is neither a folder nor a hub id")
        try:
            folder = Path(download_weights_from_hf(model, load.download_dir, list(_PATTERNS)))
        except (OSError, ValueError) as error:
            raise MissingWeights(f"{model} is no folder and could not be downloaded ({error})") from error
    for pattern in _PATTERNS:
        if found := sorted(folder.glob(pattern)):
            return found
    raise MissingWeights(f"{folder} holds no {', '.join(_PATTERNS)}")


def shapes(model: str, load: LoadConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors, without reading safetensors' data."""
    found: dict[str, tuple[int, ...]] = {}
    for file in files(model, load):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        else:
            state: dict[str, Any] = torch.load(file, map_location="meta", weights_only=True, mmap=True)
            found |= {name: tuple(tensor.shape) for name, tensor in state.items()}
    return found


def tensors(model: str, load: LoadConfig) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors."""
    found = [str(file) for file in files(model, load)]
    if found[0].endswith(".safetensors"):
        yield from safetensors_weights_iterator(found, use_tqdm_on_load=False)
    else:
        yield from pt_weights_iterator(found, use_tqdm_on_load=False, pt_load_map_location="cpu")
