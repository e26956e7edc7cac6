"""What does writing a checkpoint beside a step cost the learner?

    python benchmarks/bench_checkpoint.py [--pairs 6] [--prompts 8 --group 8 --new-tokens 128]

One run with max_staleness 1 that writes a checkpoint after every second step, so that each step with a write beside it
lies between two without: what else the machine does, and how it drifts, meets both alike. The policy has about 150
million random parameters, 600 MB in float32, so a checkpoint is four times as much: weights, the weights before, two
moments. A checkpoint costs what it costs, however long a step is, so the size of a step decides which part of it that
is: by default 64 completions of 128 tokens, a small step for a policy of this size. On a CPU that takes two minutes.

Prints one JSON line. `cost`: the median over the pairs of what the learner's step with a write beside it takes
over the mean of the two steps around it without, less 1; had a write taken longer than its step, what a run that writes
after every step would wait counts too. `cost_s`: the same in seconds. `quartiles` of `cost` say how far to trust it,
and `ok` whether it is less than 2 %. `spilled`: the largest part of a step without that a write was at work in after
all.
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
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import troupe  # first: it loads OpenBLAS before MLX
from troupe.cli.demo import DEMO_CONFIG
from troupe.policy import NetworkConfig, is_on_cpu, parameter_count, random_policy

WARM_UP = 2
GOAL = 0.02
POLICY = NetworkConfig(
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


def run(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The run → its figures."""
    table: dict[str, Any] = {
        "output": str(folder / "run"),
        "model": {"path": str(folder / "policy")},
        "data": {"path": str(folder / "prompts.json")},
        "generation": {"num_generations": args.group, "max_completion_length": args.new_tokens},
        "learner": {"batch_size": args.prompts, "max_steps": WARM_UP + 2 * args.pairs + 2, "lr": 1e-6},
        "schedule": {"max_staleness": 1, "generator": args.generator},
        "checkpoint": {"every": 2, "keep": 1, "keep_best": False},
        "metrics": {"sinks": ["jsonl", "trace", "sqlite"]},
    }
    if args.blas_threads:
        table["schedule"]["blas_threads"] = args.blas_threads
    troupe.train(troupe.load_config(None, [table]), [reward])
    spans = read_spans(folder / "run" / "trace.json")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        **compared(spans),
        "checkpoint_gb": round(newest_bytes(folder / "run") / 1e9, 3),
        "peak_gb": round(peak / 1e9, 2),
    }


Interval = tuple[float, float]


def read_spans(trace: Path) -> dict[str, list[Interval]]:
    """Name → when work of that name began and ended, in seconds and in order."""
    spans: dict[str, list[Interval]] = {}
    for event in json.loads(trace.read_text()):
        if event.get("ph") == "X":
            interval = (event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
            spans.setdefault(event["name"], []).append(interval)
    return {name: sorted(intervals) for name, intervals in spans.items()}


def shared_s(one: Interval, others: Sequence[Interval]) -> float:
    """For how many seconds of `one` some of the others went on."""
    return sum(max(0.0, min(one[1], end_s) - max(one[0], start_s)) for start_s, end_s in others)


def compared(spans: dict[str, list[Interval]]) -> dict[str, Any]:
    """Each step that a checkpoint was written beside, with the two around it."""
    learned = spans["learn"]
    costs, beside_s, without_s, spilled = [], [], [], 0.0
    written = spans["checkpoint"][:-1]  # the last has no step beside it
    for write in written:
        place = max(range(len(learned)), key=lambda each: shared_s(learned[each], [write]))
        if not WARM_UP < place < len(learned) - 1:
            continue
        before, here, after = ((each, each[1] - each[0]) for each in learned[place - 1 : place + 2])
        around_s = (before[1] + after[1]) / 2
        waits_s = max(0.0, write[1] - write[0] - here[1])  # had the next one to be written at once
        costs.append((here[1] + waits_s) / around_s - 1)
        beside_s.append(here[1])
        without_s.append(around_s)
        spilled = max(spilled, *(shared_s(each, written) / took_s for each, took_s in (before, after)))
    if not costs:
        sys.exit("no write went on beside a step between two others; let steps be longer or --pairs more")
    cost = statistics.median(costs)
    seconds = [cost * around_s for cost, around_s in zip(costs, without_s, strict=True)]
    return {
        "beside_s": round(statistics.median(beside_s), 4),
        "without_s": round(statistics.median(without_s), 4),
        "write_s": round(statistics.median(end_s - start_s for start_s, end_s in written), 3),
        "cost": round(cost, 4),
        "cost_s": round(statistics.median(seconds), 3),
        "quartiles": [round(each, 4) for each in statistics.quantiles(costs, n=4)] if len(costs) > 1 else [],
        "measured": len(costs),
        "spilled": round(spilled, 3),
        "ok": cost < GOAL,
    }


def newest_bytes(run: Path) -> int:
    """Size of the newest checkpoint."""
    newest = max((run / "checkpoints").glob("step-*"))
    return sum(file.stat().st_size for file in newest.iterdir())


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=6, help="steps with a write beside them, each with its neighbours")
    parser.add_argument("--prompts", type=int, default=8, help="groups a step")
    parser.add_argument("--group", type=int, default=8, help="completions a group")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens of a completion, at most")
    parser.add_argument("--generator", choices=["auto", "thread", "process"], default="auto")
    parser.add_argument("--blas-threads", type=int, default=0, help="of each process; 0: as a run chooses")
    parser.add_argument("--folder", type=Path, help="where the checkpoints go; a temporary one if not told")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Measure, and print the line."""
    args = parse(arguments)
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="troupe-checkpoint-", dir=args.folder) as folder:
        write_inputs(Path(folder), args.prompts)
        figures = run(Path(folder), args)
    about = {
        "load_before": round(busy, 1),
        "parameters": parameter_count(POLICY),
        "on_cpu": is_on_cpu(),
        **{key: value for key, value in vars(args).items() if isinstance(value, int | str)},
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "mlx": version("mlx"),
        "troupe": troupe.__version__,
    }
    print(json.dumps({"benchmark": "checkpoint", **figures, **about}))


if __name__ == "__main__":
    main(sys.argv[1:])
