# SPDX-License-Identifier: Apache-2.0
"""Serves requests with plugins in the interpreted lane, one engine after the other in a process of its own.

    python -m tests.engine.cpu.served < job.json

The job: {"engines": {label: {"plugin": name, "settings": the plugin's, "arguments": LLM's}}, "scales": of keys and values in
8-bit caches, "batch": [{"prompt": token ids, "params": SamplingParams arguments}, ...], "sizes": rows of the target's graphs,
"seed": int}. Prints one JSON object: label -> tokens, attention classes, bytes of a K/V cache's element, launches by kernel, and
the target's steps; of "specinfer" also what comes of passes that are replayed from graphs (graphs.py).
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from typing import Any

import pytest


def main() -> dict[str, Any]:
    os.environ["TEST_LANE"] = "interpreted"
    import tests.engine.conftest  # noqa: F401  (before vllm is imported)
    import vllm_spec_plugins
    from tests.engine.cpu import graphs
    from tests.engine.cpu.decode import DEFAULTS, TARGET
    from tests.engine.test_on_device import check_draft

    job = json.load(sys.stdin)
    from triton.runtime.interpreter import GridExecutor
    from vllm import LLM, SamplingParams

    launches: Counter[str] = Counter()
    launch = GridExecutor.__call__

    def counted(self: Any, *arguments: Any, **given: Any) -> Any:
        launches[self.fn.__name__] += 1
        if self.fn.__name__ == "tree_attention_kernel":
            launches["scaled"] += given["SCALED"]
        return launch(self, *arguments, **given)

    GridExecutor.__call__ = counted
    found, made = {}, []  # engines live as long as the process: shutting one down tears down what all of them share
    for name, engine in job["engines"].items():
        plugin = vllm_spec_plugins.engine_args(engine["plugin"], **engine["settings"])
        llm = LLM(str(TARGET), **{**DEFAULTS, **plugin, **engine["arguments"]})
        made.append(llm)
        layers = list(llm.llm_engine.vllm_config.compilation_config.static_forward_context.values())
        for number, layer in enumerate(layers):  # as if the checkpoint had brought them: every layer its own
            layer._k_scale.fill_(job["scales"][0] * (1 + number / 8))
            layer._v_scale.fill_(job["scales"][1] * (1 + number / 8))
        launches.clear()  # those of the start
        requests = [{"prompt_token_ids": request["prompt"]} for request in job["batch"]]
        params = [SamplingParams(**request["params"]) for request in job["batch"]]
        outputs = llm.generate(requests, params, use_tqdm=False)
        found[name] = {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "attention": sorted({type(layer.impl).__name__ for layer in layers}),
            "bytes": sorted({layer.kv_cache.element_size() for layer in layers}),
            "launches": dict(launches),
            "steps": llm.llm_engine.engine_core.engine_core.scheduler.current_step,
        }
        if name == "specinfer":
            with graphs.captured(llm, job["sizes"]) as drafter:
                before, patch = graphs.Graph.replays, pytest.MonkeyPatch()
                checked = check_draft(llm, patch)
                outputs = llm.generate(requests, params, use_tqdm=False)
                patch.undo()
                found[name]["replayed"] = {
                    "tokens": [list(output.outputs[0].token_ids) for output in outputs],
                    "replays": graphs.Graph.replays - before,
                    "checked": checked,
                    "shown": graphs.checks(drafter, job["seed"]),
                }
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
