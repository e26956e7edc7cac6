r"""What does a second card give a run, and are its bits those of one?

    python -m benchmarks.bench_ranks [--model Qwen3-0.6B --prompts 32 --group 8 --new-tokens 512 --steps 6]
    python -m benchmarks.bench_ranks --ranks 1 2 --kills     # also: a rank is killed, and stopped; the run is resumed

Whole runs of a random policy, each in a process of its own, with the same lanes and parts: on one card, and with a rank
and a generator on each of several. Prints a JSON line a run (medians over all steps but the first two), then one that
compares: `speedup` in whole steps a second over the first run, and `equal`, whether final weights are the same to the
bit. `plain` is one card with one lane and one part, as a run on one card is by itself. On a processor (`--model tiny`)
ranks are processes that share it, which shows bits and nothing of speed.

With `--explain` the first run is made twice, and of each step is told what it can be compared by: rewards, which
follow from all tokens, how far their log-probs lie from the learner's, loss, norm of the gradient. The first that
differs says where bits part: in decoding (reward, difference), in the gradient, or in the update (the step behind it).

With `--kills`, in a run of the most ranks, one is killed and in another one stopped while it learns: `ended_s`, how
long the run took to end; then it is resumed, and its weights are compared, too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w

import troupe
from troupe.cli.demo import DEMO_CONFIG
from troupe.run.devices import VISIBLE, seen_cards

WARM_UP = 2
TOLD = (
    "reward",
    "completions/mean_length",
    "sampling/sampling_logp_difference/mean",
    "sampling/sampling_logp_difference/max",
    "entropy",
    "loss",
    "grad_norm",
)
REWARD = '''"""A score that costs nothing."""


def odd(completion_ids, **_):
    return [sum(ids) % 17 / 17 for ids in completion_ids]
'''
WRITE = """
import sys
from benchmarks.bench_generation import PRESETS, TINY
from troupe.policy import random_policy
name, dtype, folder = sys.argv[1:]
random_policy(TINY if name == "tiny" else PRESETS[name], dtype=dtype).save(folder)
"""


def write_inputs(folder: Path, args: argparse.Namespace) -> None:
    """Model, prompts and reward; the model in a process of its own, so that this one holds no card."""
    model = folder / "policy"
    subprocess.run([sys.executable, "-c", WRITE, args.model, args.dtype, str(model)], check=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_CONFIG.parent / "policy" / name, model / name)
    dice = random.Random(0)
    rows = [{"prompt": "".join(dice.choices("0123456789+-", k=args.prompt_tokens))} for _ in range(8 * args.prompts)]
    (folder / "prompts.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")


def write_config(folder: Path, args: argparse.Namespace, name: str, *, lanes: int, ranks: int) -> Path:
    """The run of this name."""
    parts = lanes if lanes > 1 else 1
    schedule: dict[str, Any] = {"learner_ranks": ranks, "parts": parts, "rank_timeout_s": args.timeout}
    if not seen_cards():
        schedule |= {"blas_threads": 1, "learner_streams": 1}
        schedule |= {"generator": "process", "generator_processes": ranks} if ranks > 1 else {"generator": "thread"}
    table = {
        "output": str(folder / name),
        "model": {"path": str(folder / "policy")},
        "data": {"path": str(folder / "prompts.json")},
        "generation": {"num_generations": args.group, "max_completion_length": args.new_tokens},
        "rewards": {"functions": [f"{folder / 'reward.py'}:odd"]},
        "learner": {
            "batch_size": args.prompts,
            "max_steps": WARM_UP + args.steps,
            "lr": 1e-6,
            "lanes": lanes,
            "gradient_accumulation_steps": args.micro_batches,
        },
        "schedule": schedule,
        "checkpoint": {"every": args.checkpoint_every},
        "metrics": {"sinks": ["jsonl", "trace"]},
    }
    path = folder / f"{name}.toml"
    path.write_text(tomli_w.dumps(table), encoding="utf-8")
    return path


class Run:
    """A `troupe train` in a process group of its own."""

    def __init__(self, folder: Path, config: Path, name: str, cards: int, *more: str) -> None:
        self.output = folder / name
        self.log = folder / f"{name}.log"
        environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
        if seen_cards():
            environment[VISIBLE] = ",".join(seen_cards()[:cards])
        command = [sys.executable, "-m", "troupe", "train", str(config), *more]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        self.began_s, self.began_at, self.wall_s = time.perf_counter(), time.time(), 0.0
        self.seen_s: dict[str, float] = {}
        """Seconds after the start at which files were there, and the last step was told of."""

    def wait(self, limit_s: float) -> int:
        """Its exit code. At the limit it is killed, having written its stacks into its log."""
        code = self._ended_within(limit_s)
        if code is None:
            self.process.send_signal(signal.SIGABRT)
            self._ended_within(5.0)
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.wall_s = round(time.perf_counter() - self.began_s, 2)
        return -9 if code is None else code

    def _ended_within(self, limit_s: float) -> int | None:
        until_s = time.perf_counter() + limit_s
        while (code := self.process.poll()) is None and time.perf_counter() < until_s:
            for name in ("metrics.jsonl", "final", "summary.json"):
                path = self.output / name
                if path.exists():
                    self.seen_s.setdefault(name, round(time.perf_counter() - self.began_s, 2))
                    if name == "metrics.jsonl":
                        self.seen_s["last step"] = round(path.stat().st_mtime - self.began_at, 2)
            time.sleep(0.1)
        return code

    def steps(self) -> list[dict[str, Any]]:
        """Metrics of the steps done."""
        path = self.output / "metrics.jsonl"
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").splitlines()
        return [row for row in map(json.loads, lines) if "step_time" in row]

    def digest(self) -> str | None:
        """Of the final weights."""
        path = self.output / "final" / "model.safetensors"
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def measure(folder: Path, args: argparse.Namespace, name: str, *, lanes: int, ranks: int) -> dict[str, Any]:
    """One run to its end."""
    run = Run(folder, write_config(folder, args, name, lanes=lanes, ranks=ranks), name, ranks)
    code = run.wait(args.limit)
    rows = run.steps()[WARM_UP:]
    line: dict[str, Any] = {"run": name, "lanes": lanes, "ranks": ranks, "exit": code, "digest": run.digest()}
    line |= {"wall_s": run.wall_s, "seen_s": run.seen_s}
    if code:
        line["log"] = run.log.read_text(encoding="utf-8", errors="replace")[-6000:]
    if args.explain:
        line["told"] = [{name: row.get(name) for name in TOLD} for row in run.steps()]
    if rows:
        for key in ("step_time", "learn_time", "tokens_per_second", "peak_memory_gb"):
            line[key] = round(statistics.median(row[key] for row in rows), 4)
        line["steps_per_second"] = round(1.0 / line["step_time"], 4)
        line["parts_s"] = spans(run.output)
    print(json.dumps(line), flush=True)
    return line


def parting(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The first step in which two runs differ, and in what; None: in none."""
    for step, (left, right) in enumerate(zip(one, other, strict=False)):
        if differing := {name: [left[name], right[name]] for name in TOLD if repr(left[name]) != repr(right[name])}:
            return {"step": step, **differing}
    return None


