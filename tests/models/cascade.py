# SPDX-License-Identifier: Apache-2.0
"""Cascades on the tiny family: cost against quality. The figures of docs/cascade.md.

    python -m tests.models.cascade --workdir DIR      # DIR/cascade.json, DIR/cascade.svg; prints the tables
    python -m tests.models.cascade --workdir DIR --rounds 3    # tokens/s too, on an idle machine
    python -m tests.models.cascade --workdir DIR --rounds 3 --target BIG --rules difference    # of a target made larger

Greedy answers to held-out prompts, one request at a time, from engines whose cheap stage is half of the target's layers, or
the draft model. Beside them what there is without a token-level rule: the cheap stage alone, and switching per request:
the cheap stage answers, and where its mean confidence over the answer is below a bound the full model answers anew.

Cost: passes of the full model per token, and layers run one after the other per token, passes of the cheap stage included; a
layer of the draft model counts as the share of a target's layer that its weights are. Quality: agreement, the share of an
answer's tokens that are the full model's likeliest behind the text before them; and accuracy, of the next token of the
held-out text, read up to there, where the stage that the rule chooses answers.

Tokens/s are an engine's, prompts included: the median of the rounds, in each of which every way takes its turn. Switching per
request costs the cheap stage's time and the full model's for its share.
BIG is the target inflated by tests/models/inflate.py: the same logits, from layers that take their time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.evaluate import prompts
from tests.models.llama import Llama, load_checkpoint, rms_norm
from tests.models.train import HERE
from vllm_spec_plugins.cascade.rules import DeferralRule, deferral_rule, largest

EXIT = 4
LENGTH, TOKENS = 48, 64  # of prompts and answers
STAGES = {f"first {EXIT} layers": f"self-draft:exit_layer={EXIT}", "draft model": f"specinfer:model={HERE / 'draft'}"}
# Bounds, safest first.
SWEEPS: dict[str, Sequence[float]] = {
    "difference": (-1.0, -0.2, -0.05, 0.0, 0.1, 0.3, 1.0),
    "confidence": (2.0, 0.9, 0.7, 0.5, 0.3, 0.0),
    "top": (0.0, 0.4, 0.8, 1.0),
}
SWITCHES = (0.0, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9, 1.01)


@dataclass(frozen=True)
class Point:
    """A way to answer, and what it costs and gives.

    Attributes:
        passes: of the full model per token behind the first.
        layers: run one after the other per token.
        agreement: share of the tokens that are the full model's choice.
        accuracy: of the next token of held-out text.
        speed: tokens per second, if it was measured.
    """

    stage: str
    way: str
    bound: float
    passes: float
    layers: float
    agreement: float
    accuracy: float
    speed: float | None = None

    @property
    def milliseconds(self) -> float:
        """Per token, where the speed was measured."""
        assert self.speed is not None
        return 1000.0 / self.speed


class Cheap:
    """A cheap stage by itself, in torch: its logits [B, L, V] of text [B, L]."""

    def __init__(self, stage: str, target: Llama) -> None:
        self.model = target if stage.startswith("first") else load_checkpoint(HERE / "draft")
        self.exit = EXIT if self.model is target else self.model.shape.layers
        # In layers of the target.
        self.layers = self.exit * _layer_weights(self.model) / _layer_weights(target)

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        stream = self.model.hidden(ids, exits=(self.exit,))[0]
        return F.linear(rms_norm(stream, self.model.norm), self.model.head)

    def answer(self, ids: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Greedy answers [B, tokens] to prompts [B, L], and the largest probabilities on the way."""
        sure, begin = [], ids.shape[1]
        for _ in range(tokens):
            last = self.logits(ids)[:, -1]
            sure.append(largest(last))
            ids = torch.cat((ids, last.argmax(-1, keepdim=True)), 1)
        return ids[:, begin:], torch.stack(sure, 1)


def _layer_weights(model: Llama) -> int:
    """Weights of one decoder layer."""
    return sum(weight.numel() for weight in model.per_layer[0])


@torch.inference_mode()
def agreement(target: Llama, ids: Tensor, given: Tensor) -> Tensor:
    """[B]: the share of answers [B, T] to prompts [B, L] that is the target's likeliest behind what stands before it."""
    logits = target.logits(torch.cat((ids, given), 1))[:, ids.shape[1] - 1 : -1]
    return (logits.argmax(-1) == given).float().mean(1)


