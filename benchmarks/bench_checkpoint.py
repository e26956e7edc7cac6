"""What does writing a checkpoint every step cost the learner?

    python benchmarks/bench_checkpoint.py [--steps 4] [--turns 1] [--generator auto]

Two runs of the same shape with max_staleness 1, in turns: one that writes a checkpoint after every step, and one that
writes none but the last. The policy has about 150 million random parameters, 600 MB in float32, so a checkpoint is four
times as much: weights, the weights before, two moments. Completions are short, and as many as make a step long enough
for a checkpoint to be written in it: a faster step waits for the disk, which `wait_s` shows.

Prints one JSON line a run and one that compares: medians over the steps of `learn_s` (the learner's work), `wait_s`
(what it waited for the checkpointer) and `step_s`; `cost` is what `learn_s` + `wait_s` grew by, and `ok` whether that
is less than 2 %. `beside_gb`: how far the peak of the process's memory is above that of the run without.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import troupe  # first: it loads OpenBLAS before MLX
from troupe.config import DEMO_CONFIG
from troupe.policy import Qwen3Config, is_on_cpu, parameter_count, random_policy

WARM_UP = 2
GOAL = 0.02
POLICY = Qwen3Config(
    vocab_size=257,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=10,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=256,
    tie_word_embeddings=True,
    eos_token_id=(256,),
)


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Differs between completions, and takes no time."""
    return [sum(ids) % 17 / 17 for ids in completion_ids]


def write_inputs(folder: Path, prompts: int) -> tuple[Path, Path]:
    """A policy with the demo's tokenizer, and a dataset."""
    model = folder / "policy"
    random_policy(POLICY).save(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_CONFIG.parent / "policy" / name, model / name)
    dice = random.Random(0)
    rows = [{"prompt": f"{dice.randrange(10**9)}+{dice.randrange(10**5)}="} for _ in range(8 * prompts)]
    (folder / "prompts.json").write_text(json.dumps(rows), encoding="utf-8")
    return model, folder / "prompts.json"


def play(folder: Path, every: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run in this process → its figures."""
    table: dict[str, Any] = {
        "output": str(folder / "run"),
        "model": {"path": str(folder / "policy")},
        "data": {"path": str(folder / "prompts.json")},
        "generation": {"num_generations": args.group, "max_completion_length": args.new_tokens},
        "learner": {"batch_size": args.prompts, "max_steps": WARM_UP + args.steps + 1, "lr": 1e-6},
        "schedule": {"max_staleness": 1, "generator": args.generator},
        "checkpoint": {"every": every, "keep": 1, "keep_best": False},
        "metrics": {"sinks": ["jsonl", "trace", "sqlite"]},
    }
    if args.blas_threads:
        table["schedule"]["blas_threads"] = args.blas_threads
    troupe.train(troupe.load_config(None, [table]), [reward])
    spans = read_spans(folder / "run" / "trace.json")
    steps = range(WARM_UP, WARM_UP + args.steps)
    learn_s = [spans["learn"][step] for step in steps]
    # the wait before snapshot k is over before step k is learned, and so comes to lie within it
    wait_s = [spans.get("wait for checkpointer", {}).get(step, 0.0) for step in steps]
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    step_s = {line["step"]: line["step_time"] for line in lines if "step_time" in line}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    written = [seconds for step, seconds in spans["checkpoint"].items() if step in steps]
    return {
        "every": every,
        "learn_s": round(statistics.median(learn_s), 4),
        "wait_s": round(statistics.median(wait_s), 4),
        "both_s": round(statistics.median(a + b for a, b in zip(learn_s, wait_s, strict=True)), 4),
        "step_s": round(statistics.median(step_s[step + 1] for step in steps), 4),
        "write_s": round(statistics.median(written), 3) if written else None,
        "checkpoint_gb": round(newest_bytes(folder / "run") / 1e9, 3),
        "peak_gb": round(peak / 1e9, 2),
    }


def read_spans(trace: Path) -> dict[str, dict[int, float]]:
    """Name → step → seconds, summed."""
    spans: dict[str, dict[int, float]] = {}
    for event in json.loads(trace.read_text()):
        step = event.get("args", {}).get("step")
        if event.get("ph") == "X" and step is not None:
            of_name = spans.setdefault(event["name"], {})
            of_name[step] = of_name.get(step, 0.0) + event["dur"] / 1e6
    return spans


def newest_bytes(run: Path) -> int:
    """Size of the newest checkpoint."""
    newest = max((run / "checkpoints").glob("step-*"))
    return sum(file.stat().st_size for file in newest.iterdir())


def play_apart(folder: Path, every: int, arguments: Sequence[str]) -> dict[str, Any]:
    """The same in a process of its own, so that its peak memory is its own."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    command = [sys.executable, __file__, *arguments, "--play", str(every), "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def compared(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The best of the runs with and without checkpoints: what is left of others' work on the machine least."""
    best = {every: min((r for r in runs if r["every"] == every), key=lambda r: r["both_s"]) for every in (1, 10_000)}
    beside, without = best[1], best[10_000]
    cost = beside["both_s"] / without["both_s"] - 1
    return {
        "what": "compared",
        "learn_cost": round(beside["learn_s"] / without["learn_s"] - 1, 4),
        "cost": round(cost, 4),
        "step_cost": round(beside["step_s"] / without["step_s"] - 1, 4),
        "beside_gb": round(beside["peak_gb"] - without["peak_gb"], 2),
        "ok": cost < GOAL,
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="steps that are measured, of each run")
    parser.add_argument("--turns", type=int, default=1, help="runs of each kind")
    parser.add_argument("--prompts", type=int, default=8, help="groups a step")
    parser.add_argument("--group", type=int, default=4, help="completions a group")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens of a completion, at most")
    parser.add_argument("--generator", choices=["auto", "thread", "process"], default="auto")
    parser.add_argument("--blas-threads", type=int, default=0, help="of each process; 0: as a run chooses")
    parser.add_argument("--folder", type=Path, help="where the checkpoints go; a temporary one if not told")
    parser.add_argument("--play", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Measure, and print the lines as they come."""
    args = parse(arguments)
    if args.play is not None:
        print(json.dumps(play(args.folder, args.play, args)))
        return
    runs = []
    with tempfile.TemporaryDirectory(prefix="troupe-checkpoint-", dir=args.folder) as folder:
        write_inputs(Path(folder), args.prompts)
        for every in (10_000, 1) * args.turns:
            busy = os.getloadavg()[0]
            runs.append(play_apart(Path(folder), every, arguments))
            line = {"benchmark": "checkpoint", "what": "run", "load_before": round(busy, 1), **runs[-1]}
            print(json.dumps(line), flush=True)
    about = {
        "parameters": parameter_count(POLICY),
        "on_cpu": is_on_cpu(),
        **{key: value for key, value in vars(args).items() if isinstance(value, int | str)},
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "mlx": version("mlx"),
        "troupe": troupe.__version__,
    }
    print(json.dumps({"benchmark": "checkpoint", **compared(runs), **about}))


if __name__ == "__main__":
    main(sys.argv[1:])
