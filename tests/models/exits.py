# SPDX-License-Identifier: Apache-2.0
"""Early-exit policies on the tiny target: what they accept against the layers that they run. The figures of docs/exits.md.

    python -m tests.models.exits --workdir DIR      # DIR/exits.json, DIR/exits.svg, a gate and a table; prints the tables

At every token of the held-out prompts the target answers after 2, 4, 6 and all 8 layers, with the K/V of all layers behind
it. A token leaves at the first exit whose answer the policy calls good, else it runs all layers. Prompts of every other
held-out file make the gate and the tables; the figures are of the rest.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.models.corpus import PROMPTS
from tests.models.llama import Llama, load_checkpoint, rms_norm
from tests.models.train import EXITS, HERE
from vllm_spec_plugins.layers.calibration import boldest, hoeffding, hoeffding_bentkus
from vllm_spec_plugins.layers.exits import ExitPolicy, ExitSignals, policy
from vllm_spec_plugins.layers.recorded_exits import Gate, Hash

DEPTH = 8  # tokens of a draft, at most

# Bounds of each policy, safest first.
CHANCES = (0.98, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.3)
SWEEPS: dict[str, Sequence[float]] = {
    "entropy": (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0),
    "normalised-entropy": (0.01, 0.03, 0.06, 0.09, 0.12, 0.15, 0.18, 0.21, 0.24, 0.3, 0.36, 0.42, 0.48, 0.54, 0.6),
    "confidence": (*CHANCES, 0.2, 0.15, 0.1),
    "margin": (*CHANCES, 0.2, 0.1, 0.05, 0.02),
    "patience": (3, 2),
    "saturation": (0.97, 0.96, 0.95, 0.94, 0.93, 0.92, 0.91, 0.9, 0.88, 0.86, 0.84),
    "gate": CHANCES,
    "hash by agreement": CHANCES,
    "hash by frequency": (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3),  # of the text, at each exit
}


def split() -> tuple[list[Tensor], list[Tensor]]:
    """Committed prompts [n] int64: those of every other file for training, those of the other files to measure on."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(HERE / "target")
    lines = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    training = set(sorted({line["file"] for line in lines})[::2])
    parts: tuple[list[Tensor], list[Tensor]] = [], []
    for line in lines:
        parts[line["file"] not in training].append(torch.tensor(tokenizer(line["prompt"])["input_ids"]))
    return parts


@dataclass(eq=False)
class Recording:
    """N tokens of P prompts, E exits.

    Attributes:
        tokens: [N] int64, that went in.
        lengths: tokens of each prompt.
        answers: [N, E + 1] int64, the likeliest token at each exit and of the full model.
        scores: per policy [N, E] float32.
        hidden: [N, E, H]; empty unless it was asked for.
        vocab, layers: V and L of the model.
    """

    tokens: Tensor
    lengths: list[int]
    answers: Tensor
    scores: dict[str, Tensor]
    hidden: Tensor
    vocab: int
    layers: int

    @property
    def agreed(self) -> Tensor:
        """[N, E] bool: the answer at the exit is the full model's."""
        return self.answers[:, :-1] == self.answers[:, -1:]


@torch.inference_mode()
def record(
    target: Llama, prompts: Iterable[Tensor], policies: Mapping[str, ExitPolicy], keep_hidden: bool = False
) -> Recording:
    """Run the target over prompts [n] and score all exits at every token."""
    tokens, answers, hidden = [], [], []
    scores: dict[str, list[Tensor]] = {name: [] for name in policies}
    for ids in prompts:
        states = [state[0] for state in target.hidden(ids[None], EXITS)]
        logits = [F.linear(rms_norm(state, target.norm), target.head) for state in states]
        answer = torch.stack([each.argmax(-1) for each in logits], 1)
        exits = [
            ExitSignals(layer, ids, logits[e], states[e], answer[:, :e], states[e - 1] if e else None)
            for e, layer in enumerate(EXITS)
        ]
        for name, each in policies.items():
            scores[name].append(torch.stack([each.score(signals) for signals in exits], 1))
        tokens.append(ids)
        answers.append(answer)
        hidden.append(torch.stack(states[:-1], 1) if keep_hidden else torch.empty(0))
    return Recording(
        torch.cat(tokens),
        [len(ids) for ids in tokens],
        torch.cat(answers),
        {name: torch.cat(each) for name, each in scores.items()},
        torch.cat(hidden),
        target.shape.vocab,
        target.shape.layers,
    )


def made_from(recorded: Recording) -> dict[str, list[ExitPolicy]]:
    """The policies of every sweep, safest first; gate and tables from `recorded`, which needs its hidden states."""
    size = recorded.vocab, recorded.layers
    gate = Gate.train({layer: (recorded.hidden[:, e], recorded.agreed[:, e]) for e, layer in enumerate(EXITS)}, 0.5)
    made: dict[str, list[ExitPolicy]] = {}
    for name, bounds in SWEEPS.items():
        if name == "gate":
            made[name] = [replace(gate, bound=bound) for bound in bounds]
        elif name == "hash by agreement":
            tables = (Hash.by_agreement(recorded.tokens, recorded.agreed, EXITS, least, *size) for least in bounds)
            made[name] = list(tables)
        elif name == "hash by frequency":
            made[name] = [Hash.by_frequency(recorded.tokens, EXITS, (each,) * len(EXITS), *size) for each in bounds]
        else:
            made[name] = [policy(f"{name}:{bound}") for bound in bounds]
    return made