def spans(output: Path) -> dict[str, float]:
    """Median seconds of what the learner and the generators do, by name of the span, as the trace has it."""
    found: dict[str, list[float]] = {}
    with suppress(OSError, ValueError):
        text = (output / "trace.json").read_text(encoding="utf-8").rstrip().rstrip(",")
        events = json.loads(text if text.endswith("]") else f"{text}]")
        for event in events:
            if event.get("ph") == "X" and event.get("dur", 0) > 1000:
                found.setdefault(event["name"], []).append(event["dur"] / 1e6)
    return {name: round(statistics.median(times), 3) for name, times in sorted(found.items()) if len(times) > 2}


def ranks_of(parent: int) -> Iterator[int]:
    """Pids of the ranks that are children of this process."""
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            above = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if above == parent and b"troupe.actors.learner.rank_process" in words:
                yield int(path.name)


def harm(folder: Path, args: argparse.Namespace, signal_name: str, ranks: int) -> dict[str, Any]:
    """A rank of a run is killed or stopped amid its steps; the run is resumed."""
    name = f"after {signal_name}".replace(" ", "-")
    config = write_config(folder, args, name, lanes=ranks, ranks=ranks)
    run = Run(folder, config, name, ranks)
    while len(run.steps()) < WARM_UP + 1 and run.process.poll() is None:
        time.sleep(0.05)
    line: dict[str, Any] = {"harm": signal_name, "steps_before": len(run.steps())}
    children = list(ranks_of(run.process.pid))
    for pid in children[-1:]:
        os.kill(pid, getattr(signal, signal_name))
    harmed_s = time.perf_counter()
    line["exit"] = run.wait(3 * args.timeout + 60)
    line["ended_s"] = round(time.perf_counter() - harmed_s, 2)
    line |= {"ranks": 1 + len(children), "left_over": sum(Path(f"/proc/{pid}").exists() for pid in children)}
    line["said"] = run.log.read_text(encoding="utf-8", errors="replace")[-800:]
    resumed = Run(folder, config, name, ranks, "--resume")
    line |= {"resumed_exit": resumed.wait(args.limit), "digest": resumed.digest()}
    print(json.dumps(line), flush=True)
    return line


def main() -> None:
    """Make the runs and print the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen3-0.6B")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--checkpoint-every", type=int, default=1000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--plain", action="store_true", help="also one card with one lane and one part")
    parser.add_argument("--kills", action="store_true")
    parser.add_argument("--explain", action="store_true")
    parser.add_argument("--timeout", type=float, default=15.0, help="rank_timeout_s")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that a run may take")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-ranks-") as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_inputs(folder, args)
        lanes = max(args.ranks)
        runs = [measure(folder, args, f"ranks-{ranks}", lanes=lanes, ranks=ranks) for ranks in args.ranks]
        if args.explain:
            again = measure(folder, args, "again", lanes=lanes, ranks=args.ranks[0])
            others = {"again": again, **{run["run"]: run for run in runs[1:]}}
            for name, other in others.items():
                print(json.dumps({"compared": name, "parts": parting(runs[0]["told"], other["told"])}), flush=True)
        if args.plain:
            measure(folder, args, "plain", lanes=1, ranks=1)
        digests = [run["digest"] for run in runs]
        if args.kills:
            args.checkpoint_every = 2
            digests += [harm(folder, args, name, lanes)["digest"] for name in ("SIGKILL", "SIGSTOP")]
    speeds = [run.get("steps_per_second") for run in runs]
    summary = {
        "benchmark": "ranks",
        **{key: value for key, value in vars(args).items() if key != "folder"},
        "speedup": [round(speed / speeds[0], 3) if speed and speeds[0] else None for speed in speeds],
        "equal": digests[0] is not None and len(set(digests)) == 1,
        "cards": len(seen_cards()),
        "machine": platform.platform(),
        "mlx": version("mlx"),
        "troupe": troupe.__version__,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
