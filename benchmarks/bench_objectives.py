"""What does the demo learn by each objective and each advantage, and how soon?

    python -m benchmarks.bench_objectives [--only dapo rloo] [--seeds 0 1 2] [--steps 60] [--iterations 1]

Trains the demo that ships (sums, with one reward: right or wrong) once for every objective and seed, and prints a JSON
line a run and then a Markdown table, means over the seeds: the share of right answers to held-out sums, greedy; after
how many steps nine of ten sampled answers were right (mean of five steps); seconds a run. All but what the objective's
row names is as `demo.toml` has it. With `--iterations` above 1 each batch is learned from several times, so that ratios
are not 1 and clipping acts.
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

WINDOW, GOAL = 5, 0.9
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dapo": {},
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
    "gmpo": {"loss_type": "gmpo", "epsilon": 0.4},
    "rloo": {"loss_type": "rloo", "advantage": "rloo"},
    "dppo": {"loss_type": "dppo"},
    "m2po": {"loss_type": "m2po"},
    "clip_cov": {"loss_type": "clip_cov"},
    "kl_cov": {"loss_type": "kl_cov"},
    "dapo, advantage rloo": {"advantage": "rloo"},
    "dapo, advantage maxrl": {"advantage": "maxrl"},
    "dapo, advantage grpo_passk": {"advantage": "grpo_passk"},
    "dapo, GDPO": {"multi_objective_aggregation": "normalize_then_sum"},
}
"""The keys of `[learner]` that each row of the table sets."""


def steps_to_goal(rewards: Sequence[float], goal: float = GOAL) -> int | None:
    """The first step at whose end the mean of `WINDOW` steps reaches a goal; None where none does."""
    ends = range(WINDOW, len(rewards) + 1)
    return next((end for end in ends if statistics.fmean(rewards[end - WINDOW : end]) >= goal), None)


def run(name: str, seed: int, steps: int, iterations: int) -> dict[str, Any]:
    """One training run, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="troupe-objectives-") as folder:
        learner = {"max_steps": steps, "num_iterations": iterations, **OBJECTIVES[name]}
        settings = {"learner": learner, "seed": seed, "output": str(Path(folder) / "run")}
        result = troupe.train(troupe.load_config(DEMO_CONFIG, [settings, {"metrics": {"sinks": ["jsonl"]}}]))
        lines = (Path(result.folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rewards = [json.loads(line)["reward"] for line in lines]
    return {
        "objective": name,
        "seed": seed,
        "before": result.accuracy_before,
        "accuracy": result.accuracy_after,
        "steps_to_goal": steps_to_goal(rewards),
        "seconds": round(result.wall_s, 1),
    }


def row(runs: Sequence[dict[str, Any]]) -> str:
    """The runs of one objective as a line of the table."""
    accuracies = [one["accuracy"] for one in runs]
    reached = [one["steps_to_goal"] for one in runs]
    mean = f"{statistics.fmean(reached):.0f}" if None not in reached else "–"
    each = ", ".join("–" if steps is None else str(steps) for steps in reached)
    seconds = statistics.fmean(one["seconds"] for one in runs)
    spread = f"{min(accuracies):.1%} to {max(accuracies):.1%}"
    cells = (runs[0]["objective"], f"{statistics.fmean(accuracies):.1%}", spread, f"{mean} ({each})", f"{seconds:.0f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Train by all of them, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(OBJECTIVES), default=list(OBJECTIVES), metavar="OBJECTIVE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--iterations", type=int, default=1)
    options = parser.parse_args()
    table = ["| objective | right, held out | over the seeds | steps to 90 % | s |", "|---|---:|---:|---:|---:|"]
    for name in options.only:
        runs = []
        for seed in options.seeds:
            runs.append(run(name, seed, options.steps, options.iterations))
            print(json.dumps(runs[-1]), flush=True)
        table.append(row(runs))
    print("\n".join(table), flush=True)


if __name__ == "__main__":
    main()
