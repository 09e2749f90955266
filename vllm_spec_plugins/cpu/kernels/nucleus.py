# SPDX-License-Identifier: Apache-2.0
"""Top-k and top-p without sorting the vocabulary (vllm/v1/sample/ops/topk_topp_sampler.py).

vLLM's torch version sorts every row together with its indices, which costs more than a layer of a tiny model. The cut
needs values only, and of those only the ones near it.
"""

from __future__ import annotations

import numpy as np
import torch

from vllm_spec_plugins.cpu.kernels import loops
from vllm_spec_plugins.cpu.kernels.views import Array

Tensor = torch.Tensor

_NO_K, _NO_P = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32)


def options(k: Tensor | None, p: Tensor | None) -> tuple[Array, Array]:
    """k and p of every row as the compiled loops take them: int32[n] and float32[n], of length 0 where there are none."""
    return (_NO_K if k is None else k.numpy()), (_NO_P if p is None else p.numpy())


def apply_top_k_top_p(logits: Tensor, k: Tensor | None, p: Tensor | None) -> Tensor:
    """Mask what is not among the k largest logits and not in the nucleus of mass p of those; returns the masked logits.

    logits: float32[n, vocab_size], masked in place (of another dtype, or not contiguous: a copy); k: int[n],
    p: float32[n].
    Ties as in vLLM's torch version: equals of the k-th largest are all kept;
    of equals at the edge of the nucleus those with the lower token ids go first. The largest is always kept.
    """
    logits = logits.float().contiguous()
    loops.cut_each(logits.numpy(), *options(k, p))
    return logits
