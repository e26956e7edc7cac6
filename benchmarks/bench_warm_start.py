"""Does a warm start help where a policy hardly ever says anything right?

    python -m benchmarks.bench_warm_start [--noise 1.2] [--warm 40] [--steps 240] [--goal 0.5] [--seeds 0 1 2]

Spoils the policy of the demo by noise on all its matrices (`--noise`: of which standard deviation, beside that of each
matrix), then trains it on the demo's sums: by GRPO alone, and by `--warm` supervised steps of 16 rows with GRPO behind
them, `--steps` in all. Prints a JSON line a run and a Markdown table, means over the seeds: which part of the groups
had no signal in the first ten steps that were sampled; after how many steps, supervised ones included, `--goal` of the
sampled answers were right (mean of five steps); the share of right answers to held-out sums, greedy, before and after.
Counts steps, not seconds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import troupe  # first: it has OpenBLAS loaded

import mlx.core as mx  # isort: skip
from benchmarks.bench_objectives import steps_to_goal
from troupe.cli.demo import DEMO_CONFIG
from troupe.policy import load_policy

DEMO = DEMO_CONFIG.parent
WAYS = ("GRPO alone", "warm start, then GRPO")


def spoil(folder: Path, noise: float, seed: int) -> Path:
    """The demo's policy with noise on its matrices, in a folder of its own."""
    shutil.copytree(DEMO / "policy", folder)
    policy = load_policy(DEMO / "policy")
    keys = mx.random.split(mx.random.key(seed), len(policy.weights))
    spoiled = {
        name: weight + noise * mx.random.normal(weight.shape, key=keys[place]) * mx.std(weight)
        if weight.ndim == 2
        else weight
        for place, (name, weight) in enumerate(sorted(policy.weights.items()))
    }
    mx.save_safetensors(str(folder / "model.safetensors"), spoiled, metadata={"format": "pt"})
    return folder


def run(way: str, seed: int, *, noise: float, warm: int, steps: int, goal: float) -> dict[str, Any]:
    """One training run, in a folder that is gone afterwards."""
    is_warm = way != WAYS[0]
    with tempfile.TemporaryDirectory(prefix="troupe-warm-") as name:
        folder = Path(name)
        settings: dict[str, Any] = {
            "seed": seed,
            "output": str(folder / "run"),
            "model": {"path": str(spoil(folder / "policy", noise, seed))},
            "learner": {"max_steps": steps - (warm if is_warm else 0)},
            "metrics": {"sinks": ["jsonl"]},
        }
        if is_warm:
            sums = json.loads((DEMO / "arithmetic.json").read_text(encoding="utf-8"))[-16 * warm :]
            rows = folder / "rows.jsonl"
            lines = [json.dumps({"prompt": row["prompt"], "completion": row["answer"]}) for row in sums]
            rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
            settings["warm_start"] = {"path": str(rows), "steps": warm, "lr": 1e-3}
        result = troupe.train(troupe.load_config(DEMO_CONFIG, [settings]))
        told = [json.loads(line) for line in (Path(result.folder) / "metrics.jsonl").read_text().splitlines()]
    sampled = [line for line in told if "reward" in line]
    reached = steps_to_goal([line["reward"] for line in sampled], goal)
    return {
        "way": way,
        "seed": seed,
        "no_signal": statistics.fmean(line["frac_reward_zero_std"] for line in sampled[:10]),
        "steps_to_goal": None if reached is None else reached + len(told) - len(sampled),
        "before": result.accuracy_before,
        "after": result.accuracy_after,
    }


def table(runs: list[dict[str, Any]], goal: float) -> str:
    """A row a way, means over the seeds."""
    lines = [f"| | groups without signal | steps to {goal:.0%} | held out, before | after |", "|---|---|---|---|---|"]
    for way in WAYS:
        mine = [one for one in runs if one["way"] == way]
        if not mine:
            continue
        goals = [one["steps_to_goal"] for one in mine]
        reached = [goal for goal in goals if goal is not None]
        mean = (
            f"{statistics.fmean(reached):.0f}" if len(reached) == len(goals) else f"{len(reached)} of {len(goals)} runs"
        )
        figures = [statistics.fmean(one[key] for one in mine) for key in ("no_signal", "before", "after")]
        lines.append(f"| {way} | {figures[0]:.0%} | {mean} | {figures[1]:.1%} | {figures[2]:.1%} |")
    return "\n".join(lines)


def main() -> None:
    """Run all, print all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=float, default=1.2)
    parser.add_argument("--warm", type=int, default=40)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--goal", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    asked = parser.parse_args()
    runs = []
    for way in WAYS:
        for seed in asked.seeds:
            runs.append(run(way, seed, noise=asked.noise, warm=asked.warm, steps=asked.steps, goal=asked.goal))
            print(json.dumps(runs[-1]), flush=True)
    print(table(runs, asked.goal))


if __name__ == "__main__":
    main()