def exits_taken(good: Tensor) -> Tensor:
    """[N] int64: the first exit that is good [N, E], E where none is."""
    return torch.cat((good, torch.ones(len(good), 1, dtype=torch.bool)), 1).int().argmax(1)


@dataclass(frozen=True)
class Point:
    """What a policy does under one bound.

    Attributes:
        layers: run per token, on average.
        early: share of tokens that left early.
        acceptance: share of early answers that are the full model's; None without any.
        agreement: the same of all answers, those of the full model included.
        draft_layers: of a draft that answers at the first exit that the policy can judge, at most DEPTH tokens, up to the
            first answer that is not good.
        tokens_per_step: the draft's tokens up to the first wrong one, and the target's own; along the text of the prompts.
        layers_per_token: layers one after the other for each of them: the draft's and one pass of the full model.
    """

    policy: str
    bound: float
    layers: float
    early: float
    acceptance: float | None
    agreement: float
    draft_layers: int
    tokens_per_step: float
    layers_per_token: float


def measure(recorded: Recording, good: Tensor, name: str, bound: float, exits_needed: int = 1) -> Point:
    """The figures of a policy from where it is `good` [N, E]."""
    taken = exits_taken(good)
    depth = torch.tensor([*EXITS, recorded.layers])[taken]
    early = taken < len(EXITS)
    right = recorded.answers.gather(1, taken.unsqueeze(1)).squeeze(1) == recorded.answers[:, -1]
    exit_ = max(exits_needed, 1) - 1
    tokens, drafted = draft(good[:, exit_], recorded.agreed[:, exit_], recorded.lengths, known=exits_needed == 0)
    return Point(
        name,
        bound,
        depth.float().mean().item(),
        early.float().mean().item(),
        right[early].float().mean().item() if early.any() else None,
        right.float().mean().item(),
        EXITS[exit_],
        tokens,
        (drafted * EXITS[exit_] + recorded.layers) / tokens,
    )


def draft(good: Tensor, right: Tensor, lengths: list[int], known: bool) -> tuple[float, float]:
    """Tokens emitted and tokens run by the draft, per step of the target; the mean over all places with DEPTH tokens from there.

    Args:
        good, right: [N] bool, of the draft's answer at each token of prompts of `lengths`.
        known: a token that is not good is known before it is run, so it is not.
    """
    emitted, drafted, places = 0, 0, 0
    for on, accepted in zip(good.split(lengths), (good & right).split(lengths), strict=True):
        emitted += int(accepted.unfold(0, DEPTH, 1).int().cumprod(1).sum())
        going = on.unfold(0, DEPTH, 1).int().cumprod(1)
        drafted += int(going.sum() if known else going[:, :-1].sum() + len(going))
        places += len(going)
    return 1 + emitted / places, drafted / places


def losses(recorded: Recording, goods: Iterable[Tensor]) -> np.ndarray:
    """[P, T]: the share of each prompt's answers that are not the full model's, for each of T choices of good exits [N, E]."""
    columns = []
    for good in goods:
        answer = recorded.answers.gather(1, exits_taken(good).unsqueeze(1)).squeeze(1)
        wrong = (answer != recorded.answers[:, -1]).double()
        columns.append([part.mean().item() for part in wrong.split(recorded.lengths)])
    return np.array(columns).T


def references(recorded: Recording) -> list[Point]:
    """Every token at one exit, and a policy that knows what the full model will say."""
    fixed = []
    for e, layer in enumerate(EXITS):
        good = torch.zeros_like(recorded.agreed)
        good[:, e] = True
        fixed.append(measure(recorded, good, "always this exit", layer, exits_needed=e + 1))
    return [*fixed, measure(recorded, recorded.agreed, "oracle", 0.0, exits_needed=0)]


