"""Do memory, threads and open files stay flat over a long run with rewards that fail?

    python -m benchmarks.soak [--steps 2000 --fail 0.05 --out FOLDER]

Runs the demo's policy and data with a reward of which a share of the calls raises, hangs past its deadline or gives
NaN, checkpoints every 50 steps. Reads the trainer's resident memory, threads and descriptors from the system (Linux)
every `--every` steps and prints one JSON line each, then the counts of incidents and groups.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tomli_w

from troupe.cli.demo import DEMO_CONFIG

REWARD = """
import asyncio, random

dice = random.Random(0)

async def unreliable(completions, answer, **_):
    chance = dice.random() / {fail}
    if chance < 0.4:
        raise ConnectionError("the judge has gone")
    if chance < 0.6:
        await asyncio.sleep(60)
    if chance < 1:
        return [float("nan")] * len(completions)
    return [float(text.strip() == right) for text, right in zip(completions, answer)]
"""


def write_run(folder: Path, steps: int, fail: float) -> Path:
    """The config and the reward."""
    (folder / "rewards.py").write_text(REWARD.format(fail=fail))
    demo = DEMO_CONFIG.parent
    table = {
        "model": {"path": str(demo / "policy")},
        "data": {"path": str(demo / "arithmetic.json")},
        "generation": {"num_generations": 8, "max_completion_length": 8},
        "rewards": {"functions": ["rewards.py:unreliable"], "retries": 0, "timeout_s": 0.2},
        "learner": {"lr": 2e-4, "batch_size": 16, "max_steps": steps},
        "checkpoint": {"every": 50},
        "metrics": {"sinks": ["jsonl", "trace", "sqlite"]},
    }
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps(table))
    return path


def read(pid: int) -> dict[str, float]:
    """Resident megabytes, threads and descriptors of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "rss_mb": int(status["VmRSS"].split()[0]) / 1024,
        "threads": int(status["Threads"]),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),  # noqa: PTH208 - names are enough
    }


def main() -> None:
    """Run and watch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--fail", type=float, default=0.05)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    folder = args.out or Path(tempfile.mkdtemp(prefix="troupe-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "run"
    started_s = time.perf_counter()
    command = [sys.executable, "-m", "troupe", "train", str(write_run(folder, args.steps, args.fail)), "-o", str(out)]
    trainer = subprocess.Popen(command)
    told = 0
    while trainer.poll() is None:
        time.sleep(0.2)
        metrics = out / "metrics.jsonl"
        step = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
        if step >= told + args.every and trainer.poll() is None:
            told = step
            line = {"benchmark": "soak", "step": step, "seconds": round(time.perf_counter() - started_s, 1)}
            print(json.dumps(line | read(trainer.pid)), flush=True)
    summary = json.loads((out / "summary.json").read_text())
    sizes = {path.name: path.stat().st_size for path in out.iterdir() if path.is_file()}
    kept = {key: summary[key] for key in ("steps", "closed_groups", "incidents", "wall_s")}
    print(json.dumps({"benchmark": "soak", "exit_code": trainer.returncode, **kept, "bytes": sizes}))


if __name__ == "__main__":
    main()
