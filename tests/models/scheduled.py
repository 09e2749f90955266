# SPDX-License-Identifier: Apache-2.0
"""Loss under SkipDecode schedules: the target as it is, and fine-tuned for each.

    python -m tests.models.scheduled --workdir DIR --tuned FOLDER FOLDER ... --json FILE

Held-out files of the corpus, windows of which the first tokens are the prompt; the loss is of the answers' tokens, in nats
per token. Each FOLDER is what ``vllm-spec train skipdecode`` wrote: the schedule is the one in its skipdecode.json.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.models.corpus import load_stream
from tests.models.train import HERE
from vllm_spec_plugins.layers.schedule import Schedule
from vllm_spec_plugins.tools import report
from vllm_spec_plugins.tools.train import data
from vllm_spec_plugins.tools.train.run import Checkpoint
from vllm_spec_plugins.tools.train.skipdecode import SCHEDULE, ScheduledModel, mean_loss

BATCH = 8


def load(folder: Path) -> ScheduledModel:
    return ScheduledModel(Checkpoint(str(folder), torch.device("cpu"), torch.float32, False), str(folder))


def compare(target: Path, tuned: list[Path], windows: torch.Tensor, prompt: int) -> dict[str, Any]:
    """The target's loss with all layers, and for each tuned checkpoint those of both models under its schedule."""
    base = load(target)
    rows = []
    for folder in tuned:
        schedule, model = Schedule(**json.loads((folder / SCHEDULE).read_text())), load(folder)
        rows.append(
            {
                "checkpoint": folder.name,
                "schedule": asdict(schedule),
                "average_layers": schedule.average,
                "untuned": mean_loss(base, windows, schedule, prompt, BATCH),
                "tuned": mean_loss(model, windows, schedule, prompt, BATCH),
                "tuned_all_layers": mean_loss(model, windows, None, prompt, BATCH),
            }
        )
    return {"all_layers": mean_loss(base, windows, None, prompt, BATCH), "rows": rows}


def table(figures: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| checkpoint | layers, first to last | on average | untuned | fine-tuned | fine-tuned, all layers |",
        "|---|---|---|---|---|---|",
    ]
    for row in figures["rows"]:
        plan = row["schedule"]
        losses = " | ".join(f"{row[key]:.3f}" for key in ("untuned", "tuned", "tuned_all_layers"))
        budgets = f"{plan['max_layers']} to {plan['min_layers']} of {plan['num_layers']}"
        lines.append(f"| {row['checkpoint']} | {budgets} | {row['average_layers']:.2f} | {losses} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workdir", type=Path, required=True, help="where corpus.py put its output")
    parser.add_argument("--tuned", type=Path, nargs="+", required=True, metavar="FOLDER")
    parser.add_argument("--target", type=Path, default=HERE / "target")
    parser.add_argument("--seq", type=int, default=256, help="tokens per window")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the window's prompt")
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    stream = torch.from_numpy(load_stream(args.workdir, "heldout").astype(np.int64))
    windows = data.spread(stream, args.seq, args.windows)
    figures = compare(args.target, args.tuned, windows, args.prompt)
    print(f"all layers, as it is: {figures['all_layers']:.3f}\n\n{table(figures)}")
    if args.json:
        asked = {"windows": len(windows), "length": args.seq, "prompt": args.prompt}
        report.write_json(args.json, {"text": asked, **figures})


if __name__ == "__main__":
    main()
