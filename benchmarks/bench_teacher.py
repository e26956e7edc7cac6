"""How soon does the demo's policy add, from its reward, from a teacher, and from both?

    python -m benchmarks.bench_teacher [--teacher RUN_OR_MODEL] [--seeds 0 1 2] [--steps 40]

The teacher is the demo itself after its 100 steps, trained first where none is named. Prints a JSON line a run and then
a Markdown table: held-out sums answered rightly, greedily, at the end, and after how many steps 95 % of them were (all
are asked every second step). All but the row's keys is as `demo.toml` has it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import troupe
from troupe.cli.demo import DEMO_CONFIG
from troupe.records.evaluations import read_evaluations

GOAL, EVERY = 0.95, 2
ROWS: dict[str, dict[str, Any]] = {
    "reward alone": {"path": None},
    "teacher alone": {"reward_coef": 0.0},
    "reward and teacher": {"coef": 0.3},
}
"""The keys of `[teacher]` that each row of the table sets."""


def train_teacher(folder: Path) -> str:
    """The demo, to its end."""
    settings = {"output": str(folder / "teacher"), "metrics": {"sinks": ["jsonl"]}}
    return str(Path(troupe.train(troupe.load_config(DEMO_CONFIG, [settings])).folder) / "final")


def run(name: str, teacher: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """One training run."""
    settings = {
        "seed": seed,
        "output": str(folder / f"{name} {seed}"),
        "learner": {"max_steps": steps},
        "teacher": {"path": teacher, **ROWS[name]},
        "evaluation": {"every": EVERY},
        "metrics": {"sinks": ["jsonl"]},
    }
    result = troupe.train(troupe.load_config(DEMO_CONFIG, [settings]))
    right = {
        each.version: value
        for each in read_evaluations(Path(result.folder))
        if (value := each.metrics.get("eval/held_out/accuracy")) is not None
    }
    return {
        "of": name,
        "seed": seed,
        "before": result.accuracy_before,
        "accuracy": result.accuracy_after,
        "steps_to_goal": next((step for step, value in sorted(right.items()) if value >= GOAL), None),
        "seconds": round(result.wall_s, 1),
    }


def row(runs: Sequence[dict[str, Any]]) -> str:
    """The runs of one kind as a line of the table."""
    accuracies, reached = [one["accuracy"] for one in runs], [one["steps_to_goal"] for one in runs]
    mean = f"{statistics.fmean(reached):.0f}" if None not in reached else "–"
    each = ", ".join("–" if steps is None else str(steps) for steps in reached)
    spread = f"{min(accuracies):.1%} to {max(accuracies):.1%}"
    return f"| {runs[0]['of']} | {statistics.fmean(accuracies):.1%} | {spread} | {mean} ({each}) |"


def main() -> None:
    """Train by all of them, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="a run's folder or a model's; left out, the demo is trained for it")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    table = ["| learned from | right, held out | over the seeds | steps to 95 % |", "|---|---:|---:|---:|"]
    with tempfile.TemporaryDirectory(prefix="troupe-teacher-") as folder:
        teacher = options.teacher or train_teacher(Path(folder))
        for name in ROWS:
            runs = []
            for seed in options.seeds:
                runs.append(run(name, teacher, seed, options.steps, Path(folder)))
                print(json.dumps(runs[-1]), flush=True)
            table.append(row(runs))
    print("\n".join(table), flush=True)


if __name__ == "__main__":
    main()
