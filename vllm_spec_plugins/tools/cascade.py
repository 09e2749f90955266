# SPDX-License-Identifier: Apache-2.0
"""``vllm-spec tune cascade``: the boldest deferral rule that keeps a quality, on prompts of your own.

    vllm-spec tune cascade --model MODEL --plugin self-draft:exit_layer=8 --rule difference --data FILE \\
        --quality 0.95 --error 0.1 --output cascade.json

A prompt's loss is the share of its greedy answer's tokens that are not the full model's likeliest token behind the same
text: the full model reads prompt and answer once more and ranks each token. Each of a grid of bounds answers all prompts;
"Learn then Test" (layers/calibration.py) takes the boldest that may be taken to lose at most 1 - quality. The file serves:
vllm serve MODEL --plugin self-draft:exit_layer=8 --plugin cascade:file=cascade.json,route=cheap
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from vllm_spec_plugins import engine_args, registry
from vllm_spec_plugins.cascade.calibration import Calibrated, calibrate
from vllm_spec_plugins.cascade.rules import RULES, DeferralRule, deferral_rule
from vllm_spec_plugins.depth_settings import CascadeSettings
from vllm_spec_plugins.tools import report
from vllm_spec_plugins.tools.load import load_prompts

# Bounds of each rule; an exit policy's are its own, so the user gives them.
GRIDS: dict[str, tuple[float, ...]] = {
    "confidence": (1.0, 0.99, 0.97, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2),
    "difference": (-0.8, -0.5, -0.3, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5),
    "top": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
}


class TuneError(ValueError):
    """What cannot be tuned; the message is the sentence a user reads."""


@dataclass(frozen=True)
class Figures:
    """What a bound does on the calibration prompts.

    Attributes:
        bound: in the rule's own unit.
        loss: mean over prompts of the share of tokens that are not the full model's choice.
        tokens_per_step: tokens per pass of the full model after the prompts.
    """

    bound: float
    loss: float
    tokens_per_step: float


def enough(quality: float, error: float) -> int:
    """Prompts below which no rule can be shown to keep the quality, not even one that loses nothing."""
    return math.ceil(math.log(error) / math.log(quality))


def answers(
    llm: Any, asked: Sequence[Sequence[int]], tokens: int, cascade: Mapping[str, Any]
) -> tuple[list[list[int]], float]:
    """Greedy answers of at most `tokens`, and the engine's tokens per step on the way; `cascade` as in extra_args."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=tokens, extra_args={"cascade": dict(cascade)})
    before = _speculation(llm)
    found = llm.generate([{"prompt_token_ids": list(ids)} for ids in asked], params, use_tqdm=False)
    steps, accepted = (after - first for after, first in zip(_speculation(llm), before, strict=True))
    return [list(result.outputs[0].token_ids) for result in found], 1 + accepted / max(steps, 1)


def _speculation(llm: Any) -> tuple[float, float]:
    """Steps and accepted nodes so far."""
    names = ("vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens")
    found = {metric.name: metric.value for metric in llm.get_metrics() if metric.name in names}
    return found.get(names[0], 0.0), found.get(names[1], 0.0)


def losses(llm: Any, asked: Sequence[Sequence[int]], given: Sequence[Sequence[int]]) -> list[float]:
    """Each answer's share of tokens that are not the full model's likeliest behind what stands before them; 0 if empty."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    texts = [[*ids, *answer] for ids, answer in zip(asked, given, strict=True)]
    found = llm.generate([{"prompt_token_ids": text} for text in texts], params, use_tqdm=False)
    out = []
    for ids, answer, result in zip(asked, given, found, strict=True):
        places = result.prompt_logprobs[len(ids) :]
        wrong = sum(place[token].rank > 1 for place, token in zip(places, answer, strict=True))
        out.append(wrong / max(len(answer), 1))
    return out


def measure(
    llm: Any, asked: Sequence[Sequence[int]], tokens: int, rule: DeferralRule, bounds: Sequence[float], route: str
) -> tuple[dict[float, list[float]], list[Figures]]:
    """Every prompt's loss under every bound, and what each bound does."""
    found: dict[float, list[float]] = {}
    figures = []
    for bound in bounds:
        given, speed = answers(llm, asked, tokens, {"route": route, "threshold": bound})
        found[bound] = losses(llm, asked, given)
        figures.append(Figures(bound, sum(found[bound]) / len(asked), speed))
    return found, figures


def _share(value: str) -> float:
    number = float(value)
    if not 0.0 < number < 1.0:
        raise argparse.ArgumentTypeError(f"{value} is out of range; valid is what lies between 0 and 1")
    return number


