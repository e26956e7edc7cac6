"""The runs in a folder at a glance, whatever state they are in."""

from __future__ import annotations

import os
import platform
import socket
import time
from pathlib import Path

import msgspec
import pytest

from tests.records.compare.runs import evaluated
from tests.records.compare.runs import make_run as make_asked
from tests.records.report.folders import Clock, finish, make_run, write_steps
from troupe.cli.runs import show_runs
from troupe.errors import InputError
from troupe.records.compare.listing import ListedRun, find_runs, list_run


def listed(folder: Path) -> dict[str, ListedRun]:
    return {run.name: list_run(run, run.name) for run in find_runs(folder)}


def test_runs_are_found_below_and_not_within_each_other(tmp_path: Path) -> None:
    make_run(tmp_path / "a" / "seeds" / "one", 1)
    make_run(tmp_path / "b", 1)
    make_run(tmp_path / "b" / "checkpoints" / "step-1", 0)
    make_run(tmp_path / ".hidden", 0)
    (tmp_path / "empty").mkdir()
    assert [str(run.relative_to(tmp_path)) for run in find_runs(tmp_path)] == ["a/seeds/one", "b"]
    assert list(find_runs(tmp_path / "b")) == [tmp_path / "b"]
    with pytest.raises(InputError, match="no such folder"):
        list(find_runs(tmp_path / "nowhere"))


def test_what_a_finished_run_came_to(tmp_path: Path) -> None:
    make_run(tmp_path, 8, clock=Clock(1000.0))
    finish(tmp_path, 8, 8, accuracy_before=0.25, accuracy_after=0.75)
    run = list_run(tmp_path, "it")
    assert (run.state, run.step, run.total_steps, run.seed) == ("finished", 8, 8, 7)
    assert (run.model, run.data) == ("tiny <b>model", None)
    assert run.reward == (0.1, 0.8)
    assert (run.held_out_metric, run.held_out) == ("eval/held_out/accuracy", (0.25, 0.75))
    assert (run.began_unix_s, run.newest_unix_s, run.seconds) == (1010.0, 1090.0, 80.0)


def test_what_a_run_that_evaluates_came_to_and_what_ails_it(tmp_path: Path) -> None:
    asked = [evaluated(version, {"1+1=": (version / 4, 0.5)}) for version in (0, 1, 2)]
    make_asked(tmp_path / "it", [0.1, 0.2], evaluations=asked, metrics={"diagnosis/cut": 1.0, "diagnosis/kl": 0.0})
    run = list_run(tmp_path / "it", "it")
    assert run.state == "crashed", "its store says that it had begun"
    assert (run.held_out_metric, run.held_out) == ("eval/sums/avg@2", (0.25, 0.5))
    assert run.findings == ("cut",)


def test_where_there_is_a_teacher_its_divergence_is_told(tmp_path: Path) -> None:
    make_asked(tmp_path / "it", [0.1, 0.2], evaluations=[], metrics={"teacher/kl": 0.125})
    run = list_run(tmp_path / "it", "it")
    assert run.teacher_kl == (0.125, 0.125)
    assert any("0.125 → 0.125" in line for line in show_runs([run], 500, 0.0))
    without = ListedRun(name="a", folder="a", state="finished")
    assert ["teacher KL" in show_runs(runs, 500, 0.0)[0] for runs in ([run], [without])] == [True, False]


def test_time_between_two_starts_does_not_count(tmp_path: Path) -> None:
    make_run(tmp_path, 4, clock=Clock(1000.0))
    write_steps(tmp_path, 3, 6, clock=Clock(9000.0))  # steps 3 and 4 are made again
    assert list_run(tmp_path, "it").seconds == 20.0 + 40.0


def test_a_run_without_a_store_is_told_by_its_lines(tmp_path: Path) -> None:
    make_run(tmp_path, 5, store=False)
    run = list_run(tmp_path, "it")
    assert (run.step, run.reward, run.total_steps) == (5, (0.1, 0.5), 12)
    assert run.newest_unix_s == pytest.approx(time.time(), abs=60)


def test_states_and_locks(tmp_path: Path) -> None:
    for name in ("crashed", "stopped", "new", "killed", "running", "elsewhere"):
        make_run(tmp_path / name, 0 if name == "new" else 2)
    finish(tmp_path / "stopped", 2, 9)
    host = platform.node()
    for name, pid, on in (("killed", 2**22 + 1, host), ("running", os.getpid(), host), ("elsewhere", 7, "node-9")):
        lock = {"pid": pid, "host": on, "started": 1.0}
        (tmp_path / name / "run.lock").write_bytes(msgspec.json.encode(lock))
    found = listed(tmp_path)
    assert {name: run.state for name, run in found.items()} == {
        "crashed": "crashed",
        "stopped": "stopped",
        "new": "new",
        "killed": "crashed",
        "running": "running",
        "elsewhere": "running",
    }
    assert found["killed"].note == f"process {2**22 + 1} died and left its lock"
    assert "node-9" in found["elsewhere"].note
    assert not found["running"].note


@pytest.mark.parametrize("file", ["run.toml", "run.sqlite", "metrics.jsonl", "summary.json"])
def test_damage_is_told_and_stops_nothing(tmp_path: Path, file: str) -> None:
    make_run(tmp_path, 3)
    finish(tmp_path, 3, 12)
    (tmp_path / file).write_bytes(b"\xff\x00not what it was" * 300)
    run = list_run(tmp_path, "it")
    assert (file in run.note) == (file in ("run.toml", "run.sqlite"))
    assert run.reward == (0.1, 0.3), "the other file tells it"


def test_a_folder_that_is_no_run_any_more_is_one_line(tmp_path: Path) -> None:
    run = list_run(tmp_path / "gone", "it")
    assert run.state is None
    assert "no such folder" in run.note
    (tmp_path / "control.sock").touch()
    with socket.socket(socket.AF_UNIX) as odd:
        odd.bind(str(tmp_path / "run.toml"))
        assert list_run(tmp_path, "it").state is None