@dataclass(frozen=True, eq=False)
class Text:
    """Held-out text under both stages, N places.

    Attributes:
        cheap, full: [N, V] logits behind each place.
        following: [N] int64, the tokens that stand there.
    """

    cheap: Tensor
    full: Tensor
    following: Tensor

    @classmethod
    @torch.inference_mode()
    def read(cls, cheap: Cheap, target: Llama, texts: Iterable[Tensor]) -> Text:
        """Of texts [1, n] each."""
        parts = [(cheap.logits(ids)[0, :-1], target.logits(ids)[0, :-1], ids[0, 1:]) for ids in texts]
        return cls(*(torch.cat(each) for each in zip(*parts, strict=True)))

    def accuracy(self, rule: DeferralRule) -> float:
        """Where the rule keeps the cheap stage answers, else the full model."""
        answer = self.cheap.argmax(-1)
        line = torch.arange(len(answer)).unsqueeze(1)
        score = rule.score(largest(self.cheap).unsqueeze(1), self.full, line, answer.unsqueeze(1)).squeeze(1)
        chosen = answer.where(score >= rule.threshold, self.full.argmax(-1))
        return (chosen == self.following).float().mean().item()


# Engines live as long as the process: shutting one down tears down what all of them share.
ENGINES: list[Any] = []


def engine(model: Path, *plugins: str) -> Any:
    from vllm import LLM

    import vllm_spec_plugins

    ENGINES.append(
        LLM(
            str(model), dtype="float32", enforce_eager=True, max_model_len=384, max_num_seqs=4,
            kv_cache_memory_bytes=1 << 28, **vllm_spec_plugins.engine_args(*plugins),
        )
    )  # fmt: skip
    return ENGINES[-1]


@dataclass(frozen=True, eq=False)
class Run:
    """Greedy answers to prompts [B, L], one after the other, by an engine with one bound of its rule, if it has one."""

    llm: Any
    ids: Tensor
    bound: float | None = None

    def answers(self) -> Tensor:
        """[B, TOKENS] int64."""
        from vllm import SamplingParams

        extra = None if self.bound is None else {"cascade": {"threshold": self.bound}}
        params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, extra_args=extra)
        given = []
        for prompt in self.ids.tolist():
            (result,) = self.llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
            given.append(list(result.outputs[0].token_ids))
        return torch.tensor(given)

    def speed(self) -> float:
        """Tokens per second; one prompt goes before to warm up."""
        replace(self, ids=self.ids[:1]).answers()
        begin = time.perf_counter()
        return self.answers().numel() / (time.perf_counter() - begin)


def stages_alone(name: str, model: Path, ids: Tensor) -> dict[str, Run]:
    """The cheap stage and the full model, each in an engine without a token-level rule."""
    if name == "draft model":
        cheap = engine(HERE / "draft", "none")
    else:  # behind the prompt every token runs so many layers
        cheap = engine(model, f"skipdecode:max_layers={EXIT},min_layers={EXIT},max_tokens={TOKENS}")
    return {"always cheap": Run(cheap, ids), "always full": Run(engine(model, "none"), ids)}


def plugin(stage: str, depth: int) -> str:
    """Of a cheap stage that writes stretches of at most `depth` tokens, trees where it is not sure to keep."""
    return f"{STAGES[stage]},nodes={depth + 4},depth={depth},ranks=2,adapt=false"


def cascades(
    name: str, depth: int, cheap: Cheap, target: Llama, ids: Tensor, text: Text, model: Path, rules: Sequence[str]
) -> dict[Point, Run]:
    """Every rule under every bound, from one engine per rule."""
    found = {}
    for kind, bounds in ((kind, SWEEPS[kind]) for kind in rules):
        rule = deferral_rule(f"{kind}:{bounds[0]}")
        llm: Any = engine(model, plugin(name, depth), f"cascade:rule={rule},route=cheap")
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        drafts = _count_passes(llm)
        for bound in bounds:
            run, before, drafts.passes = Run(llm, ids, bound), scheduler.current_step, 0
            given = run.answers()
            # The prompt's pass gives the first token: what follows it is what the cascade is for.
            behind = len(ids) * (TOKENS - 1)
            passes = scheduler.current_step - before - len(ids)
            point = Point(
                name,
                kind,
                bound,
                passes / behind,
                (passes * target.shape.layers + drafts.passes * cheap.layers) / behind,
                agreement(target, ids, given).mean().item(),
                text.accuracy(rule.at(bound)),
            )
            print(point, flush=True)
            found[point] = run
    return found