def _numbers(value: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{value} is not numbers with commas between; write 0,0.1,0.2") from error


def _count(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value} is out of range; valid are 1 or more")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["cascade"], help="what to tune")
    parser.add_argument("--model", required=True, help="folder or hub id of the full model")
    parser.add_argument("--plugin", required=True, help="the cheap stage, as in vllm serve")
    parser.add_argument(
        "--rule",
        default="difference",
        help=f"{', '.join(RULES)}; an exit policy with its name, as exit:margin (%(default)s)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help='JSON lines with a "prompt" each',
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="where the rule goes")
    parser.add_argument("--quality", type=_share, default=0.95, metavar="X", help="least expected share (%(default)s)")
    parser.add_argument("--error", type=_share, default=0.1, metavar="X", help="chance to miss it (%(default)s)")
    parser.add_argument(
        "--prompts", type=_count, default=256, metavar="N", help="so many of --data, from its beginning (%(default)s)"
    )
    parser.add_argument("--tokens", type=_count, default=128, metavar="N", help="most tokens an answer (%(default)s)")
    parser.add_argument("--bounds", type=_numbers, metavar="A,B,...", help="to choose among (a grid of the rule's)")
    parser.add_argument("--route", choices=["auto", "cheap"], default="cheap", help="of the requests (%(default)s)")
    parser.add_argument("--easy", type=float, default=0.7, metavar="X", help="auto: as in the plugin (%(default)s)")
    parser.add_argument("--max-model-len", type=_count, metavar="N", help="as in vllm serve")
    parser.add_argument("--kv-cache-memory-bytes", type=_count, metavar="N", help="as in vllm serve")
    parser.add_argument("--dtype", default="auto", help="as in vllm serve (%(default)s)")


def _rule(text: str, bounds: Sequence[float] | None) -> tuple[DeferralRule, Sequence[float]]:
    """The rule and its bounds, safest first. Raises TuneError."""
    grid = bounds or GRIDS.get(text)
    if grid is None:
        raise TuneError(
            f"--rule {text}: has no grid of bounds; give --bounds, and one of {', '.join(RULES)} for the rule"
        )
    try:
        rule = deferral_rule(f"{text}:{grid[0]:g}")
        for bound in grid:
            rule.at(bound)
    except ValueError as error:
        raise TuneError(f"--rule {text}: {error}") from error
    return rule, sorted(set(grid), key=lambda bound: -rule.at(bound).threshold)


def tune(arguments: argparse.Namespace) -> tuple[Calibrated | None, list[Figures], int]:
    """The rule, if there is one; figures of all bounds; the number of prompts.

    Raises ValueError and OSError.
    """
    from vllm import LLM

    rule, bounds = _rule(arguments.rule, arguments.bounds)
    texts = load_prompts(arguments.data, arguments.prompts)
    if len(texts) < enough(arguments.quality, arguments.error):
        raise TuneError(
            f"--data {arguments.data}: has {len(texts)} prompts; to promise {arguments.quality:g} with an error of "
            f"{arguments.error:g} at least {enough(arguments.quality, arguments.error)} are needed"
        )
    own = {"name": "cascade", "rule": str(rule), "route": arguments.route, "easy": arguments.easy, "adapt": False}
    plugin = engine_args(arguments.plugin, own)
    settings = registry.resolve(next(iter(plugin["additional_config"].values())))
    assert isinstance(settings, CascadeSettings) and settings.source is not None
    if getattr(settings.source, "skip", "") == "auto":
        raise TuneError(
            f"--plugin {arguments.plugin}: skip=auto changes while serving; give the blocks that it has found"
        )
    given: dict[str, Any] = {"dtype": arguments.dtype, "enforce_eager": True, "disable_log_stats": False, **plugin}
    for key in ("max_model_len", "kv_cache_memory_bytes"):
        if (value := getattr(arguments, key)) is not None:
            given[key] = value
    llm: Any = LLM(arguments.model, **given)
    model = llm.llm_engine.vllm_config.model_config
    tokenizer = llm.get_tokenizer()
    asked = [tokenizer(text)["input_ids"] for text in texts]
    longest = model.max_model_len - arguments.tokens - 1
    for number, ids in enumerate(asked, start=1):
        if not 0 < len(ids) <= longest:
            raise TuneError(
                f"--data {arguments.data}: prompt {number} has {len(ids)} tokens; with --tokens {arguments.tokens} and a context "
                f"of {model.max_model_len} valid are 1 to {longest}"
            )
    by_bound, figures = measure(llm, asked, arguments.tokens, rule, bounds, arguments.route)
    found = calibrate(by_bound, rule, arguments.quality, arguments.error)
    if found is None:
        return None, figures, len(asked)
    calibrated = Calibrated(
        rule=str(found),
        quality=arguments.quality,
        error=arguments.error,
        prompts=len(asked),
        tokens=arguments.tokens,
        loss=sum(by_bound[found.bound]) / len(asked),
        plugin=registry.stage(settings.source),
        target={
            "hidden_size": model.get_hidden_size(),
            "vocab_size": model.get_vocab_size(),
            "num_layers": model.get_total_num_hidden_layers(),
        },
        route=arguments.route,
        easy=arguments.easy,
    )
    return calibrated, figures, len(asked)


def run(arguments: argparse.Namespace) -> int:
    """Tune and report; returns the exit status."""
    out = report.console()
    try:
        found, figures, count = tune(arguments)
    except (OSError, ValueError) as error:
        out.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    table = Table(title=f"{arguments.rule}, {count} prompts")
    for name in ("bound", "tokens not the full model's", "tokens per step"):
        table.add_column(name, justify="right")
    for each in figures:
        table.add_row(f"{each.bound:g}", f"{each.loss:.4f}", f"{each.tokens_per_step:.2f}")
    out.print(table)
    if found is None:
        out.print(
            f"No bound can be shown to keep a quality of {arguments.quality:g} with an error of {arguments.error:g}: give more "
            f"prompts, a lower quality, safer --bounds or a better cheap stage",
            style="red",
            markup=False,
            soft_wrap=True,
        )
        return 1
    found.save(arguments.output, figures=[vars(each) for each in figures])
    out.print(
        f"vllm serve {arguments.model} --plugin {arguments.plugin} --plugin cascade:file={arguments.output},route={found.route}"
        f"   # {found.rule}, loss {found.loss:.4f}",
        markup=False,
        soft_wrap=True,
    )
    return 0


def main(argv: Sequence[str] | None = None, prog: str = "python -m vllm_spec_plugins.tools.cascade") -> int:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
