"""Whole runs in which a call holds Python's lock, or nobody reads what is printed."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.fakes import write_prompts, write_ragged_model
from troupe.checkpoint import list_checkpoints
from troupe.runtime.guardian import SILENT

pytestmark = [pytest.mark.slow, pytest.mark.alone]

REWARDS = """
import os, re, sys, time
from pathlib import Path

def kind(completions, trainer_state, **columns):
    if trainer_state.global_step >= 3 and Path("hangs").exists():
        re.match(r"(a+)+$", "a" * 40 + "b")
    return [float(len(text) % 3) for text in completions]

def loud(completions, **columns):
    for _ in range(3000):
        print("y" * 100)
    return [float(len(text) % 3) for text in completions]

def slow(completions, **columns):
    print("printed by a reward")
    sys.stderr.write("and to stderr\\n")
    time.sleep(0.5)
    return [float(len(text) % 3) for text in completions]
"""
CONFIG = """
[model]
path = "m"
[data]
path = "p.json"
[generation]
num_generations = 2
max_completion_length = 4
[rewards]
functions = ["rewards.py:kind"]
[learner]
batch_size = 2
max_steps = 6
[checkpoint]
every = 1
overlap = false
[daemon]
first_pause_s = 0.1
"""
PLACE = "the reward kind (rewards.py:7) holds Python's lock"


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.fspath(Path(__file__).parents[3]))
    write_ragged_model(tmp_path / "m")
    write_prompts(tmp_path / "p.json")
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "run.toml").write_text(CONFIG)
    (tmp_path / "hangs").touch()
    return tmp_path


def troupe(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "troupe", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said(*arguments: str) -> str:
    with troupe(*arguments) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def wait_for(there: Callable[[], object]) -> None:
    until_s = time.monotonic() + 120.0
    while not there():
        assert time.monotonic() < until_s
        time.sleep(0.05)


def check_that_it_goes_on(workplace: Path, by: str = "train") -> None:
    """From the newest checkpoint before the hang; that of the step just before it may have been under way."""
    newest = list_checkpoints(workplace / "o")[0].name
    assert newest in ("step-00000002", "step-00000003")
    assert said("status", "o").startswith(f"o: cut off; newest checkpoint: {newest}; go on with: troupe {by}")
    (workplace / "hangs").unlink()
    out = said("train", "-o", "o", "--resume")
    assert f"going on after step {int(newest[5:])}" in out
    assert "6 of 6 steps" in out


def test_the_third_signal_ends_a_run_that_hangs_and_it_goes_on_later(workplace: Path) -> None:
    with troupe("train", "run.toml", "-o", "o") as run:
        wait_for((workplace / "o" / SILENT).exists)
        status = said("status", "o")
        assert status.startswith("o: not answering for ")
        assert PLACE in status
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            run.send_signal(number)
            time.sleep(0.1)
        began_s = time.monotonic()
        _, err = run.communicate(timeout=60)
    assert run.returncode == -signal.SIGKILL
    assert time.monotonic() - began_s < 15
    assert f"troupe: ended without saving (signal 3): {PLACE}" in err
    assert "go on from the last checkpoint with: troupe train -o " in err
    check_that_it_goes_on(workplace)


def test_a_run_that_hangs_is_ended_after_a_while_or_on_request(workplace: Path) -> None:
    with troupe("train", "run.toml", "-o", "o", "--set", "daemon.kill_after_s=8") as run:
        _, err = run.communicate(timeout=120)
    assert run.returncode == -signal.SIGKILL
    assert f"ended without saving (daemon.kill_after_s = 8): {PLACE}" in err
    with troupe("train", "-o", "o", "--resume", "--set", "daemon.kill_after_s=0") as run:
        wait_for((workplace / "o" / SILENT).exists)
        assert "was killed, not answering for " in said("stop", "o", "--kill")
        assert run.wait(60) == -signal.SIGKILL
        run.communicate()
    check_that_it_goes_on(workplace)


def test_a_daemon_does_not_try_the_same_hang_over_and_over(workplace: Path) -> None:
    with troupe("daemon", "run.toml", "-o", "o", "--set", "daemon.kill_after_s=10") as daemon:
        wait_for((workplace / "o" / SILENT).exists)
        status = said("status", "o")
        assert status.startswith("o: running, step 3 of 6")
        assert PLACE in status
        _, err = daemon.communicate(timeout=120)
    assert daemon.returncode == 3
    assert err.count("trainer started") == 2
    assert f"given up: {PLACE}" in err
    check_that_it_goes_on(workplace, "daemon")


@pytest.mark.parametrize("run", ["auto", "process"])
def test_a_run_whose_output_nobody_reads_comes_to_its_end(workplace: Path, run: str) -> None:
    arguments = ["--reward", "rewards.py:loud", "--set", f'rewards.run=["{run}"]']
    with troupe("train", "run.toml", "-o", "o", *arguments) as process:
        assert process.wait(120) == 0
    assert json.loads((workplace / "o" / "summary.json").read_text())["steps"] == 6


def test_a_terminal_shows_at_once_that_ctrl_c_was_heard(workplace: Path) -> None:
    """And what rewards print stays whole above the display."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ["TERM"] = "xterm-256color"
        arguments = ["run.toml", "-o", "o", "--reward", "rewards.py:slow", "--max-steps", "60"]
        os.execv(sys.executable, [sys.executable, "-m", "troupe", "train", *arguments])
    read, pressed_s, until_s = b"", None, time.monotonic() + 120.0
    try:
        while time.monotonic() < until_s and select.select([terminal], [], [], 60.0)[0]:
            try:
                read += os.read(terminal, 65536)
            except OSError:
                break
            if pressed_s is None and b"printed by a reward" in read:
                os.write(terminal, b"\x03")
                pressed_s = time.monotonic()
            if pressed_s is not None and b"Ctrl-C again stops now" in read:
                break
        shown_s = time.monotonic()
        assert b"finishing step" in read
        assert pressed_s is not None
        assert shown_s - pressed_s < 2.0
        assert b"printed by a reward\r\nand to stderr\r\n" in read
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(terminal)
