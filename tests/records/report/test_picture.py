"""What is read of a run folder: finished, cut off, resumed, running, without a store, damaged, empty."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.records.report.folders import Clock, finish, make_run, metrics_of, tell, write_steps
from tests.support.stored import write_step
from troupe.errors import InputError
from troupe.messages import NOT_STARTED, CheckpointWritten, Incident, Restarting, Status
from troupe.records.layout import STORE
from troupe.records.report import picture as read
from troupe.records.report.picture import RunPicture, read_run
from troupe.records.sinks.sqlite import SqliteSink
from troupe.records.standing import Change
from troupe.runtime.lock import RunLock


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_run_that_was_cut_off(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path, 5))
    assert (run.state, run.step, run.total_steps) == ("crashed", 5, 12)  # 3 epochs of 4 steps
    assert "go on with: troupe train" in run.told
    assert run.metrics.steps == (1, 2, 3, 4, 5)
    assert run.metrics.curves["reward"].mean == (0.1, 0.2, 0.3, 0.4, 0.5)
    assert run.metrics.curves["rewards/style/mean"].mean[1] is None
    assert (run.values("reward"), run.values("nothing")) == ([0.1, 0.2, 0.3, 0.4, 0.5], [])
    assert run.tokens == 500.0
    assert run.metrics.sums.seconds == 10.0
    assert run.metrics.sums.sampled == 2.0 * 10 * (1 + 2 + 3 + 4 + 5)
    assert run.config["learner"]["lr"] == 1e-6
    assert run.stored.machines == {1: "node-7, 4 processors"}
    assert run.notes == ()


def test_a_finished_run(tmp_path: Path) -> None:
    make_run(tmp_path, 5)
    finish(tmp_path, 5, 5, accuracy_before=0.25, accuracy_after=0.5, rewards_after={"r": 0.75})
    run = read_run(tmp_path)
    assert (run.state, run.step, run.total_steps) == ("finished", 5, 5)
    [(_, held_out)] = run.held_out.items()
    told = {name: [(point.version, point.value) for point in points] for name, points in held_out.figures.items()}
    assert told == {"accuracy": [(0, 0.25), (5, 0.5)], "r": [(5, 0.75)]}


@pytest.mark.parametrize(("steps", "scores"), [(3, 0), (5, 1)])
def test_a_run_that_was_asked_to_end_has_the_scores_of_its_newest_start(
    tmp_path: Path, steps: int, scores: int
) -> None:
    finish(make_run(tmp_path, 5), steps, 9, accuracy_after=0.5)
    run = read_run(tmp_path)
    assert (run.state, run.step, run.total_steps, len(run.held_out)) == ("stopped", 5, 9, scores)


def test_max_steps_tell_how_long_a_run_is(tmp_path: Path) -> None:
    make_run(tmp_path, 2)
    with (tmp_path / "run.toml").open("a") as file:
        file.write("max_steps = 40\n")
    assert read_run(tmp_path).total_steps == 40


def test_a_run_resumed_twice(tmp_path: Path) -> None:
    make_run(tmp_path, 4, clock=Clock(0.0))
    write_steps(tmp_path, 3, 6, clock=Clock(10_000.0))
    write_steps(tmp_path, 7, 8, clock=Clock(20_000.0))
    run = read_run(tmp_path)
    assert [(start.start, start.first_step) for start in run.stored.starts] == [(1, 0), (2, 2), (3, 6)]
    assert run.metrics.steps == tuple(range(1, 9))
    assert run.metrics.curves["reward"].mean == tuple(step / 10 for step in range(1, 9))
    assert run.seconds == 20.0 + 40.0 + 20.0  # the first start's steps 3 and 4 were made again
    assert run.stored.newest_unix_s == 20_030.0


def test_samples_are_those_of_the_first_and_the_newest_step(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path, 3))
    assert [samples.step for samples in run.stored.samples] == [1, 3]
    for samples in run.stored.samples:
        best, worst, other = (samples.completions[name] for name in ("best", "worst", "random"))
        assert best.reward == 2.0
        assert worst.reward == 0.2 if samples.step == 1 else worst.reward == 0.5
        assert (other.gid, other.sample) not in {(best.gid, best.sample), (worst.gid, worst.sample)}
        assert {best.step, worst.step, other.step} == {samples.step}


def test_one_step_is_shown_once(tmp_path: Path) -> None:
    assert [samples.step for samples in read_run(make_run(tmp_path, 1)).stored.samples] == [1]


def test_incidents_and_checkpoints(tmp_path: Path) -> None:
    make_run(tmp_path, 2)
    late = [Incident(actor="scorer", kind="late", message=f"late {i}", gid=i) for i in range(read.INCIDENTS_SHOWN + 3)]
    written = [
        CheckpointWritten(version=1, folder=str(tmp_path), bytes=10, seconds=0.5),
        CheckpointWritten(version=2, folder=str(tmp_path), bytes=20, seconds=0.25, removed=(1,)),
    ]
    tell(tmp_path, *late, Incident(actor="learner", kind="odd", message="!"), *written, first_step=2)
    run = read_run(tmp_path)
    assert run.incidents == {"late": read.INCIDENTS_SHOWN + 3, "odd": 1}
    assert len(run.stored.incidents) == read.INCIDENTS_SHOWN
    newest, before = run.stored.incidents[:2]
    assert (newest.kind, newest.start, newest.step, newest.gid) == ("odd", 2, 2, None)
    assert (before.actor, before.message, before.gid) == ("scorer", f"late {len(late) - 1}", len(late) - 1)
    assert [(found.version, found.bytes) for found in run.stored.checkpoints] == [(2, 20)]


def test_incidents_that_are_alike_take_one_line(tmp_path: Path) -> None:
    make_run(tmp_path, 2)
    refused = Incident(actor="scorer", kind="reward_error", message="refused")
    tell(tmp_path, *[refused] * 400, Incident(actor="learner", kind="odd", message="!"), refused, first_step=2)
    run = read_run(tmp_path)
    assert run.incidents == {"reward_error": 401, "odd": 1}
    assert [(found.kind, found.times) for found in run.stored.incidents] == [("reward_error", 401), ("odd", 1)]
    assert run.stored.overview is not None
    assert run.stored.overview.newest_incidents == {"reward_error": "refused", "odd": "!"}


class Jumping(Clock):
    """A clock that is set when it is looked at for the n-th time."""

    def __init__(self, at: int, by_s: float) -> None:
        super().__init__(1e9)
        self._at, self._by_s, self._looks = at, by_s, 0

    def __call__(self) -> float:
        self._looks += 1
        self.now_s += self._by_s if self._looks == self._at else 0.0
        return super().__call__()


@pytest.mark.parametrize("by_s", [1e9, -1e8, 36_000.0, -3600.0])
@pytest.mark.parametrize("at", [2, 4])
def test_a_clock_that_was_set_changes_no_duration(tmp_path: Path, by_s: float, at: int) -> None:
    """A start and five steps, 10 s from one to the next; the step that the clock was set in measured 2 s."""
    run = read_run(make_run(tmp_path, 5, clock=Jumping(at, by_s)))
    if at == 2 and by_s == 36_000.0:
        assert run.seconds == 36_050.0, "a start may take so long"
        return
    assert run.seconds == 4 * 10.0 + 2.0
    [note] = [note for note in run.notes if "the clock went" in note]
    way, much = "on" if by_s > 0 else "back", f"{abs(by_s + 8.0) / 3600:,.1f} h"
    assert note.startswith(f"Before step {at - 1} the clock went {way} by {much if abs(by_s) > 3600 else '60 min'}")


def test_a_clock_that_was_not_set_is_not_spoken_of(tmp_path: Path) -> None:
    assert read_run(make_run(tmp_path, 5)).notes == ()


def test_a_run_without_a_store(tmp_path: Path) -> None:
    make_run(tmp_path, 5, store=False)
    finish(tmp_path, 5, 5)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'[]\n{"no":1}\nnull\n{"step":"x"}\n\xff\xfe\n{"step":6,"rew')
    run = read_run(tmp_path)
    assert run.metrics.steps == (1, 2, 3, 4, 5)
    assert run.metrics.curves["reward"].mean == (0.1, 0.2, 0.3, 0.4, 0.5)
    assert (run.seconds, run.stored.newest_unix_s) == (10.0, None)
    assert (run.stored.starts, run.stored.checkpoints, run.stored.samples) == ((), (), ())
    assert run.incidents == {"late": 2}  # of the summary
    [note] = run.notes
    assert "no run.sqlite" in note


def test_the_store_and_the_lines_tell_the_same(tmp_path: Path) -> None:
    both = read_run(make_run(tmp_path / "both", 5))
    lines = read_run(make_run(tmp_path / "lines", 5, store=False))
    assert both.metrics == lines.metrics


@pytest.mark.parametrize("store", [True, False])
def test_a_run_that_has_just_begun(tmp_path: Path, store: bool) -> None:
    make_run(tmp_path, 0)
    if store:
        write_steps(tmp_path, 1, 0)
    run = read_run(tmp_path)
    assert (run.state, run.step, run.total_steps) == ("crashed" if store else "new", 0, None)
    assert (run.metrics.steps, run.stored.samples, run.seconds) == ((), (), None)


def test_a_store_that_was_begun_anew_gives_way_to_the_lines(tmp_path: Path) -> None:
    make_run(tmp_path, 4, store=False)
    sink = SqliteSink(tmp_path / STORE, first_step=2)
    sink.open()
    write_step(sink, 3)
    sink.close()
    run = read_run(tmp_path)
    assert run.metrics.steps == (1, 2, 3, 4)
    assert [samples.step for samples in run.stored.samples] == [3]


@pytest.mark.parametrize("damage", ["file", "row"])
def test_a_damaged_store_is_a_note(tmp_path: Path, damage: str) -> None:
    make_run(tmp_path, 3)
    if damage == "file":
        (tmp_path / STORE).write_bytes(b"no store " * 1000)
    else:
        import sqlite3

        connection = sqlite3.connect(tmp_path / STORE)
        connection.execute("UPDATE steps SET metrics = '[1' WHERE step = 2")
        connection.commit()
        connection.close()
    run = read_run(tmp_path)
    assert run.metrics.steps == (1, 2, 3)
    [note] = run.notes
    assert "damaged" in note
    assert (damage == "row") == ("step 2" in note)


def test_a_config_that_cannot_be_read_is_a_note(tmp_path: Path) -> None:
    make_run(tmp_path, 1)
    (tmp_path / "run.toml").write_text("seed = = 1")
    run = read_run(tmp_path)
    assert (run.config, run.config_text, len(run.notes)) == ({}, "", 1)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no run\.toml"):
        read_run(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        read_run(tmp_path / "nowhere")


def test_what_was_set_while_it_ran(tmp_path: Path) -> None:
    make_run(tmp_path, 1)
    (tmp_path / "changes.jsonl").write_bytes(b'{"step":3,"key":"learner.lr","value":1e-5}\n{"step":')
    assert read_run(tmp_path).changes == (Change(step=3, key="learner.lr", value=1e-5),)


@pytest.mark.parametrize("summary", ["", "[]", '{"incidents": 3}'])
def test_a_broken_summary_tells_nothing(tmp_path: Path, summary: str) -> None:
    make_run(tmp_path, 1)
    (tmp_path / "summary.json").write_text(summary)
    assert read_run(tmp_path).held_out == {}


def test_files_that_are_no_text_tell_nothing(tmp_path: Path) -> None:
    make_run(tmp_path, 1)
    (tmp_path / "summary.json").write_bytes(b'{"steps": 1, "rewards_after": {"\xff": 1.0}}')
    deep = b'{"step": 3, "key": "seed", "value": ' + b"[" * 100_000
    whole = b'{"step": 4, "key": "learner.lr", "value": 1e-05}'
    (tmp_path / "changes.jsonl").write_bytes(b"\n".join([b'{"step": 3, "key": "\xff", "value": 1}', deep, whole]))
    run = read_run(tmp_path)
    assert (run.held_out, run.changes) == ({}, (Change(step=4, key="learner.lr", value=1e-5),))


def test_a_step_that_nobody_can_count_to_is_left_out(tmp_path: Path) -> None:
    make_run(tmp_path, 2, store=False)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    garbage = [b'{"step": 1e308, "reward": 1.0}\n', b'{"step": -1, "reward": 1.0}\n', b"\x00\xff{\n"]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([lines[0], *garbage, lines[1], b'{"step": 3, "rew']))
    assert read_run(tmp_path).metrics.steps == (1, 2)


def test_reading_leaves_nothing_behind(tmp_path: Path) -> None:
    make_run(tmp_path, 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    read_run(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_is_read_while_it_is_written(tmp_path: Path) -> None:
    make_run(tmp_path, 0)
    lock = RunLock(tmp_path)
    lock.take()
    sink = SqliteSink(tmp_path / STORE, clock=Clock())
    sink.open()
    for step in range(1, 6):
        write_step(sink, step)
        run = read_run(tmp_path)
        assert (run.state, run.step, len(run.metrics.steps)) == ("running", step, step)
    sink.close()
    lock.release()
    assert files(tmp_path) == {"run.toml", STORE}


def status(**changes: Any) -> Status:
    return msgspec.structs.replace(NOT_STARTED, **{"phase": "running", "step": 4, "total_steps": 30, **changes})


def test_a_run_that_answers_says_itself_how_it_stands(tmp_path: Path) -> None:
    make_run(tmp_path, 3)
    run = read_run(tmp_path, status())
    assert (run.state, run.step, run.total_steps, run.told) == ("running", 4, 30, "running at step 4 of 30")
    run = read_run(tmp_path, status(phase="held", held=("a reward is down",), rewards_down={"judge": "no answer"}))
    assert (run.state, run.told) == ("held", "a reward is down; the reward judge is down: no answer")
    again = Restarting(attempt=2, limit=5, next_try_s=3.0, reason="it was killed")
    run = read_run(tmp_path, status(phase="restarting", restarting=again))
    assert run.state == "restarting"
    assert "attempt 2" in run.told
    assert "it was killed" in run.told


@pytest.mark.parametrize("phase", ["ended", "failed"])
def test_one_that_goes_away_is_seen_by_its_files(tmp_path: Path, phase: str) -> None:
    assert read_run(make_run(tmp_path, 3), status(phase=phase)).state == "crashed"


def test_a_long_run_has_few_points(tmp_path: Path) -> None:
    make_run(tmp_path, 0)
    with (tmp_path / "metrics.jsonl").open("wb") as file:
        for step in range(1, 2501):
            file.write(msgspec.json.encode({"step": step, "version": step, **metrics_of(step)}) + b"\n")
    run: RunPicture = read_run(tmp_path)
    assert run.metrics.steps_a_point == 3
    assert len(run.metrics.steps) == math.ceil(2500 / 3)
    assert run.step == run.metrics.steps[-1] == 2500
    assert run.metrics.curves["reward"].high[-1] == 250.0
    assert run.tokens == 250_000.0
    assert run.total_steps == 12
