"""SmolLM2 trained in every way that Troupe has, with several seeds, and what became of it as a table.

    python examples/smollm2/table.py                         # ten runs: minutes on a GPU, two hours on two cores
    python examples/smollm2/table.py --only lora --seeds 0 --steps 40

Every run is one of `troupe train` with a file of this folder. Held-out sums are answered greedily before and after, by
the run itself; the table has how many of them are right. It stands in `runs/smollm2/table.md`, written anew after each
run, and beside it each run's folder with its report. Needs nothing from outside but the package, or its wheel
(`--source`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
MODELS = HERE.parents[1] / "models"
WAYS = {
    "lora": "LoRA, one digit",
    "qlora": "QLoRA, 4 bits, one digit",
    "whole": "all weights, one digit",
    "two-digit": "LoRA, two digits",
}
"""A file of this folder → what it is called in the table."""
HEAD = "| trained | seed | right before | right after | steps | seconds a step | seconds of the run |"
QUESTIONS = 5


def troupe(*arguments: str | Path) -> None:
    """One of Troupe's commands, whose output goes where ours does. CalledProcessError where it fails."""
    subprocess.run([sys.executable, "-m", "troupe", *map(str, arguments)], check=True)


def held_out(way: str) -> list[dict[str, Any]]:
    """The rows that a way is judged by."""
    name = "two-digit" if way == "two-digit" else "one-digit"
    lines = (HERE / f"{name}-held-out.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def train(way: str, seed: int, steps: int | None, runs: Path) -> str:
    """Train, or go on where this was cut off, write the report, and return the table's row."""
    output = runs / f"{way}-{seed}"
    limit = [] if steps is None else ["--max-steps", str(steps)]
    if not (output / "summary.json").is_file():
        again = ["--resume"] if output.is_dir() else []
        troupe("train", HERE / f"{way}.toml", "-o", output, "--seed", str(seed), *limit, *again)
    troupe("report", output)
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    step_s = median(json.loads(line)["step_time"] for line in lines)
    rows = len(held_out(way))
    before, after = (round(summary[f"rewards_{when}"]["right_sum"] * rows) for when in ("before", "after"))
    return (
        f"| {WAYS[way]} | {seed} | {before} of {rows} | {after} of {rows} | {summary['steps']} "
        f"| {step_s:.2f} | {summary['wall_s']:.0f} |"
    )


def answers(model: Path, questions: list[str], length: int) -> list[str]:
    """Greedy answers of a model, or of an adapter beside the model that it names."""
    from troupe.policy import load_policy

    prompts = [[{"role": "user", "content": question}] for question in questions]
    return load_policy(model).generate_texts(prompts, max_new_tokens=length, temperature=0.0)


def shown_answers(way: str, run: Path) -> str:
    """What a run's policy says to some held-out questions, beside what it said before, no longer than in training."""
    base = MODELS / ("smollm2-4bit" if way == "qlora" else "smollm2")
    rows, length = held_out(way), 12 if way == "two-digit" else 10
    asked = [row["prompt"] for row in rows[:: len(rows) // QUESTIONS]]
    said = zip(asked, answers(base, asked, length), answers(run / "final", asked, length), strict=True)
    lines = [f"| {question} | `{json.dumps(before)}` | `{json.dumps(after)}` |" for question, before, after in said]
    return "\n".join([f"{WAYS[way]}:", "", "| question | before | after |", "|---|---|---|", *lines])


def main(options: argparse.Namespace) -> None:
    """All runs, as long as there is time, then the completions of each way's first run."""
    started_s = time.monotonic()
    if not (MODELS / "smollm2-4bit").is_dir():
        source = [] if options.source is None else ["--source", options.source]
        subprocess.run([sys.executable, HERE / "make_model.py", "--folder", MODELS / "smollm2", *source], check=True)
    runs: Path = options.output
    runs.mkdir(parents=True, exist_ok=True)
    seeds = {"two-digit": options.seeds[:1]}
    planned = [(way, seed) for way in options.only for seed in seeds.get(way, options.seeds)]
    table, first = [HEAD, "|---|---:|---:|---:|---:|---:|---:|"], dict[str, Path]()
    for way, seed in planned:
        if time.monotonic() - started_s > options.within:
            print(f"no time is left for {way} with seed {seed}", flush=True)
            continue
        table.append(train(way, seed, options.two_digit_steps if way == "two-digit" else options.steps, runs))
        first.setdefault(way, runs / f"{way}-{seed}")
        (runs / "table.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    shown = ["\n".join(table), *(shown_answers(way, run) for way, run in first.items())]
    (runs / "table.md").write_text("\n\n".join(shown) + "\n", encoding="utf-8")
    print((runs / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train SmolLM2 in several ways and print a table.")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), help="default: all four")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of two digits the first alone")
    parser.add_argument("--steps", type=int, help="of one digit; default: what the files say")
    parser.add_argument("--two-digit-steps", type=int, help="default: what the file says")
    parser.add_argument("--source", type=Path, metavar="FILE", help="the package's wheel, or the GGUF file in it")
    parser.add_argument("--output", type=Path, default=Path("runs/smollm2"), help="default: %(default)s")
    parser.add_argument("--within", type=float, default=float("inf"), metavar="SECONDS", help="begin no run later")
    try:
        main(parser.parse_args())
    except subprocess.CalledProcessError as failed:
        sys.exit(failed.returncode)
