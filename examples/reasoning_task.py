"""A task of reasoning-gym with its own verifier as the reward.

    pip install -e '.[reasoning-gym]'      # in the clone
    python examples/reasoning_task.py

reasoning-gym makes tasks without end, each with a function that scores an answer. This takes sums of two numbers from
its `basic_arithmetic`, puts them as the demo's policy knows them (`27+58=`, not `Calculate 27 + 58.`), trains with the
verifier's score, and says what held-out tasks score before and after. Takes a quarter of a minute on two CPU cores. The
prompts lie in a temporary folder that is gone afterwards, so such a run cannot be resumed.

A model that can read takes the questions as they are, and needs no script; `docs/datasets.md` has the whole notation:

    troupe train -m MODEL -d 'reasoning_gym:basic_arithmetic?size=500&seed=1'
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import troupe
from troupe.cli.demo import DEMO_CONFIG

TASK = {
    "operators": ["+"],
    "min_terms": 2,
    "max_terms": 2,
    "min_digits": 1,
    "max_digits": 2,
    "allow_parentheses": False,
    "allow_negation": False,
}


@cache
def tasks(seed: int, size: int) -> Any:
    """A dataset of reasoning-gym: tasks by number, and `score_answer` for all of them."""
    import reasoning_gym

    return reasoning_gym.create_dataset("basic_arithmetic", seed=seed, size=size, **TASK)


def row(entry: dict[str, Any]) -> dict[str, Any]:
    """A task as a row of prompts: the verifier wants to see the whole task again, so it is a column."""
    return {"prompt": entry["metadata"]["expression"].replace(" ", "") + "=", "task": entry}


def verified(completions: list[str], task: list[dict[str, Any]], **columns: Any) -> list[float]:
    """What the verifier says, from 0 to 1."""
    score = tasks(seed=0, size=1).score_answer
    return [float(score(text.strip(), entry)) for text, entry in zip(completions, task, strict=True)]


def main(folder: Path, output: str | None, max_steps: int) -> troupe.RunResult:
    """Write the prompts into `folder`, and train."""
    for name, seed, size in (("train", 1, 500), ("held-out", 2, 100)):
        rows = [row(entry) for entry in tasks(seed, size)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    config = troupe.load_config(
        DEMO_CONFIG,
        [
            {"output": output, "learner": {"max_steps": max_steps}, "rewards": {"functions": []}},
            {"data": {"path": str(folder / "train.jsonl"), "eval_path": str(folder / "held-out.jsonl")}},
        ],
    )
    return troupe.train(config, rewards=[verified])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the demo's policy on a task of reasoning-gym.")
    parser.add_argument("--output", metavar="FOLDER", help="run folder; default: the next free one in runs/")
    parser.add_argument("--max-steps", type=int, default=30)
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="troupe-tasks-") as where:
            result = main(Path(where), options.output, options.max_steps)
    except ImportError:
        sys.exit(
            "reasoning-gym is not installed; install Troupe's extra in its clone: pip install -e '.[reasoning-gym]'"
        )
    before, after = (rewards["verified"] for rewards in (result.rewards_before, result.rewards_after))
    print(f"{result.steps} steps; the verifier on held-out tasks: {before:.1%} before, {after:.1%} after")
