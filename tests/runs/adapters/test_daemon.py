"""A run of an adapter under the daemon: asked while it goes on, killed, and brought back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.adapters import FILES, LORA
from tests.support.kills import STEPS, Trainer, newest_step, processes, read_store, write_run
from tests.support.runs import column, done, summary

pytestmark = [pytest.mark.slow, pytest.mark.alone]

SETTINGS: dict[str, Any] = LORA | {
    "learner__lr": 1e-2,
    "learner__lr_scheduler": "constant",
    "schedule__generator": "process",
    "schedule__max_staleness": 1,
    "daemon__first_pause_s": 0.05,
    "daemon__longest_pause_s": 0.05,
}


def until(there: Callable[[], bool], daemon: subprocess.Popen[bytes]) -> None:
    until_s = time.monotonic() + 90.0
    while not there():
        assert daemon.poll() is None
        assert time.monotonic() < until_s
        time.sleep(0.005)


def children_of(pid: int) -> list[int]:
    return [int(line.split()[1]) for line in processes() if int(line.split()[0]) == pid]


def test_a_rate_that_is_set_holds_over_a_kill_and_for_whoever_makes_the_run_again(tmp_path: Path) -> None:
    config, out = write_run(tmp_path, **SETTINGS), tmp_path / "out"
    with (tmp_path / "daemon.txt").open("ab") as log:
        daemon = subprocess.Popen(
            [sys.executable, "-m", "troupe", "daemon", str(config), "-o", str(out)], stdout=log, stderr=log
        )
    try:
        until(lambda: newest_step(out) >= 4, daemon)
        done("set", out, "learner.lr=0.002")
        until(lambda: (out / "changes.jsonl").exists() and newest_step(out) >= 8, daemon)
        (trainer,) = children_of(daemon.pid)
        os.kill(trainer, signal.SIGKILL)
        assert daemon.wait(120) == 0, (tmp_path / "daemon.txt").read_text()[-4000:]
    finally:
        if daemon.poll() is None:
            daemon.kill()
            daemon.wait()
    assert summary(out).complete
    assert "SIGKILL" in (tmp_path / "daemon.txt").read_text()
    change = json.loads((out / "changes.jsonl").read_text())
    assert column(out, "learning_rate") == [0.01] * change["step"] + [0.002] * (STEPS - change["step"])
    again = tmp_path / "again"
    again.mkdir()
    for name in ("run.toml", "changes.jsonl"):
        shutil.copy(out / name, again)
    assert Trainer(config, again).wait() == 0, (tmp_path / "log.txt").read_text()[-4000:]
    for name in FILES:
        assert (again / "final" / name).read_bytes() == (out / "final" / name).read_bytes()
    assert read_store(again) == read_store(out)
