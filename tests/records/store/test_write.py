"""The format of run.sqlite: what is stored of a step, whole steps only, resumes, damage."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.support.stored import closed, rows, update
from troupe.errors import OutputError
from troupe.messages import CheckpointWritten, GroupClosed, Incident, Slot
from troupe.records.store.format import (
    FORMAT,
    DamagedStoreError,
    checkpoint_statements,
    connect_to_read,
    group_rows,
    incident_statement,
    step_rows,
)
from troupe.records.store.text import json_text
from troupe.records.store.write import StoreWriter, check_store, set_aside


def writer(path: Path, first_step: int = 0, start: int | None = None, now_s: float = 1e9, **limits: Any) -> StoreWriter:
    return StoreWriter(path, first_step=first_step, start=start, program="1.2.3", clock=lambda: now_s, **limits)


def write_steps(store: StoreWriter, *steps: int) -> None:
    for step in steps:
        store.add_step(step_rows(update(step, reward=0.5), [group_rows(closed(step, j)) for j in range(2)], 7.0))


def test_a_completion_is_stored_with_all_that_is_known_of_it(tmp_path: Path) -> None:
    message = closed(3, 1, state="trained")
    assert message.scored is not None
    first, *others = message.scored.group.rollouts
    first = msgspec.structs.replace(first, versions=(1, 1, 2, *(2 for _ in first.versions[3:])), text="é\ud800")
    group = msgspec.structs.replace(message.scored.group, rollouts=(first, *others))
    scored = msgspec.structs.replace(
        message.scored, group=group, extra={"seen": (1, "two", None), "odd": (np.float32(0.5), {1, 2}, np.arange(2))}
    )
    with closing(writer(tmp_path / "run.sqlite")) as store:
        message = msgspec.structs.replace(message, scored=scored)
        store.add_step(step_rows(update(3, loss=0.5, nan=float("nan")), [group_rows(message, log_probs=True)], 12.5))
    path = tmp_path / "run.sqlite"
    assert rows(path, "SELECT step, start, version, time, metrics FROM steps") == [
        (3, 1, 3, 12.5, '{"loss":0.5,"nan":null}')
    ]
    assert rows(path, "SELECT * FROM groups") == [
        (message.gid, 3, 2, 1, 0, group.prompt.row, 0, "trained", '"prompt 5"', "{}")
    ]
    found = rows(path, "SELECT * FROM completions ORDER BY sample")
    assert [row[:3] for row in found] == [(message.gid, i, 3) for i in range(3)]
    assert [row[3] for row in found] == ["é?", others[0].text, others[1].text]
    ids = [tuple(np.frombuffer(row[4], dtype="<i4").tolist()) for row in found]
    assert ids == [rollout.token_ids for rollout in group.rollouts]
    assert json.loads(found[0][5]) == [[1, 2], [2, len(first.token_ids) - 2]][: 1 + (len(first.token_ids) > 2)]
    assert json.loads(found[1][5]) == [[2, len(others[0].token_ids)]]
    assert [row[6:9] for row in found] == [("stop", 0.5, 0.0), ("stop", None, 1.0), ("stop", 2.0, 2.0)]
    assert [row[9] for row in found] == ['{"r":0.25}', '{"r":null}', '{"r":1.0}']
    extras = [json.loads(row[10]) for row in found]
    assert extras == [{"seen": 1, "odd": 0.5}, {"seen": "two", "odd": [1, 2]}, {"seen": None, "odd": [0, 1]}]
    log_probs = [np.frombuffer(row[11], dtype="<f4") for row in found]
    assert all(
        np.array_equal(p, np.array(r.log_probs, dtype=np.float32))
        for p, r in zip(log_probs, group.rollouts, strict=True)
    )


def test_a_group_of_which_only_the_end_is_known_and_one_that_was_not_trained(tmp_path: Path) -> None:
    bare = GroupClosed(gid=4, slot=Slot(step=1, place=2, attempt=1), state="stale", version=2)
    other = closed(2, 0, state="quarantined")
    with closing(writer(tmp_path / "s")) as store:
        store.add_step(step_rows(update(2), [group_rows(bare), group_rows(other)], 0.0))
    assert rows(tmp_path / "s", "SELECT * FROM groups WHERE gid = 4") == [
        (4, 2, 1, 2, 1, None, None, "stale", None, None)
    ]
    assert rows(tmp_path / "s", "SELECT gid, advantage, log_probs FROM completions") == [(other.gid, None, None)] * 3


class Hostile:
    def __str__(self) -> str:
        raise RuntimeError("do not look at me")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": float("nan"), "b": [1, "x"]}, '{"a":null,"b":[1,"x"]}'),
        (2**70, str(2**70)),
        ("\ud800!", '"?!"'),
        ({"good": 1, "bad": "\udc00"}, '{"good":1,"bad":"?"}'),
        ({(1, 2): 3, 4: 5}, '{"(1, 2)":3,"4":5}'),
        (Hostile(), '"<Hostile>"'),
        ({"h": Hostile()}, '{"h":"<Hostile>"}'),
        (np.int64(3), "3"),
        (1 + 2j, '"(1+2j)"'),
    ],
)
def test_any_value_becomes_json(value: Any, text: str) -> None:
    assert json_text(value) == text
    json.loads(text)


def test_a_step_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    with closing(writer(path)) as store:
        write_steps(store, 1)
        broken = [group_rows(closed(2, 0)), group_rows(closed(2, 1))._replace(completions=[("too", "short")])]
        with pytest.raises(sqlite3.ProgrammingError):
            store.add_step(step_rows(update(2), broken, 0.0))
        assert rows(path, "SELECT DISTINCT step FROM groups") == [1]
        write_steps(store, 2, 2)  # it stands once, however often it is told
    assert rows(path, "SELECT step, count(*) FROM completions GROUP BY step") == [(1, 6), (2, 6)]
    assert rows(path, "SELECT step FROM steps") == [1, 2]


def test_a_resume_removes_what_will_be_made_again_and_keeps_what_happened(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    with closing(writer(path)) as store:
        write_steps(store, 1, 2, 3)
        store.do([incident_statement(Incident(actor="scorer", kind="late", message="3 s", gid=5), 3, 8.0)])
        for version in (1, 2, 3):
            written = CheckpointWritten(
                version=version, folder=f"c{version}", bytes=5, seconds=0.1, removed=(1,) * (version > 1)
            )
            store.do(checkpoint_statements(written, 20.0 + version))
    with closing(writer(path, first_step=2, now_s=5.0)) as store:  # by a clock that went back
        assert store.start == 2
        assert rows(path, "SELECT step FROM steps") == [1, 2]
        write_steps(store, 3, 4)
        store.do([incident_statement(Incident(actor="learner", kind="odd", message="!"), 4, 9.0)])
    for table, count in (("steps", 1), ("groups", 2), ("completions", 6)):
        assert rows(path, f"SELECT step, count(*) FROM {table} GROUP BY step") == [(s, count) for s in (1, 2, 3, 4)]
    assert rows(path, "SELECT start, step FROM steps ORDER BY step")[-2:] == [(2, 3), (2, 4)]
    assert rows(path, "SELECT * FROM incidents") == [
        (1, 3, 8.0, "scorer", "late", "3 s", 5), (2, 4, 9.0, "learner", "odd", "!", None)
    ]  # fmt: skip
    assert rows(path, "SELECT * FROM checkpoints") == [(1, "c1", 5, 0.1, 21.0, 22.0), (2, "c2", 5, 0.1, 22.0, 5.0)], (
        "none stands"
    )
    assert rows(path, "SELECT * FROM starts") == [
        (1, 1e9, os.getpid(), 0, "1.2.3", None), (2, 5.0, os.getpid(), 2, "1.2.3", None)
    ]  # fmt: skip


def test_who_goes_on_with_a_start_removes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    with closing(writer(path)) as store:
        write_steps(store, 1)
    with closing(writer(path, start=1)) as store:
        assert store.start == 1
        write_steps(store, 2)
        store.settle(2)
    assert rows(path, "SELECT step FROM steps") == [1, 2]
    assert rows(path, "SELECT start, settled FROM starts") == [(1, 2)]


def test_settling_syncs_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which SQLite does itself; what can be seen is that it is told to, and no longer afterwards."""
    told: list[str] = []
    with closing(writer(tmp_path / "s")) as store:
        store._connection.set_trace_callback(told.append)
        store.settle(4)
    assert told == [
        "PRAGMA synchronous = FULL",
        "BEGIN IMMEDIATE",
        "UPDATE starts SET settled = 4 WHERE start = 1",
        "COMMIT",
        "PRAGMA synchronous = NORMAL",
    ]


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    check_store(path)  # there is none
    writer(path).close()
    check_store(path)
    rows(path, "PRAGMA user_version = 2")
    message = (
        r"run.sqlite: the run store has format 2, .* knows formats up to 1; use the Troupe that wrote it or a newer"
    )
    with pytest.raises(OutputError, match=message):
        check_store(path)
    with pytest.raises(OutputError, match=message):
        writer(path)


