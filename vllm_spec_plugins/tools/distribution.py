# SPDX-License-Identifier: Apache-2.0
"""Does a plugin sample what the model says? Unseeded samples of a real server against the model's exact probabilities.

The first tokens of every sample are tested jointly, by chi-square, against probabilities that transformers computes in
fp32 from the same checkpoint. The same samples are tested against a neighbouring temperature too: that test must fail, or
the samples are too few to show anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_spec_plugins.tools import chisquare
from vllm_spec_plugins.tools.load import Sampling, send
from vllm_spec_plugins.tools.server import Counters, Server

# Text that repeats itself: without drafts, and some of them accepted, there would be nothing to test.
PROMPTS = (
    "    def __init__(self, name, value):\n        self.name = name\n        self.value =",
    "    def test_a(self):\n        self.assertEqual(a, 1)\n        self.assertEqual(b, 2)\n        self.",
    "import os\nimport sys\nimport re\nimport time\nimport",
    "    if x is None:\n        return None\n    if y is None:\n        return None\n    if z is",
    "    for i in range(10):\n        for j in range(10):\n            for k in",
)
TEMPERATURE, OTHER_TEMPERATURE = 0.8, 0.9
LENGTH = 3
# What a server gets beside the configuration's own: prompts share their prefix through the cache. A --seed must be added:
# unseeded requests draw their seeds from the server's, so that two servers with one seed give the same samples.
ARGUMENTS = (
    "--dtype",
    "float32",
    "--max-model-len",
    "256",
    "--block-size",
    "32",
    "--kv-cache-memory-bytes",
    str(1 << 29),
)
PER_REQUEST = 200


@dataclass(frozen=True)
class Outcome:
    """The test of one prompt. `other`: the same samples against the other temperature."""

    prompt: str
    samples: int
    groups: int
    result: chisquare.Result
    other: chisquare.Result
    counters: Counters

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "samples": self.samples,
            "groups": self.groups,
            "statistic": self.result.statistic,
            "degrees": self.result.degrees,
            "p": self.result.p,
            f"p_at_temperature_{OTHER_TEMPERATURE}": self.other.p,
            "draft_tokens": self.counters.draft_tokens,
            "accepted": self.counters.accepted,
        }


class ExactModel:
    """The checkpoint's own next-token probabilities, from transformers in fp32."""

    def __init__(self, model: Path | str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def conditional(self, prompt_ids: Sequence[int], temperature: float, batch: int = 32) -> chisquare.Conditional:
        """Next-token probabilities at `temperature` after the prompt and a prefix."""

        @torch.inference_mode()
        def probabilities(prefixes: Sequence[chisquare.Prefix]) -> np.ndarray:
            rows = []
            for start in range(0, len(prefixes), batch):
                ids = torch.tensor([[*prompt_ids, *prefix] for prefix in prefixes[start : start + batch]])
                logits = self._model(input_ids=ids, logits_to_keep=1).logits[:, -1].double()
                rows.append((logits / temperature).softmax(-1).numpy())
            return np.concatenate(rows)

        return probabilities


def check(
    server: Server, model: ExactModel, samples: int, say: Callable[[str], None], prompts: Sequence[str] = PROMPTS
) -> list[Outcome]:
    """`samples` unseeded samples of each prompt from a running server, each prompt tested on its own."""
    outcomes = []
    sampling = Sampling(f"T={TEMPERATURE}", TEMPERATURE)
    for prompt in prompts:
        requests, rest = divmod(samples, PER_REQUEST)
        if rest:
            raise ValueError(f"{samples} samples are not a multiple of {PER_REQUEST}")
        ids = model.tokenizer(prompt)["input_ids"]
        batch = send(
            server, [prompt] * requests, sampling, LENGTH, concurrency=1, extra={"n": PER_REQUEST, "ignore_eos": True}
        )
        drawn = [reply.token_ids for reply in batch.replies]
        tests = []
        for temperature in (TEMPERATURE, OTHER_TEMPERATURE):
            cells = chisquare.partition(model.conditional(ids, temperature), LENGTH, samples)
            tests.append((chisquare.test(cells.count(drawn), cells.probability), len(cells.probability)))
        (result, groups), (other, _) = tests
        outcomes.append(Outcome(prompt, samples, groups, result, other, batch.counters))
        say(f"{prompt.splitlines()[-1].strip()!r}: p = {result.p:.3f} over {groups} groups")
    return outcomes


def verdict(outcomes: Sequence[Outcome], level: float = 0.01) -> tuple[float, float, bool]:
    """(p of all prompts together, the same against the other temperature, whether the samples are the model's own).

    Drafts must have been accepted, and the other temperature must be told apart: else nothing was shown.
    """
    p = chisquare.combined([outcome.result for outcome in outcomes])
    other = chisquare.combined([outcome.other for outcome in outcomes])
    accepted = sum(outcome.counters.accepted for outcome in outcomes)
    return p, other, p > level and other < level and accepted > 0
