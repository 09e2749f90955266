# SPDX-License-Identifier: Apache-2.0
"""What a decode step costs by the layers that it runs. A table of docs/skipdecode.md.

    python tests/models/inflate.py tests/models/target BIG --hidden 512 --intermediate 1536 --layers 16 --heads 16 --kv-heads 8
    python -m tests.engine.depth_cost --model BIG

Engines of one process take turns: plain decoding, SkipDecode at a constant depth for several depths, and its schedules from
max to min layers. Answers of equal length start together, so their depths coincide. Only steps that decode are timed; a ratio is
the median over rounds of that round's plain decoding by it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

# Before vllm is imported: see tests/engine/conftest.py.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ.setdefault("OMP_NUM_THREADS", "1")


def start(model: str, settings: dict[str, Any] | None) -> Any:
    from vllm import LLM

    import vllm_spec_plugins

    plugin = vllm_spec_plugins.engine_args("none") if settings is None else None
    return LLM(
        model,
        **(plugin or vllm_spec_plugins.engine_args("skipdecode", **(settings or {}))),
        dtype="float32",
        enforce_eager=True,
        max_model_len=384,
        max_num_seqs=8,
        kv_cache_memory_bytes=1 << 28,
        enable_prefix_caching=False,
    )


def decode(llm: Any, batch: int, tokens: int) -> float:
    """Tokens per second of the steps in which every request decodes."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    for i in range(batch):
        engine.add_request(f"{id(params)}-{i}", {"prompt_token_ids": [7 + i + j for j in range(24)]}, params)
    scheduler = engine.engine_core.engine_core.scheduler
    while len(scheduler.running) < batch or any(r.num_computed_tokens < r.num_prompt_tokens for r in scheduler.running):
        engine.step()
    steps, begin = 0, time.perf_counter()
    while engine.has_unfinished_requests():
        engine.step()
        steps += 1
    return batch * steps / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True, help="a checkpoint whose time goes into its layers")
    parser.add_argument(
        "--depths", type=int, nargs="+", help="constant depths; the default is every fourth of the layers"
    )
    parser.add_argument("--speedups", type=float, nargs="+", default=[2, 3, 4, 5])
    parser.add_argument("--tokens", type=int, default=65, help="tokens per answer, over which schedules fall")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    layers = json.loads((Path(args.model) / "config.json").read_text())["num_hidden_layers"]
    depths = args.depths or [max(1, layers * part // 8) for part in (1, 2, 3, 4, 6, 8)]
    cases: dict[str, tuple[float, dict[str, Any] | None]] = {"plain": (1.0, None)}
    for depth in depths:
        constant = {"max_layers": depth, "min_layers": depth, "levels": 0}
        cases[f"{depth} layers"] = depth / layers, constant
    for speedup in args.speedups:
        from vllm_spec_plugins.depth_settings import SkipDecodeSettings

        schedule = SkipDecodeSettings(speedup=speedup, max_tokens=args.tokens - 1).schedule(layers)
        name = f"{speedup:g}x: {schedule.max_layers} to {schedule.min_layers}"
        cases[name] = schedule.average / layers, {"speedup": speedup, "max_tokens": args.tokens - 1}
    engines = {name: start(args.model, settings) for name, (_, settings) in cases.items()}
    rows = []
    for batch in args.batch:
        for llm in engines.values():
            decode(llm, batch, 16)
        rounds = [{name: decode(llm, batch, args.tokens) for name, llm in engines.items()} for _ in range(args.rounds)]
        for name, (share, _) in cases.items():
            ratios = [each[name] / each["plain"] for each in rounds]
            row = {
                "case": name,
                "batch": batch,
                "share": round(share, 3),
                "tokens/s": round(median(each[name] for each in rounds), 1),
                "ratio": round(median(ratios), 3),
                "least": round(min(ratios), 3),
                "most": round(max(ratios), 3),
            }
            rows.append(row)
            print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