def test_a_file_of_something_else_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    rows(path, "CREATE TABLE recipes (name TEXT)")
    check_store(path)
    with pytest.raises(DamagedStoreError, match="of something else"):
        writer(path)
    path.write_bytes(b"no database at all" * 100)
    check_store(path)
    with pytest.raises(DamagedStoreError, match="not a database"):
        writer(path)


def test_an_empty_file_is_a_new_store(tmp_path: Path) -> None:
    (tmp_path / "s").touch()
    writer(tmp_path / "s").close()
    assert rows(tmp_path / "s", "PRAGMA user_version") == [FORMAT]


def test_damage_inside_is_found_when_it_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    with closing(writer(path)) as store:
        write_steps(store, *range(1, 30))
    data = bytearray(path.read_bytes())
    for page in range(2, len(data) // 4096):
        data[page * 4096 : page * 4096 + 8] = b"\xff" * 8
    path.write_bytes(data)
    with pytest.raises(DamagedStoreError):
        writer(path)


def test_looking_for_damage_ends_in_time(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    with closing(writer(path)) as store:
        write_steps(store, *range(1, 200))
    with closing(writer(path, first_step=199, check_s=-1.0)) as store:
        write_steps(store, 200)


def test_setting_aside_takes_free_names_and_the_log_of_changes_along(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    (tmp_path / "run.damaged-1.sqlite").write_text("from before")
    path.write_text("main")
    Path(f"{path}-wal").write_text("log")
    Path(f"{path}-shm").write_text("index")
    assert set_aside(path) == tmp_path / "run.damaged-2.sqlite"
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "run.damaged-1.sqlite": "from before", "run.damaged-2.sqlite": "main", "run.damaged-2.sqlite-wal": "log"
    }  # fmt: skip


def test_another_program_that_writes_is_in_the_way_for_a_while_only(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    with closing(writer(path, busy_s=0.01)) as store, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OSError, match=r"run\.sqlite: database is locked"):
            write_steps(store, 1)
        other.execute("COMMIT")
        write_steps(store, 1)


def test_a_reader_holds_up_nobody_and_sees_whole_steps(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    with closing(writer(path)) as store, closing(connect_to_read(path)) as reader:
        write_steps(store, 1)
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM completions").fetchone() == (6,)
        write_steps(store, 2)
        assert reader.execute("SELECT count(*) FROM completions").fetchone() == (6,)
        reader.execute("COMMIT")
        assert reader.execute("SELECT count(*) FROM completions").fetchone() == (12,)
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader.execute("DELETE FROM steps")


_ENDLESS = """
import sys
from pathlib import Path
from tests.records.store.test_write import write_steps, writer
store = writer(Path(sys.argv[1]), first_step=int(sys.argv[2]))
step = int(sys.argv[2])
while True:
    step += 1
    write_steps(store, step)
    print(step, flush=True)
"""


@pytest.mark.parametrize("kills", [1, pytest.param(25, marks=pytest.mark.slow)])
def test_a_kill_leaves_whole_steps(tmp_path: Path, kills: int) -> None:
    path, done = tmp_path / "run.sqlite", 0
    for kill in range(kills):
        command = [sys.executable, "-c", _ENDLESS, str(path), str(done)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            told = [int(process.stdout.readline()) for _ in range(5)]
            time.sleep(0.001 * (kill % 7))  # into the middle of something
            process.send_signal(signal.SIGKILL)
        steps = rows(path, "SELECT step FROM steps ORDER BY step")
        assert steps == list(range(1, steps[-1] + 1))
        assert steps[-1] >= told[-1]
        assert rows(path, "SELECT step, count(*) FROM completions GROUP BY step") == [(step, 6) for step in steps]
        assert rows(path, "PRAGMA integrity_check") == ["ok"]
        done = steps[-1] - 2
    assert rows(path, "SELECT count(*) FROM starts") == [kills]
