"""What a SIGKILL costs a run: the steps since its last checkpoint, which are made again, and nothing else.

    python examples/resume_after_kill.py

Makes one run three times over, each start in a process of its own: once without a break; once until, after step 8, the
process kills itself with SIGKILL, which no program can catch; and then the killed run goes on. Checkpoints are written
every 5 steps, so the last start begins at step 5 and makes steps 6 to 8 a second time. In the end the weights of both
runs are compared bit by bit, and so are the metrics and every completion. Takes ten to twenty seconds on two CPU cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import anyio

import troupe
from troupe.cli.demo import DEMO_CONFIG

STEPS, EVERY, KILL_AT = 12, 5, 8


def main() -> int:
    """0 where both runs are the same."""
    parser = argparse.ArgumentParser(description="Kill a run, go on with it, and compare.")
    parser.add_argument("--start", type=Path, metavar="FOLDER", help="one start of a run; what the three starts do")
    parser.add_argument("--kill-at", type=int, metavar="STEP", help="with --start: SIGKILL after this step")
    parser.add_argument("--resume", action="store_true", help="with --start: go on with what is in the folder")
    options = parser.parse_args()
    if options.start is not None:
        anyio.run(run_once, options.start, options.kill_at, options.resume)
        return 0
    with tempfile.TemporaryDirectory(prefix="troupe-kill-") as folder:
        return compare(Path(folder))


async def run_once(folder: Path, kill_at: int | None, resume: bool) -> None:
    """One start of the run in `folder`."""
    config = troupe.load_config(
        DEMO_CONFIG,
        [
            {"output": str(folder), "data": {"eval_path": None}},
            f"learner.max_steps={STEPS}",
            f"checkpoint.every={EVERY}",
            "metrics.sinks=['jsonl', 'sqlite']",
        ],
    )
    async with troupe.Supervisor(config, resume=resume) as run:
        print(f"     begins with step {run.status().step + 1}", flush=True)
        async for update in run.updates():
            if update.step == kill_at:
                print(f"     step {update.step} is done; kill -9", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)


def compare(folder: Path) -> int:
    """Make the three starts, and say what is the same."""
    whole, killed = folder / "whole", folder / "killed"
    print(f"1. {STEPS} steps without a break")
    start(whole)
    print(f"2. the same run, killed after step {KILL_AT}")
    code = start(killed, "--kill-at", str(KILL_AT))
    print(
        f"     ended with {signal.Signals(-code).name if code < 0 else code}, and left", *names(killed / "checkpoints")
    )
    print("3. the killed run goes on")
    start(killed, "--resume")

    same = True
    for what, of in (("weights", weights), ("rewards of every step", step_rewards), ("completions", completions)):
        one, other = of(whole), of(killed)
        same = same and one == other
        shown = one[:16] + "…" if isinstance(one, str) else f"{len(one)} of them"
        print(f"{what}: {'the same' if one == other else 'NOT THE SAME'} ({shown})")
    return 0 if same else 1


def start(folder: Path, *flags: str) -> int:
    """Make one start in a process of its own → its exit code, negative where a signal ended it."""
    command = [sys.executable, __file__, "--start", str(folder), *flags]
    return subprocess.run(command, check=False).returncode


def names(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def weights(folder: Path) -> str:
    """sha256 of the trained policy."""
    return hashlib.sha256((folder / "final" / "model.safetensors").read_bytes()).hexdigest()


def step_rewards(folder: Path) -> list[tuple[int, float]]:
    """(step, mean reward) of every line of metrics.jsonl: each step stands there once."""
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["reward"]) for line in lines if "reward" in line]


def completions(folder: Path) -> list[tuple[int, int, str, float | None]]:
    """(group, sample, text, reward) of all that was sampled."""
    table = folder / "completions.jsonl"
    command = [sys.executable, "-m", "troupe", "inspect", str(folder), "--jsonl", str(table)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = map(json.loads, table.read_text(encoding="utf-8").splitlines())
    return [(line["gid"], line["sample"], line["text"], line["reward"]) for line in lines]


if __name__ == "__main__":
    sys.exit(main())
