# SPDX-License-Identifier: Apache-2.0
"""Plain decoding with ``--plugin none`` against vLLM's own CPU runner: time per step, measured alternately in one run.

    python -m tests.engine.cpu.bench_runner [--json] [--pairs 3] [--rounds 8] [--batch 1 8] [--sampled] [--compiled]

Two processes are alive at once, one per runner; they take turns, a round each, so that whatever else the machine does
meets both. A pair's figure is the median over all decoding steps; its ratio is of medians. Where a process' weights come
to lie in memory makes it up to 5% faster or slower for its whole life, so several pairs are started one after the other
and the median pair counts. CPU time is given beside wall time: it says the same on a machine that has other things to do.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
LANES = ("v1", "none")


def serve(lane: str) -> None:
    """Child process: answers one JSON line per round, {"batch", "steps", "sampled"}, with times per step in ms."""
    from tests.engine.cpu.decode import DEFAULTS, TARGET, prepare

    prepare("v1")
    settings = json.loads(sys.argv[-1])
    if lane != "v1":
        import vllm_spec_plugins

        os.environ.pop("VLLM_PLUGINS")  # what a user has: the entry point, and all that the plugin brings
        settings |= vllm_spec_plugins.engine_args(lane)
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    model = settings.pop("model", None) or str(TARGET)
    llm = LLM(model, **{**DEFAULTS, "disable_log_stats": True, **settings})
    engine = llm.llm_engine
    print(json.dumps("ready"), flush=True)
    number = 0
    for line in sys.stdin:
        job = json.loads(line)
        for row in range(job["batch"]):
            number += 1
            sampling = {"temperature": 0.8, "top_p": 0.95, "seed": number} if job["sampled"] else {"temperature": 0.0}
            if lane == "v1":
                sampling.pop("seed", None)  # V1's CPU sampler fails on a seed beside a prefill in chunks
            params = SamplingParams(max_tokens=job["steps"] + 4, ignore_eos=True, detokenize=False, **sampling)
            prompt = TokensPrompt(prompt_token_ids=[(7 * i + 31 * row) % 4000 + 4 for i in range(32)])
            engine.add_request(str(number), prompt, params)
        wall, cpu = [], []
        while engine.has_unfinished_requests():
            before = time.perf_counter(), time.process_time()
            engine.step()
            wall.append(1e3 * (time.perf_counter() - before[0]))
            cpu.append(1e3 * (time.process_time() - before[1]))
        # The first steps prefill, the last one finishes requests.
        print(json.dumps({"wall": wall[3:-1], "cpu": cpu[3:-1]}), flush=True)


class Child:
    def __init__(self, lane: str, settings: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.engine.cpu.bench_runner", "--serve", json.dumps(settings), lane],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(("{", '"')):
                return json.loads(line)
        raise RuntimeError(f"a runner's process ended with status {self.process.wait()}")

    def ask(self, **job: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def measure_pair(
    batches: list[int], rounds: int, steps: int, sampled: bool, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """One row per batch size, from one process per runner."""
    children = {lane: Child(lane, settings) for lane in LANES}
    try:
        for child in children.values():
            assert child.answer() == "ready"
        rows = []
        for batch in batches:
            times: dict[str, dict[str, list[float]]] = {lane: {"wall": [], "cpu": []} for lane in LANES}
            for round_number in range(rounds + 1):
                order = LANES if round_number % 2 else LANES[::-1]
                for lane in order:
                    found = children[lane].ask(batch=batch, steps=steps, sampled=sampled)
                    if round_number:  # the first round warms up
                        for clock, values in found.items():
                            times[lane][clock] += values
            v1, v2 = ({clock: statistics.median(values) for clock, values in times[lane].items()} for lane in LANES)
            rows.append(
                {
                    "batch": batch,
                    "sampled": sampled,
                    "steps": len(times["v1"]["wall"]),
                    "v1_ms": v1["wall"],
                    "v2_ms": v2["wall"],
                    "ratio": v2["wall"] / v1["wall"],
                    "v1_cpu_ms": v1["cpu"],
                    "v2_cpu_ms": v2["cpu"],
                    "cpu_ratio": v2["cpu"] / v1["cpu"],
                }
            )
        return rows
    finally:
        for child in children.values():
            child.close()


def measure(pairs: int, **job: Any) -> list[dict[str, Any]]:
    """The row of the median pair per batch size, with the ratios of all pairs."""
    found = [measure_pair(**job) for _ in range(pairs)]
    rows = []
    for alike in zip(*found, strict=True):
        alike = sorted(alike, key=lambda row: row["ratio"])
        rows.append({**alike[len(alike) // 2], "ratios": [round(row["ratio"], 4) for row in alike]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40, help="decoding steps per round")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--sampled", action="store_true", help="temperature 0.8, top-p 0.95 instead of greedy")
    parser.add_argument("--model", help="a model folder instead of the tiny target")
    parser.add_argument("--compiled", action="store_true", help="compile the model, as vllm serve does by default")
    arguments = parser.parse_args()
    settings: dict[str, Any] = {"enforce_eager": not arguments.compiled}
    if arguments.model:
        settings["model"] = arguments.model
    rows = measure(
        arguments.pairs,
        batches=arguments.batch,
        rounds=arguments.rounds,
        steps=arguments.steps,
        sampled=arguments.sampled,
        settings=settings,
    )
    if arguments.json:
        print(json.dumps({"rows": rows}))
        return
    print(
        f"{'batch':>5} {'V1 ms':>8} {'V2 ms':>8} {'ratio':>6} {'V1 CPU ms':>10} {'V2 CPU ms':>10} {'ratio':>6}  all pairs"
    )
    for row in rows:
        ratios = " ".join(f"{ratio:.3f}" for ratio in row["ratios"])
        print(
            f"{row['batch']:>5} {row['v1_ms']:>8.2f} {row['v2_ms']:>8.2f} {row['ratio']:>6.3f} "
            f"{row['v1_cpu_ms']:>10.2f} {row['v2_cpu_ms']:>10.2f} {row['cpu_ratio']:>6.3f}  {ratios}"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv.pop())
    else:
        main()
