# SPDX-License-Identifier: Apache-2.0
"""What typical acceptance costs in text, and what it brings. The last table of docs/acceptance.md.

    python -m tests.engine.typical_cost

On the tiny target with its Medusa heads, full trees: tokens per step of the walk and of typical acceptance, the target's
mean loss on each text (nats per token at temperature 1), and how much a text repeats itself (its share of distinct 4-grams).
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import vllm_spec_plugins
from tests.engine import compare
from tests.engine.conftest import MODELS, TARGET

TREES = {"model": str(MODELS / "medusa"), "min_chance": 0.0, "adapt": False}
LIMITS = {"ignore_eos": True, "logprobs": 0}
RULES: dict[str, dict[str, Any]] = {
    "walk": {},
    "typical": {"accept": "typical"},
    "typical, eps=.3, delta=.9": {"accept": "typical", "eps": 0.3, "delta": 0.9},
}


def start(rule: dict[str, Any]) -> Any:
    from vllm import LLM

    return LLM(
        str(TARGET),
        **vllm_spec_plugins.engine_args("medusa", **TREES, **rule),
        dtype="float32",
        enforce_eager=True,
        max_model_len=384,
        max_num_seqs=8,
        kv_cache_memory_bytes=1 << 27,
        disable_log_stats=False,
    )


def counters(llm: Any) -> tuple[float, float]:
    """Decode steps of requests, and nodes accepted in them."""
    found = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return found["vllm:spec_decode_num_drafts"], found["vllm:spec_decode_num_accepted_tokens"]


def distinct(tokens: list[int], n: int = 4) -> float:
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams)


def measure(llm: Any, prompts: list[list[int]], temperature: float, tokens: int) -> tuple[float, float, float]:
    """Tokens per step, loss, share of distinct 4-grams."""
    steps, accepted = counters(llm)
    sampling = [{"temperature": temperature, "seed": i} for i in range(len(prompts))]
    outputs = compare.generate(llm, prompts, sampling, max_tokens=tokens, **LIMITS)
    more_steps, more_accepted = counters(llm)
    loss = -sum(output.cumulative_logprob for output in outputs) / sum(len(output.token_ids) for output in outputs)
    variety = sum(distinct(list(output.token_ids)) for output in outputs) / len(outputs)
    return 1 + (more_accepted - accepted) / (more_steps - steps), loss, variety


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96)
    args = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    lines = (MODELS / "heldout_prompts.jsonl").read_text().splitlines()[: args.prompts]
    prompts = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines]
    print("| rule | T | tokens per step | loss | distinct 4-grams |\n|---|---|---|---|---|")
    engines = []  # one that is given up takes down what all of the process share
    for name, rule in RULES.items():
        llm = start(rule)  # the counters are the youngest engine's
        engines.append(llm)
        compare.generate(llm, prompts[:1], [{}], max_tokens=4, **LIMITS)
        for temperature in (0.5, 0.8, 1.0):
            speed, loss, variety = measure(llm, prompts, temperature, args.tokens)
            print(f"| {name} | {temperature} | {speed:.2f} | {loss:.2f} | {variety:.2f} |", flush=True)


if __name__ == "__main__":
    main()
