# SPDX-License-Identifier: Apache-2.0
"""Find once, on prompts of the kind that will be served, which blocks a self-draft of a model may skip.

    vllm-spec tune self-draft --model M --data prompts.jsonl --output plan.json

It serves the prompts with `--plugin self-draft:skip=auto` in this process, scoring as often as their answers allow, until the
search is over or every prompt is answered `--passes` times. `vllm serve M --plugin self-draft:skip=plan.json` uses the file.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_spec_plugins import engine_args
from vllm_spec_plugins.config import SettingError
from vllm_spec_plugins.layers.plan_file import PlanFile
from vllm_spec_plugins.tools.load import load_prompts

# Prompts that are answered together: after each such part it is looked whether the search is over.
TOGETHER = 8


def tune(arguments: argparse.Namespace, prompts: Sequence[str], out: Console) -> PlanFile:
    """Serve `prompts` until the search is over. Raises ValueError when their answers were too short for a score."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the search is read from this process
    from vllm import LLM, SamplingParams

    plugin = engine_args(
        "self-draft", skip="auto", skip_share=arguments.skip_share, search_every=1, search_budget=10.0, adapt=False
    )
    settings: dict[str, Any] = {"dtype": arguments.dtype, "max_num_seqs": TOGETHER, "enforce_eager": True, **plugin}
    for key in ("max_model_len", "kv_cache_memory_bytes"):
        if (given := getattr(arguments, key)) is not None:
            settings[key] = given
    llm: Any = LLM(arguments.model, **settings)
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    search = runner.speculator.drafters[0].planner.search
    answered = 0
    for i, part in enumerate(_parts(prompts, arguments.passes)):
        sampling = SamplingParams(temperature=arguments.temperature, seed=i, max_tokens=arguments.max_tokens)
        llm.generate(part, sampling, use_tqdm=False)
        answered += len(part)
        out.print(
            f"  {answered} answers, {len(search.scores)} scores: skip {search.best.skipped or 'nothing'}, "
            f"agreement {search.agreement or 0.0:.3f}"
        )
        if search.settled:
            break
    if not search.settled:
        out.print("  the search is not over: more prompts or --passes may find a better plan")
    if search.agreement is None:
        raise ValueError("no answer was long enough to score a plan on; give other prompts, or a larger --max-tokens")
    return PlanFile(arguments.model, search.best, search.agreement, min(answered, len(prompts)))


def _parts(prompts: Sequence[str], passes: int) -> list[list[str]]:
    every = list(chain.from_iterable(repeat(list(prompts), passes)))
    return [every[i : i + TOGETHER] for i in range(0, len(every), TOGETHER)]


def run(arguments: argparse.Namespace) -> int:
    """Exit status: 1 when there is no plan."""
    out = Console()
    try:
        prompts = arguments.prompt or load_prompts(arguments.data, arguments.prompts)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        found = tune(arguments, prompts, out)
    except (OSError, SettingError, ValueError) as error:
        out.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    found.write(arguments.output)
    out.print(f"The draft skips {found.plan.skipped} and runs {found.plan.share:.0%} of the blocks.", markup=False)
    out.print(f"vllm serve {found.model} --plugin self-draft:skip={arguments.output}", markup=False, soft_wrap=True)
    return 0


def parser(prog: str) -> argparse.ArgumentParser:
    """The command's arguments."""
    found = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").splitlines()[0])
    found.add_argument("method", choices=["self-draft", "cascade"], help="see also tune cascade --help")
    found.add_argument("--model", required=True, help="folder or hub id of the target")
    data = found.add_mutually_exclusive_group(required=True)
    data.add_argument("--data", type=Path, help='JSON lines with a "prompt" each')
    data.add_argument("--prompt", action="append", help="a prompt; may be given several times")
    found.add_argument("--prompts", type=int, default=32, help="so many of --data, from its beginning")
    found.add_argument("--output", type=Path, required=True, help="the plan file to write, NAME.json")
    found.add_argument("--max-tokens", type=int, default=256, help="of an answer")
    found.add_argument("--passes", type=int, default=4, help="times that every prompt is answered, at most")
    found.add_argument("--temperature", type=float, default=0.8)
    found.add_argument("--skip-share", type=float, default=0.45, help="blocks that candidates skip, about")
    found.add_argument("--dtype", default="auto")
    found.add_argument("--max-model-len", type=int)
    found.add_argument("--kv-cache-memory-bytes", type=int)
    return found


def main(argv: Sequence[str] | None = None, prog: str = "python -m vllm_spec_plugins.tools.tune") -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["cascade"]:  # with arguments of its own
        from vllm_spec_plugins.tools import cascade

        return cascade.main(given, prog)
    arguments = parser(prog).parse_args(given)
    if arguments.output.suffix != ".json":
        Console().print(f"error: --output {arguments.output} does not end in .json", markup=False, soft_wrap=True)
        return 2
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
