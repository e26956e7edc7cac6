"""kill -9 amid episodes, again and again: the run comes to the same weights, no answer that was recorded is asked for
again, every group ends once, and nobody is left behind."""

from __future__ import annotations

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
import tomli_w

from tests.support.fakes import same_bits, write_prompts
from tests.support.games import acting, calls, write_player
from tests.support.kills import processes
from tests.support.runs import in_store, policy_of
from troupe.records.store.answers import stored_answers

pytestmark = [pytest.mark.slow, pytest.mark.no_cover]

STEPS = 16
REWARD = """
def shares(completion_ids, **_):
    return [sum(ids) % 13 / 13 for ids in completion_ids]
"""


def write_run(folder: Path, **settings: Any) -> Path:
    (folder / "rewards.py").write_text(REWARD)
    table: dict[str, Any] = {
        "model": {"path": str(write_player(folder / "player"))},
        "data": {"path": str(write_prompts(folder / "prompts.json"))},
        "generation": {"num_generations": 3},
        "rewards": {"functions": ["rewards.py:shares"]},
        "learner": {"lr": 1e-2, "batch_size": 2, "max_steps": STEPS},
        "schedule": {"max_staleness": 1, "blas_threads": 1},
        "checkpoint": {"every": 3, "keep": 2},
        "metrics": {"sinks": ["jsonl", "sqlite"]},
    }
    for name, value in acting(folder, **settings).items():
        section, _, key = name.partition("__")
        table.setdefault(section, {})[key] = value
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps(table))
    return path


def start(config: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "troupe", "train", str(config), "-o", str(out), "--resume"]
    environment = {**os.environ, "GAME_DELAY_S": "0.05"}
    with (config.parent / "log.txt").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def log_of(config: Path) -> str:
    return (config.parent / "log.txt").read_text()[-4000:]


@pytest.mark.parametrize("kills", [8, pytest.param(20, marks=pytest.mark.soak)])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"environment__run": "thread"}, id="threads"),
        pytest.param({"environment__run": "process", "environment__processes": 2}, id="processes"),
    ],
)
def test_kills_amid_episodes(tmp_path: Path, settings: dict[str, Any], kills: int) -> None:
    (tmp_path / "straight").mkdir()
    (tmp_path / "killed").mkdir()
    straight = write_run(tmp_path / "straight")
    assert start(straight, tmp_path / "straight" / "run").wait(240) == 0, log_of(straight)
    config, out = write_run(tmp_path / "killed", **settings), tmp_path / "killed" / "run"
    once = {call for call, times in calls(straight.parent).items() if times == 1}
    dice, killed, recorded = random.Random(7), 0, set[str]()
    while killed < kills:
        made = calls(config.parent)
        process = start(config, out)
        while process.poll() is None and calls(config.parent) == made:
            time.sleep(0.01)
        time.sleep(dice.random() * 0.4)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1
        repeated = recorded & once & (calls(config.parent) - made).keys()
        assert not repeated, repeated
        recorded |= known(out)
        nobody_is_left()
    assert start(config, out).wait(240) == 0, log_of(config)
    assert same_bits(policy_of(out), policy_of(tmp_path / "straight" / "run"))
    ends = [gid for (gid,) in in_store(out, "SELECT gid FROM groups")]
    assert len(ends) == len(set(ends)) == STEPS * 2
    needed, took = calls(straight.parent).total(), calls(config.parent).total()
    print(f"{killed} kills, {len(recorded)} answers seen recorded amid it, {took} calls where {needed} were needed")
    assert killed == kills
    assert took > needed, "no kill came amid a call"


def known(out: Path) -> set[str]:
    """The calls whose answers are recorded."""
    answers = stored_answers(out / "run.sqlite", 0)
    return {json.dumps(each.answer.info["call"]) for each in answers if "call" in each.answer.info}


def nobody_is_left() -> None:
    deadline_s = time.monotonic() + 10.0
    names = ("troupe.actors.generator.process", "troupe.environments.processes")
    while left := [line for line in processes() if any(name in line for name in names) and " 1 " in line[:16]]:
        assert time.monotonic() < deadline_s, left
        time.sleep(0.05)