def with_speed(points: Sequence[Point], alone: dict[str, Run], rules: dict[Point, Run], rounds: int) -> list[Point]:
    """Points of one cheap stage, timed in turn."""
    runs: dict[str | Point, Run] = {**alone, **rules}
    seen: dict[str | Point, list[float]] = {each: [] for each in runs}
    for _ in range(rounds):
        for each, run in runs.items():
            seen[each].append(run.speed())
    median = {each: statistics.median(speeds) for each, speeds in seen.items()}
    cheap, full = median["always cheap"], median["always full"]
    found = []
    for p in points:
        known = median.get(p, median.get(p.way))  # else: switching per request
        found.append(replace(p, speed=1.0 / (1.0 / cheap + p.passes / full) if known is None else known))
    return found


class _Passes:
    """Passes of a cheap stage in an engine."""

    passes = 0


def _count_passes(llm: Any) -> _Passes:
    """Counts those over the tokens of trees; a draft model reads known tokens in passes of its own, which count too."""
    counted = _Passes()
    (drafter,) = llm.llm_engine.model_executor.driver_worker.worker.model_runner.speculator.drafters
    run = drafter._run

    def counting(*given: Any) -> Tensor:
        counted.passes += 1
        return run(*given)

    drafter._run = counting
    return counted


def alternatives(name: str, cheap: Cheap, target: Llama, ids: Tensor, text: Text) -> list[Point]:
    """The cheap stage alone, the full model alone, and switching between them per request."""
    given, sure = cheap.answer(ids, TOKENS)
    agreed, mean = agreement(target, ids, given), sure.mean(1)
    right = [(each.argmax(-1) == text.following).float().mean().item() for each in (text.cheap, text.full)]
    points = [
        Point(name, "always cheap", 0.0, 0.0, cheap.layers, agreed.mean().item(), right[0]),
        Point(name, "always full", 0.0, 1.0, float(target.shape.layers), 1.0, right[1]),
    ]
    for bound in SWITCHES:
        kept = (mean >= bound).float()
        share = 1 - kept.mean().item()
        points.append(
            Point(
                name,
                "request switching",
                bound,
                share,
                cheap.layers + share * target.shape.layers,
                (kept * agreed + 1 - kept).mean().item(),
                (1 - share) * right[0] + share * right[1],
            )
        )
    return points


def above(points: Sequence[Point], references: Sequence[Point], cost: str = "layers") -> list[tuple[Point, float]]:
    """Each point and its agreement less that of the best mixture of `references` at no more `cost`."""
    found = []
    for p in points:
        best, own = -math.inf, getattr(p, cost)
        for a in references:
            for b in references:
                low, high = getattr(a, cost), getattr(b, cost)
                if low <= own <= high and low < high:
                    best = max(best, a.agreement + (own - low) / (high - low) * (b.agreement - a.agreement))
            if getattr(a, cost) <= own:
                best = max(best, a.agreement)
        found.append((p, p.agreement - best))
    return found


def table(points: Iterable[Point]) -> str:
    """The figures as Markdown."""
    lines = ["| cheap stage | way | bound | passes | layers | agreement | accuracy | tokens/s |", "|---" * 8 + "|"]
    for p in points:
        figures = f"{p.passes:.3f} | {p.layers:.2f} | {p.agreement:.3f} | {p.accuracy:.3f}"
        lines.append(
            f"| {p.stage} | {p.way} | {p.bound:g} | {figures} | {'' if p.speed is None else f'{p.speed:.1f}'} |"
        )
    return "\n".join(lines)


