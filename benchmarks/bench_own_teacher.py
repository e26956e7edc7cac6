"""What does a policy learn that is its own teacher, having seen the answer?

    python -m benchmarks.bench_own_teacher [--seeds 0 1 2] [--steps 100] [--reading 1000]

The demo's policy, which mostly forgets to carry, first learns to read a demonstration: supervised steps on sums behind
which a random number stands as the answer, and which are asked once more, half and half with sums that it answers as
before. So it can copy an answer that it is shown, and adds no better. Then it teaches itself the demo's sums by each
kind of weights, without rewards. Prints a JSON line a run and then a Markdown table: held-out sums answered rightly,
greedily, without a demonstration. How many of them it gets right when it is shown the answer stands above the table.
All but `[teacher]` is as `demo.toml` has it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import troupe
from troupe.cli.demo import DEMO_CONFIG
from troupe.policy import GenerationConfig, generate_batch, load_policy

DEMO, KINDS = DEMO_CONFIG.parent, ("base", "ema", "live")
TEMPLATE = "{prompt}{privileged_context};{prompt}"
MOST = 199
"""Above any sum of the demo."""
OWN_ROWS, AT_ONCE = 1000, 200


def shown(prompt: str, answer: str) -> str:
    """The prompt as the teacher sees it."""
    return TEMPLATE.replace("{prompt}", prompt).replace("{privileged_context}", answer)


def answers(model: str | Path, prompts: Sequence[str], temperature: float) -> list[str]:
    """What a policy says, once each."""
    policy, found = load_policy(model), list[str]()
    generation = GenerationConfig(temperature=temperature, max_completion_length=8)
    for start in range(0, len(prompts), AT_ONCE):
        found += generate_batch(policy, prompts[start : start + AT_ONCE], 1, generation, seed=start).texts
    return found


def train_reader(folder: Path, steps: int) -> str:
    """The demo's policy, once it can read a demonstration."""
    dice, prompts = random.Random(0), [row["prompt"] for row in json.loads((DEMO / "arithmetic.json").read_text())]
    own = dict(zip(prompts[:OWN_ROWS], answers(DEMO / "policy", prompts[:OWN_ROWS], 1.0), strict=True))
    rows = []
    for number in range(16 * steps):
        if number % 2:
            prompt, answer = dice.choice(prompts), str(dice.randint(0, MOST))
            rows.append({"prompt": shown(prompt, answer), "completion": answer})
        else:
            prompt = dice.choice(prompts[:OWN_ROWS])
            rows.append({"prompt": prompt, "completion": own[prompt]})
    data = folder / "rows.json"
    data.write_text(json.dumps(rows), encoding="utf-8")
    table = {
        "task": "sft",
        "model": {"path": str(DEMO / "policy")},
        "data": {"path": str(data)},
        "learner": {"lr": 1e-3, "batch_size": 16, "max_steps": steps},
        "output": str(folder / "reader"),
        "metrics": {"sinks": ["jsonl"]},
    }
    return str(Path(troupe.train(troupe.load_config(None, [table])).folder) / "final")


def right_when_shown(model: str) -> float:
    """Of held-out sums, with the answer shown."""
    rows = json.loads((DEMO / "arithmetic-held-out.json").read_text())
    said = answers(model, [shown(row["prompt"], row["answer"]) for row in rows], 0.0)
    return statistics.fmean(text == row["answer"] for text, row in zip(said, rows, strict=True))


def run(kind: str, model: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """One training run."""
    settings = {
        "seed": seed,
        "model": {"path": model},
        "output": str(folder / f"{kind} {seed}"),
        "learner": {"max_steps": steps},
        "teacher": {
            "model_kind": kind,
            "reward_coef": 0.0,
            "privileged_context_column": "answer",
            "prompt_template": TEMPLATE,
        },
        "metrics": {"sinks": ["jsonl"]},
    }
    result = troupe.train(troupe.load_config(DEMO_CONFIG, [settings]))
    return {
        "model_kind": kind,
        "seed": seed,
        "before": result.accuracy_before,
        "accuracy": result.accuracy_after,
        "seconds": round(result.wall_s, 1),
    }


def row(runs: Sequence[dict[str, Any]]) -> str:
    """The runs of one kind as a line of the table."""
    found = [one["accuracy"] for one in runs]
    spread = f"{min(found):.1%} to {max(found):.1%}"
    return f"| `{runs[0]['model_kind']}` | {runs[0]['before']:.1%} | {statistics.fmean(found):.1%} | {spread} |"


def main() -> None:
    """Train by all kinds, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--reading", type=int, default=1000, help="supervised steps before")
    options = parser.parse_args()
    table = ["| weights of the teacher | right before | at the end | over the seeds |", "|---|---:|---:|---:|"]
    with tempfile.TemporaryDirectory(prefix="troupe-own-teacher-") as folder:
        model = train_reader(Path(folder), options.reading)
        print(f"right when shown: {right_when_shown(model):.1%}", flush=True)
        for kind in KINDS:
            runs = []
            for seed in options.seeds:
                runs.append(run(kind, model, seed, options.steps, Path(folder)))
                print(json.dumps(runs[-1]), flush=True)
            table.append(row(runs))
    print("\n".join(table), flush=True)


if __name__ == "__main__":
    main()
