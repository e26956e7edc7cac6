"""Doing harm to real runs: `troupe train` processes that are killed at bad moments, and what must hold afterwards."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import tomli_w

from troupe.checkpoint import MANIFEST, list_checkpoints, verify_manifest
from troupe.cli.demo import DEMO_CONFIG

STEPS, P, G, EVERY = 24, 4, 4, 2
REWARD = """
import asyncio, hashlib

async def slow_digits(completions, answer, **_):
    await asyncio.sleep(0.02 + 0.04 * (hash(completions[0]) % 3))
    return [
        int(hashlib.sha256((text + right).encode()).hexdigest()[:4], 16) / 65535 + (text.strip() == right)
        for text, right in zip(completions, answer)
    ]
"""
_STARTS_S = 60.0


def write_run(folder: Path, **settings: Any) -> Path:
    """A config of a few seconds' training of the demo's policy; settings as `section__key=value`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rewards.py").write_text(REWARD)
    demo = DEMO_CONFIG.parent
    table: dict[str, Any] = {
        "model": {"path": str(demo / "policy")},
        "data": {"path": str(demo / "arithmetic.json")},
        "generation": {"num_generations": G, "max_completion_length": 8},
        "rewards": {"functions": ["rewards.py:slow_digits"]},
        "learner": {"lr": 1e-4, "batch_size": P, "max_steps": STEPS},
        "schedule": {"blas_threads": 1},
        "checkpoint": {"every": EVERY, "keep": 2},
        "metrics": {"sinks": ["jsonl", "sqlite"]},
    }
    for name, value in settings.items():
        section, _, key = name.partition("__")
        table.setdefault(section, {})[key] = value
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps(table))
    return path


class Trainer:
    """One start of `troupe train`."""

    def __init__(self, config: Path, out: Path) -> None:
        self.out = out
        self._log = (config.parent / "log.txt").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "troupe", "train", str(config), "-o", str(out), "--resume"],
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, "COLUMNS": "120"},
        )

    def wait(self, timeout_s: float = 240.0) -> int:
        """Its exit code."""
        code = self.process.wait(timeout_s)
        self._log.close()
        return code

    def kill(self) -> None:
        """As the kernel does when memory runs out."""
        self.process.kill()
        self.wait()

    def wait_until(self, there: Callable[[], bool]) -> bool:
        """Whether something came about before the process ended."""
        deadline_s = time.monotonic() + _STARTS_S
        while self.process.poll() is None:
            if there():
                return True
            if time.monotonic() > deadline_s:
                raise TimeoutError((self.out.parent / "log.txt").read_text()[-4000:])
            time.sleep(0.0005)
        return False


def run_and_kill(config: Path, out: Path, kills: int, seed: int) -> int:
    """Kill starts of a run at random moments, half of them while a checkpoint is written; check the folder after each,
    and let the last start drive to the end → how many were killed."""
    dice = random.Random(seed)
    killed = 0
    while killed < kills:
        before = newest_step(out)
        trainer = Trainer(config, out)
        moment = dice.choice(["at once", "working", "working", "writing", "writing", "written"])
        if moment == "at once":
            time.sleep(dice.random() * 2.0)
        elif moment == "writing":
            trainer.wait_until(lambda: bool(list((out / "checkpoints").glob(".writing-*"))))
            time.sleep(dice.random() * 0.02)
        else:
            wanted = before + EVERY * dice.randrange(1, 3)
            trainer.wait_until(lambda wanted=wanted: newest_step(out) >= wanted)  # type: ignore[misc]
            time.sleep(dice.random() * (0.3 if moment == "working" else 0.002))
        ended = trainer.process.poll() is not None
        trainer.kill()
        if ended:
            break
        killed += 1
        check_after_kill(out)
    assert Trainer(config, out).wait() == 0, (config.parent / "log.txt").read_text()[-4000:]
    check_after_kill(out)
    return killed


def newest_step(out: Path) -> int:
    """Of the newest checkpoint, as its folder is called; 0 where there is none."""
    return max((int(path.parent.name[5:]) for path in out.glob(f"checkpoints/step-*/{MANIFEST}")), default=0)


def check_after_kill(out: Path) -> None:
    """Whatever has a manifest is whole; what was told before a checkpoint is in the store; nobody is left."""
    deadline_s = time.monotonic() + 10.0
    while left := [line for line in processes() if "troupe.actors.generator.process" in line and " 1 " in line[:16]]:
        assert time.monotonic() < deadline_s, left
        time.sleep(0.05)
    checkpoints = list_checkpoints(out)
    for folder in checkpoints:
        verify_manifest(folder)
    if checkpoints:
        version = int(checkpoints[0].name[-8:])
        store = read_store(out)
        assert [step for step in store["steps"] if step <= version] == list(range(1, version + 1))
        lines = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_bytes().split(b"\n")[:-1] if line]
        assert lines[:version] == list(range(1, version + 1))


def processes() -> list[str]:
    """`ppid pid command` of every process."""
    listed = subprocess.run(["ps", "-axwwo", "ppid=,pid=,command="], capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


def read_store(out: Path) -> dict[str, list[Any]]:
    """The steps, groups (gid, step, state) and completions (gid, sample, step, text, scores) of a run, by key."""
    with closing(sqlite3.connect(f"file:{out / 'run.sqlite'}?mode=ro", uri=True)) as store:
        return {
            "steps": [row[0] for row in store.execute("SELECT step FROM steps ORDER BY step")],
            "groups": store.execute("SELECT gid, step, state FROM groups ORDER BY gid").fetchall(),
            "completions": store.execute(
                "SELECT gid, sample, step, text, scores, advantage FROM completions ORDER BY gid, sample"
            ).fetchall(),
        }
