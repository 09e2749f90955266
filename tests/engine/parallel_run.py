# SPDX-License-Identifier: Apache-2.0
"""Two tensor-parallel ranks in processes of their own: prints what a plugin generates. Run by test_parallel.py."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

MODELS = Path(__file__).parents[1] / "models"


def main() -> None:
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine core stays here: a process less that imports vLLM
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    import vllm_spec_plugins

    lines = (MODELS / "heldout_prompts.jsonl").read_text().splitlines()[:8]
    prompts = [json.loads(line)["prompt"] for line in lines]
    numbers = StructuredOutputsParams(regex=r"(\[[0-9]{1,3}, [0-9]{1,3}\]\n){4,12}")
    params = [
        SamplingParams(
            max_tokens=48, temperature=0.8 * (i % 2), seed=i, structured_outputs=numbers if i % 4 > 1 else None
        )
        for i in range(len(prompts))
    ]
    found = {}
    plugins = {"none": "none", "mixture": f"lookahead & medusa:model={MODELS / 'medusa'} & self-draft:exit_layer=2"}
    for name, plugin in plugins.items():
        llm = LLM(
            str(MODELS / "target"),
            **vllm_spec_plugins.engine_args(plugin),
            dtype="float32",
            enforce_eager=True,
            max_model_len=384,
            kv_cache_memory_bytes=1 << 27,
            tensor_parallel_size=2,
            distributed_executor_backend="mp",
            disable_log_stats=False,
        )
        found[name] = [list(out.outputs[0].token_ids) for out in llm.generate(prompts, params, use_tqdm=False)]
        accepted = [m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_accepted_tokens"]
        found[f"accepted by {name}"] = accepted
        llm.llm_engine.engine_core.shutdown()
    print("FOUND", json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
