# SPDX-License-Identifier: Apache-2.0
"""Decodes lists of requests in one lane, in a process of its own, and prints what came out as JSON.

    python -m tests.engine.cpu.decode LANE < job.json

LANE is v1 (vLLM's own CPU runner, this package not loaded), fast or interpreted. The job: engines by name, made one after the
other, each {"settings": LLM arguments, "async": bool, "batches": [[{"prompt": token ids, "params": SamplingParams arguments},
...], ...]}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parents[2] / "models" / "target"
DEFAULTS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 1 << 26,
}


def prepare(lane: str) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["VLLM_PLUGINS"] = ""  # not even this package's entry point: the lane alone is under test
    if lane == "v1":
        return
    if lane == "interpreted":
        from vllm_spec_plugins.cpu import interpreted

        interpreted.enable()
    from vllm_spec_plugins import cpu

    cpu.install()


def plain(output: Any) -> dict[str, Any]:
    """Tokens, logprobs and prompt logprobs of a finished request, in JSON's types."""

    def positions(found: Any) -> Any:
        return found and [
            at and {str(token): [entry.logprob, entry.rank] for token, entry in at.items()} for at in found
        ]

    done = output.outputs[0]
    return {
        "tokens": list(done.token_ids),
        "text": done.text,
        "finish": done.finish_reason,
        "logprobs": positions(done.logprobs),
        "prompt_logprobs": positions(output.prompt_logprobs),
    }


def decode(job: dict[str, Any], made: list[Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    def sampling(params: dict[str, Any]) -> Any:
        grammar = params.pop("grammar", None)
        if "logit_bias" in params:
            params["logit_bias"] = {int(token): bias for token, bias in params["logit_bias"].items()}
        structured = {"structured_outputs": StructuredOutputsParams(**grammar)} if grammar else {}
        return SamplingParams(**params, **structured)

    os.environ["VLLM_SPEC_CPU_ASYNC"] = str(int(job["async"]))
    llm = LLM(str(TARGET), **{**DEFAULTS, **job["settings"]})
    made.append(llm)  # engines live as long as the process: shutting one down tears down what all of them share
    batches = []
    for batch in job["batches"]:
        prompts = [{"prompt_token_ids": request["prompt"]} for request in batch]
        outputs = llm.generate(prompts, [sampling(request["params"]) for request in batch], use_tqdm=False)
        batches.append([plain(output) for output in outputs])
    engine = llm.llm_engine
    return {
        "batches": batches,
        "runner": type(engine.model_executor.driver_worker.worker.model_runner).__module__,
        "async": engine.vllm_config.scheduler_config.async_scheduling,
    }


if __name__ == "__main__":
    jobs, made = json.load(sys.stdin), []
    prepare(sys.argv[1])
    print(json.dumps({name: decode(job, made) for name, job in jobs.items()}))