def plot(points: Sequence[Point], file: Path) -> None:
    """Agreement and accuracy against layers per token, and agreement against passes, a row per cheap stage. Needs matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("the plot needs matplotlib: pip install 'vllm-spec-plugins[bench]'") from error
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "cascade", "font.size": 10})
    from matplotlib import pyplot

    axes_of = [("layers", "agreement"), ("passes", "agreement"), ("layers", "accuracy")]
    if all(p.speed is not None for p in points):
        axes_of.append(("milliseconds", "agreement"))
    names = {
        "layers": "layers one after the other per token",
        "passes": "passes of the full model per token",
        "agreement": "tokens that are the full model's choice",
        "accuracy": "next token of held-out text right",
        "milliseconds": "milliseconds per token",
    }
    stages = list(dict.fromkeys(p.stage for p in points))
    size = (14 / 3 * len(axes_of), 4 * len(stages))
    figure, grid = pyplot.subplots(len(stages), len(axes_of), figsize=size, layout="constrained", squeeze=False)
    for row, stage in zip(grid, stages, strict=True):
        for axes, (x, y) in zip(row, axes_of, strict=True):
            for way, colour, shape in zip(SWEEPS, ("tab:blue", "tab:orange", "tab:green"), "o^D", strict=True):
                own = [p for p in points if (p.stage, p.way) == (stage, way)]
                if not own:
                    continue
                xs, ys = [getattr(p, x) for p in own], [getattr(p, y) for p in own]
                axes.plot(xs, ys, color=colour, marker=shape, markersize=4, linewidth=1.3, label=f"cascade, {way}")
            own = [p for p in points if (p.stage, p.way) == (stage, "request switching")]
            xs, ys = [getattr(p, x) for p in own], [getattr(p, y) for p in own]
            axes.plot(
                xs, ys, color="grey", marker="x", markersize=5, linestyle="--", linewidth=1, label="request switching"
            )
            for way, shape in (("always cheap", "s"), ("always full", "*")):
                (spot,) = (p for p in points if (p.stage, p.way) == (stage, way))
                axes.scatter(getattr(spot, x), getattr(spot, y), marker=shape, s=60, color="black", label=way, zorder=3)
            axes.set(xlabel=names[x], ylabel=names[y], title=f"cheap stage: {stage}")
            axes.grid(alpha=0.3)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workdir", type=Path, required=True, help="where the figures and the plot go")
    parser.add_argument("--prompts", type=int, default=16, help="that are answered")
    parser.add_argument("--texts", type=int, default=128, help="held-out texts that accuracy is of")
    parser.add_argument(
        "--target", type=Path, default=HERE / "target", help="that engines serve: the target, or it inflated"
    )
    parser.add_argument("--rules", nargs="+", choices=list(SWEEPS), default=list(SWEEPS), help="whose bounds are tried")
    parser.add_argument("--depth", type=int, default=12, help="of a stretch, at most")
    parser.add_argument("--rounds", type=int, default=0, help="measure tokens/s so many times: leave the machine alone")
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # steps and passes are counted in this process
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    args.workdir.mkdir(parents=True, exist_ok=True)
    target = load_checkpoint(HERE / "target")
    texts = list(prompts(1 << 30))
    ids = torch.stack([text[0, :LENGTH] for text in texts if text.shape[1] >= LENGTH][: args.prompts])
    points: list[Point] = []
    for name in STAGES:
        cheap = Cheap(name, target)
        text = Text.read(cheap, target, texts[: args.texts])
        references = alternatives(name, cheap, target, ids, text)
        rules = cascades(name, args.depth, cheap, target, ids, text, args.target, args.rules)
        own = [*references, *rules]
        if args.rounds:
            own = with_speed(own, stages_alone(name, args.target, ids), rules, args.rounds)
        points += own
    figures = {
        "prompts": len(ids),
        "prompt_tokens": LENGTH,
        "answer_tokens": TOKENS,
        "texts": min(args.texts, len(texts)),
        "stages": {name: plugin(name, args.depth).replace(f"{HERE}/", "") for name in STAGES},
        "points": [asdict(p) for p in points],
    }
    (args.workdir / "cascade.json").write_text(json.dumps(figures, indent=1) + "\n")
    plot(points, args.workdir / "cascade.svg")
    print(table(points))
    for name in STAGES:
        own = [p for p in points if p.stage == name]
        without = [p for p in own if p.way not in SWEEPS]
        for cost in ("layers", "milliseconds") if args.rounds else ("layers",):
            for p, lead in above([p for p in own if p.way in SWEEPS], without, cost):
                print(f"{name}, {p.way}:{p.bound:g}: {lead:+.3f} above the others at as many {cost}")


if __name__ == "__main__":
    main()
