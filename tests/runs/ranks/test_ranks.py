"""Whole runs with several ranks: the bits of one, also where a rank is killed or stopped amid a step."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.kills import STEPS, Trainer, newest_step, processes, read_store, write_run
from tests.support.runs import incidents, lines, summary, timeless

pytestmark = [pytest.mark.slow, pytest.mark.alone]

LANES: dict[str, Any] = {
    "learner__lanes": 4,
    "schedule__generator": "thread",
    "schedule__learner_streams": 1,
    "schedule__rank_timeout_s": 3.0,
}
WHOLE: dict[str, Any] = LANES | {
    "learner__loss_type": "clip_cov",
    "learner__clip_cov_ratio": 0.1,
    "learner__clip_cov_lb": 0.0,
    "learner__beta": 0.05,
    "learner__sync_ref_model": True,
    "learner__ref_model_sync_steps": 3,
    "learner__num_iterations": 2,
    "learner__top_entropy_quantile": 0.6,
    "learner__max_steps": 5,
}
ADAPTER: dict[str, Any] = LANES | {
    "adapter__kind": "lora",
    "adapter__rank": 4,
    "adapter__dropout": 0.3,
    "model__dtype": "bfloat16",
    "learner__dynamic_sampling": True,
    "learner__max_steps": 5,
}


def finals(out: Path) -> dict[str, str]:
    files = [path for path in (out / "final").iterdir() if path.suffix == ".safetensors"]
    assert files
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def told(out: Path) -> list[dict[str, Any]]:
    return [timeless(line) for line in lines(out)]


def check_same(out: Path, whole: Path) -> None:
    assert finals(out) == finals(whole)
    assert told(out) == told(whole)
    assert read_store(out) == read_store(whole)


def made(folder: Path, name: str, settings: dict[str, Any], ranks: int) -> Path:
    folder, out = folder / name, folder / name / "out"
    config = write_run(folder, **settings, schedule__learner_ranks=ranks)
    assert Trainer(config, out).wait() == 0, (folder / "log.txt").read_text()[-4000:]
    assert incidents(out) == []
    return out


def spans(out: Path) -> list[tuple[str, int]]:
    """Names, and the process that each belongs to on the timeline."""
    events = json.loads((out / "trace.json").read_text())
    return [(event["name"], event["pid"]) for event in events if event["ph"] == "X"]


def ranks_alive() -> list[str]:
    return [line for line in processes() if "troupe.actors.learner.rank_process" in line]


HOSTED: dict[str, Any] = ADAPTER | {
    "schedule__generator": "process",
    "schedule__generator_processes": 2,
    "schedule__parts": 2,
    "metrics__sinks": ["jsonl", "sqlite", "trace"],
}
"""Of several ranks two decode, each on what it has learned."""


@pytest.mark.parametrize(
    "settings",
    [WHOLE, pytest.param(ADAPTER, marks=pytest.mark.soak), pytest.param(HOSTED, marks=pytest.mark.soak)],
    ids=["whole", "adapter", "hosted"],
)
def test_one_two_and_four_ranks_make_the_same_run(tmp_path: Path, settings: dict[str, Any]) -> None:
    one = made(tmp_path, "one", settings, 1)
    for ranks in (2, 4):
        out = made(tmp_path, f"ranks-{ranks}", settings, ranks)
        check_same(out, one)
        if settings is HOSTED:
            decoded = [(name, pid) for name, pid in spans(out) if name == "decode"]
            assert len(set(decoded)) == 2
            assert "write weights" not in [name for name, _ in spans(out)]
    assert ranks_alive() == []


def test_ranks_that_are_killed_and_stopped_end_the_run_and_others_go_on_with_it(tmp_path: Path) -> None:
    """With another number of ranks at each start."""
    whole = made(tmp_path, "whole", LANES, 1)
    folder, out, dice = tmp_path / "harmed", tmp_path / "harmed" / "out", random.Random(7)
    for start, harm in enumerate([signal.SIGKILL, signal.SIGSTOP, signal.SIGKILL, signal.SIGSTOP]):
        config = write_run(folder, **LANES, schedule__learner_ranks=(4, 2)[start % 2])
        trainer, before = Trainer(config, out), newest_step(out)
        assert trainer.wait_until(lambda before=before: newest_step(out) > before)  # type: ignore[misc]
        time.sleep(dice.random() * 0.2)
        own = [line.split() for line in ranks_alive()]
        pids = [int(pid) for parent, pid, *_ in own if int(parent) == trainer.process.pid]
        assert len(pids) == (3, 1)[start % 2]
        os.kill(dice.choice(pids), harm)
        assert trainer.wait(60.0) == 3
        assert ranks_alive() == []
    assert "not heard of for 3 s" in (folder / "log.txt").read_text()
    config = write_run(folder, **LANES, schedule__learner_ranks=1)
    assert Trainer(config, out).wait() == 0
    check_same(out, whole)
    assert {kind for kind, _ in incidents(out)} == {"rank_lost"}


@pytest.mark.soak
def test_a_daemon_goes_on_with_a_run_that_has_lost_a_rank(tmp_path: Path) -> None:
    pauses = {"daemon__first_pause_s": 0.05, "daemon__longest_pause_s": 0.05}
    whole = made(tmp_path, "whole", LANES | pauses, 1)
    config = write_run(tmp_path, **LANES, **pauses, schedule__learner_ranks=2)
    out, log = tmp_path / "out", tmp_path / "daemon.txt"
    with log.open("ab") as file:
        command = [sys.executable, "-m", "troupe", "daemon", str(config), "-o", str(out)]
        daemon = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        for harm, step in ((signal.SIGKILL, 6), (signal.SIGSTOP, 14)):
            until_s = time.monotonic() + 90.0
            while newest_step(out) < step or not ranks_alive():
                assert daemon.poll() is None
                assert time.monotonic() < until_s
                time.sleep(0.005)
            os.kill(int(ranks_alive()[0].split()[1]), harm)
        assert daemon.wait(120) == 0, log.read_text()[-4000:]
    finally:
        if daemon.poll() is None:
            daemon.kill()
            daemon.wait()
    assert summary(out).complete
    assert summary(out).steps == STEPS
    check_same(out, whole)
    assert ranks_alive() == []