def calibrated(name: str, points: Sequence[Point], loss: np.ndarray, tolerance: float, error: float, seed: int) -> str:
    """A line of Markdown: the bounds that half of the prompts allow, and what they cost on the other half."""
    order = np.random.default_rng(seed).permutation(len(loss))
    ours, others = np.split(order, [len(order) // 2])
    cells = []
    for p_value in (hoeffding, hoeffding_bentkus):
        column = boldest(loss[ours], tolerance, error, p_value)
        if column is None:
            cells += ["none", ""]
        else:
            cells += [f"{points[column].bound:g}", f"{loss[others, column].mean():.3f}"]
    return f"| {name} | {' | '.join(cells)} |"


def table(points: Iterable[Point]) -> str:
    """The figures as Markdown."""
    names = "layers", "early", "acceptance", "agreement", "draft's layers", "tokens per step", "layers per token"
    lines = [f"| policy | bound | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for p in points:
        acceptance = "" if p.acceptance is None else f"{p.acceptance:.3f}"
        shares = f"{p.layers:.2f} | {p.early:.3f} | {acceptance} | {p.agreement:.3f}"
        rest = f"{p.draft_layers} | {p.tokens_per_step:.2f} | {p.layers_per_token:.2f}"
        lines.append(f"| {p.policy} | {p.bound:g} | {shares} | {rest} |")
    return "\n".join(lines)


def plot(points: Sequence[Point], marks: Sequence[Point], layers: int, file: Path) -> None:
    """One figure: acceptance against layers run, and a draft's tokens per step against layers per token. Needs matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("the plot needs matplotlib: pip install 'vllm-spec-plugins[bench]'") from error
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "exits", "font.size": 10})
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5), layout="constrained")
    names = [
        name for name in dict.fromkeys(p.policy for p in points) if name != "normalised-entropy"
    ]  # entropy's curve
    for name, colour, shape in zip(names, pyplot.get_cmap("tab10").colors, "os^DvPX<", strict=False):
        own = [p for p in points if p.policy == name and p.early >= 0.01]  # fewer are noise
        style: dict[str, Any] = {"color": colour, "marker": shape, "markersize": 4, "linewidth": 1.3, "label": name}
        left.plot([p.layers for p in own], [p.acceptance for p in own], **style)
        right.plot([p.layers_per_token for p in own], [p.tokens_per_step for p in own], **style)
    *fixed, oracle = marks
    for axes, x, y in ((left, "layers", "acceptance"), (right, "layers_per_token", "tokens_per_step")):
        for own, shape, size in ((fixed, "s", 45), ([oracle], "*", 130)):
            spots = [getattr(p, x) for p in own], [getattr(p, y) for p in own]
            axes.scatter(*spots, marker=shape, s=size, color="black", label=own[0].policy, zorder=3)
        for p in fixed:
            axes.annotate(f"{p.bound:g}", (getattr(p, x), getattr(p, y)), (6, -3), textcoords="offset points")
        axes.grid(alpha=0.3)
    right.axvline(layers, color="grey", linestyle=":", linewidth=1)
    right.text(layers, 3.6, "without a draft", color="grey", rotation=90, horizontalalignment="right")
    left.set(
        xlabel=f"layers run per token, of {layers}",
        ylabel="share of early answers equal to the full model's",
        title="Acceptance against layers run",
    )
    right.set(
        xlabel="layers one after the other per emitted token",
        ylabel="tokens per step of the full model",
        title=f"Drafts of at most {DEPTH} tokens, while answers are good",
    )
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workdir", type=Path, required=True, help="where the figures, the plot, gate and table go")
    parser.add_argument("--tolerance", type=float, default=0.15, help="calibration: wrong answers, of all")
    parser.add_argument("--error", type=float, default=0.05, help="calibration: chance of a bound that is too bold")
    parser.add_argument("--seed", type=int, default=1, help="calibration: of the halves")
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    target = load_checkpoint(HERE / "target")
    training, measured = split()
    sweeps = made_from(record(target, training, {}, keep_hidden=True))
    every = {f"{name}/{i}": each for name, sweep in sweeps.items() for i, each in enumerate(sweep)}
    # One score serves all bounds of a policy, but each table is a policy of its own.
    asked = {key: each for key, each in every.items() if isinstance(each, Hash) or key.endswith("/0")}
    recorded = record(target, measured, asked)
    points: dict[str, list[Point]] = {}
    lines = []
    for name, sweep in sweeps.items():
        keys = [f"{name}/{i}" if isinstance(each, Hash) else f"{name}/0" for i, each in enumerate(sweep)]
        goods = [recorded.scores[key] >= each.threshold for key, each in zip(keys, sweep, strict=True)]
        points[name] = [
            measure(recorded, good, name, bound, each.exits_needed)
            for good, bound, each in zip(goods, SWEEPS[name], sweep, strict=True)
        ]
        lines.append(calibrated(name, points[name], losses(recorded, goods), args.tolerance, args.error, args.seed))
    marks = references(recorded)
    every_point = [p for sweep in points.values() for p in sweep]
    report = {
        "training": {"prompts": len(training), "tokens": sum(map(len, training))},
        "measured": {"prompts": len(measured), "tokens": len(recorded.tokens)},
        "points": [asdict(p) for p in (*every_point, *marks)],
    }
    (args.workdir / "exits.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(every_point, marks, recorded.layers, args.workdir / "exits.svg")
    for name, sweep in (("gate", sweeps["gate"]), ("hash", sweeps["hash by agreement"])):
        chosen = sweep[SWEEPS["hash by agreement"].index(0.8)]
        assert isinstance(chosen, Gate | Hash)
        chosen.save(args.workdir / f"{name}.safetensors")
    print(f"made from {report['training']}, measured on {report['measured']}\n\n{table([*every_point, *marks])}\n")
    print("| policy | bound (Hoeffding) | wrong | bound (Hoeffding-Bentkus) | wrong |", "|---" * 5 + "|", sep="\n")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
