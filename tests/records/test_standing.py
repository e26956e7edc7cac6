"""What a folder says of a run that does not answer."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import msgspec
import pytest

from troupe.errors import InputError
from troupe.records.standing import Standing, describe_standing, read_standing
from troupe.runtime.lock import LOCK, Owner, RunLock, process_identity


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder in which nothing has happened yet."""
    (tmp_path / "run.toml").write_text("")
    return tmp_path


def add_checkpoint(run: Path, step: int, *, whole: bool = True) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    if whole:
        (folder / "MANIFEST.json").write_text("{}")


def add_summary(run: Path, steps: int, total_steps: int) -> None:
    (run / "summary.json").write_text(json.dumps({"steps": steps, "total_steps": total_steps, "version": steps}))


def dead_owner(run: Path, host: str | None = None) -> int:
    """Somebody who has died holding the lock."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    owner = Owner(pid=dead.pid, host=host or os.uname().nodename, started=0.0)
    (run / LOCK).write_bytes(msgspec.json.encode(owner))
    return dead.pid


def test_a_run_that_has_not_begun(run: Path) -> None:
    found = read_standing(run)
    assert found == Standing(folder=str(run), fate="not begun", step=0, total_steps=None, checkpoint=None)
    assert describe_standing(found) == (
        f"no step is done yet, and nobody is at it; go on with: troupe train -o {run} --resume"
    )


@pytest.mark.parametrize(
    ("step", "fate", "described"),
    [
        (100, "complete", "complete: 100 of 100 steps"),
        (40, "ended", "ended after step 40 of 100; go on with: troupe train -o RUN --resume"),
    ],
)
def test_a_run_that_has_a_summary(run: Path, step: int, fate: str, described: str) -> None:
    add_checkpoint(run, step)
    add_summary(run, step, 100)
    found = read_standing(run)
    assert (found.fate, found.step, found.total_steps, found.checkpoint) == (fate, step, 100, f"step-{step:08d}")
    assert describe_standing(found) == described.replace("RUN", str(run))


def test_a_run_that_got_no_better_is_over_before_its_last_step(run: Path) -> None:
    add_checkpoint(run, 40)
    why = "eval/sums/accuracy was 0.5 at best"
    (run / "summary.json").write_text(json.dumps({"steps": 40, "total_steps": 100, "stopped_early": why}))
    found = read_standing(run)
    assert (found.fate, found.step) == ("complete", 40)
    assert describe_standing(found) == f"complete: 40 of 100 steps; it ended early: {why}"


def test_a_run_that_a_daemon_kept_is_gone_on_with_by_one(run: Path) -> None:
    (run / "daemon.log").write_text("")
    add_checkpoint(run, 40)
    add_summary(run, 40, 100)
    assert describe_standing(read_standing(run)) == f"ended after step 40 of 100; go on with: troupe daemon {run}"


def test_a_run_that_was_killed(run: Path) -> None:
    pid = dead_owner(run)
    add_checkpoint(run, 10)
    add_checkpoint(run, 20)
    add_checkpoint(run, 30, whole=False)
    (run / "checkpoints" / ".tmp-step-00000040").mkdir()
    found = read_standing(run)
    assert (found.fate, found.step, found.checkpoint, found.pid) == ("cut off", 20, "step-00000020", pid)
    assert describe_standing(found).startswith("cut off; newest checkpoint: step-00000020; go on with")


def test_one_that_was_killed_before_its_first_checkpoint(run: Path) -> None:
    (run / "metrics.jsonl").write_text("{}\n")
    assert describe_standing(read_standing(run)).startswith("cut off; newest checkpoint: none yet;")


def test_a_summary_of_an_earlier_start_does_not_count(run: Path) -> None:
    add_summary(run, 40, 100)
    add_checkpoint(run, 60)
    found = read_standing(run)
    assert (found.fate, found.step, found.total_steps) == ("cut off", 60, 100)


def test_a_live_run_that_does_not_answer(run: Path) -> None:
    lock = RunLock(run)
    lock.take()
    found = read_standing(run)
    lock.release()
    assert (found.fate, found.pid) == ("playing", os.getpid())
    assert f"process {os.getpid()} runs here, but does not answer" in describe_standing(found)


def test_on_another_machine_it_may_be_live(run: Path) -> None:
    dead_owner(run, host="elsewhere")
    assert read_standing(run).fate == "playing"


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"steps": "x", "total_steps": 3}'])
def test_a_damaged_summary_says_nothing(run: Path, text: str) -> None:
    (run / "summary.json").write_text(text)
    assert read_standing(run).fate == "not begun"


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        read_standing(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no run\.toml"):
        read_standing(tmp_path)


def test_a_folder_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_standing(tmp_path / ("a" * 300))


def test_a_run_whose_guardian_says_why_it_does_not_answer(run: Path) -> None:
    lock = RunLock(run)
    lock.take()
    add_checkpoint(run, 5)
    told = {"pid": os.getpid(), "name": "kind", "reason": "the reward kind holds Python's lock", "since": 0.0}
    (run / "control.silent").write_text(json.dumps(told))
    found = read_standing(run)
    assert (found.fate, found.checkpoint) == ("silent", "step-00000005")
    said = describe_standing(found)
    assert said.startswith("not answering for ")
    assert (
        "the reward kind holds Python's lock; newest checkpoint: step-00000005; wait, or end it"
        in describe_standing(found)
    )
    assert f"troupe stop {run} --kill" in said
    (run / "control.silent").write_text(json.dumps({**told, "pid": 1}))
    assert read_standing(run).fate == "playing", "it was said of another one"
    lock.release()


def test_who_has_died_and_is_not_buried_runs_nothing(run: Path) -> None:
    dead = subprocess.Popen(["true"])
    owner = Owner(pid=dead.pid, host=os.uname().nodename, started=0.0, process=process_identity(dead.pid))
    until_s = time.monotonic() + 30.0
    while owner.is_alive:
        assert time.monotonic() < until_s
        time.sleep(0.001)
    (run / LOCK).write_bytes(msgspec.json.encode(owner))
    assert read_standing(run).fate == "cut off"
    dead.wait()
    assert Owner(pid=os.getpid(), host=os.uname().nodename, started=0.0).is_alive
