"""The sink of run.sqlite: when it writes, what it keeps when it cannot, damage while it is at work."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest

from tests.support.stored import closed, rows, update, write_step
from troupe.errors import OutputError
from troupe.messages import CheckpointWritten, Incident
from troupe.records.sinks.base import DurableSink
from troupe.records.sinks.sqlite import SqliteSink
from troupe.records.store.format import DamagedStoreError, StepRows
from troupe.records.store.write import StoreWriter

INCIDENT = Incident(actor="scorer", kind="reward_timeout", message="late", gid=3)


def opened(path: Path, first_step: int = 0, **settings: Any) -> SqliteSink:
    sink = SqliteSink(path, first_step=first_step, program="0.9", clock=lambda: 50.0, **settings)
    sink.open()
    return sink


def test_a_step_is_there_when_its_update_was_flushed_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    sink = opened(path)
    assert isinstance(sink, DurableSink)
    sink.write(closed(1, 0))
    sink.write(INCIDENT)
    sink.write(closed(1, 1))
    sink.flush()
    assert rows(path, "SELECT count(*) FROM groups") == [0]
    assert rows(path, "SELECT * FROM incidents") == [(1, 0, 50.0, "scorer", "reward_timeout", "late", 3)]
    sink.write(update(1, reward=0.5))
    sink.write(closed(2, 0))
    sink.flush()
    assert rows(path, "SELECT gid, step FROM groups") == [(0, 1), (1, 1)]
    assert rows(path, "SELECT metrics FROM steps") == ['{"reward":0.5}']
    sink.write(INCIDENT)
    sink.write(CheckpointWritten(version=1, folder="checkpoints/step-00000001", bytes=77, seconds=0.5))
    sink.flush()
    assert rows(path, "SELECT step FROM incidents") == [0, 1]
    assert rows(path, "SELECT version, bytes, removed_at FROM checkpoints") == [(1, 77, None)]
    sink.write(CheckpointWritten(version=2, folder="c", bytes=78, seconds=0.5, removed=(1,)))
    sink.flush()
    assert rows(path, "SELECT version, removed_at FROM checkpoints") == [(1, 50.0), (2, None)]
    sink.settle()
    assert rows(path, "SELECT settled, troupe FROM starts") == [(1, "0.9")]
    sink.close()
    sink.close()
    sink.write(update(2))
    sink.flush()  # after the end: nothing
    assert rows(path, "SELECT step FROM steps") == [1]
    assert list(tmp_path.iterdir()) == [path], "nothing temporary is left"


def test_closing_what_was_never_opened(tmp_path: Path) -> None:
    sink = SqliteSink(tmp_path / "run.sqlite")
    sink.settle()
    sink.close()
    assert list(tmp_path.iterdir()) == []


def test_over_resumes_every_completion_stands_once(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    for first_step, last in ((0, 4), (2, 5), (5, 6), (0, 1)):
        sink = opened(path, first_step)
        for step in range(first_step + 1, last + 1):
            write_step(sink, step)
        sink.close()
        counts = rows(path, "SELECT step, count(*) FROM completions GROUP BY step")
        assert counts == [(step, 6) for step in range(1, last + 1)]
    assert rows(path, "SELECT first_step FROM starts") == [0, 2, 5, 0]


def test_what_a_failing_disk_does_not_take_comes_with_the_next_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.sqlite"
    sink = opened(path)
    write_step(sink, 1)

    def full(_: StoreWriter, rows: StepRows) -> None:
        raise OSError("disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "add_step", full)
        for step in (2, 3):
            with pytest.raises(OSError, match="disk is full"):
                write_step(sink, step)
        sink.write(INCIDENT)
    sink.settle()  # nothing is open: nothing to settle
    sink.flush()
    assert rows(path, "SELECT step, count(*) FROM completions GROUP BY step") == [(1, 6), (2, 6), (3, 6)]
    assert rows(path, "SELECT step, start FROM incidents") == [(3, 1)]
    assert rows(path, "SELECT count(*) FROM starts") == [1]
    sink.close()


def test_a_disk_without_room(tmp_path: Path) -> None:
    """A real one, as far as SQLite and the system can tell: no file may grow beyond a size."""
    path = tmp_path / "run.sqlite"
    sink = opened(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    failures = 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (280_000, hard))
    try:
        for step in range(1, 151):
            try:
                write_step(sink, step)
            except OSError:
                failures += 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert failures > 10
    there = rows(path, "SELECT step FROM steps")
    assert 0 < len(there) < 150
    sink.flush()
    sink.close()
    assert rows(path, "SELECT step, count(*) FROM completions GROUP BY step") == [(step, 6) for step in range(1, 151)]
    assert rows(path, "PRAGMA integrity_check") == ["ok"]
    assert list(sink.notes) == []


def test_a_folder_that_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "mounted"
    sink = SqliteSink(folder / "run.sqlite", first_step=0)
    with pytest.raises(OSError, match="unable to open database file"):
        sink.open()
    sink.write(closed(1, 0))
    sink.write(update(1))
    folder.mkdir()
    sink.flush()
    sink.close()
    assert rows(folder / "run.sqlite", "SELECT step, count(*) FROM completions") == [(1, 3)]


def test_settling_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = opened(tmp_path / "run.sqlite")
    write_step(sink, 1)

    def fail(_: StoreWriter, step: int) -> None:
        raise DamagedStoreError("malformed")

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "settle", fail)
        with pytest.raises(OSError, match="malformed"):
            sink.settle()
    write_step(sink, 2)
    sink.settle()
    sink.close()
    assert rows(tmp_path / "run.sqlite", "SELECT settled FROM starts") == [2]


def test_a_damaged_file_is_set_aside_and_the_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    path.write_bytes(b"not a database" * 99)
    sink = opened(path, first_step=7)
    write_step(sink, 8)
    sink.close()
    [note] = sink.notes
    assert note.kind == "store_damaged"
    assert note.message == (
        f"{path} is damaged (file is not a database) and was set aside as run.damaged-1.sqlite; a new one is begun, "
        "without the steps before"
    )
    assert (tmp_path / "run.damaged-1.sqlite").read_bytes() == b"not a database" * 99
    assert rows(path, "SELECT step FROM steps") == [8]
    assert rows(path, "SELECT start, first_step FROM starts") == [(1, 7)]


def test_damage_that_shows_while_it_writes(tmp_path: Path) -> None:
    class Malformed(StoreWriter):
        tries = 0

        def add_step(self, rows: StepRows) -> None:
            Malformed.tries += 1
            if Malformed.tries == 2:
                raise DamagedStoreError("database disk image is malformed")
            super().add_step(rows)

    path = tmp_path / "run.sqlite"
    sink = opened(path, make_store=Malformed)
    write_step(sink, 1)
    write_step(sink, 2)
    sink.close()
    assert [note.kind for note in sink.notes] == ["store_damaged"]
    assert rows(path, "SELECT step, count(*) FROM completions GROUP BY step") == [(2, 6)]
    assert rows(path, "SELECT start FROM starts") == [1]
    assert rows(tmp_path / "run.damaged-1.sqlite", "SELECT step FROM steps") == [1]


def test_a_newer_store_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    opened(path).close()
    rows(path, "PRAGMA user_version = 9")
    with pytest.raises(OutputError, match="format 9"):
        opened(path)
    assert rows(path, "PRAGMA user_version") == [9]
