"""Members in run.sqlite: who came and went, and about how much each did."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tests.records.members import ALONE, LAPTOP
from tests.records.sinks.steps import Clock, status
from tests.support.stored import rows, update
from troupe.messages import MemberStatus
from troupe.records.layout import STORE
from troupe.records.sinks.sqlite import SqliteSink
from troupe.records.store.members import StoredMember
from troupe.records.store.read import open_store

GONE = msgspec.structs.replace(LAPTOP, state="lost", leases=(), tokens_per_second=None, detail="no beat for 15 s")


def stored(folder: Path) -> list[StoredMember]:
    with open_store(folder) as run:
        return run.members()


def test_a_worker_that_goes_and_comes_back_is_one_row_a_start(tmp_path: Path) -> None:
    clock = Clock()
    sink = SqliteSink(tmp_path / STORE, clock=clock)
    sink.open()

    def look(*members: MemberStatus, for_s: int = 1) -> None:
        for _ in range(for_s):
            sink.write(status(members=members))
            clock.now_s += 1.0
        sink.flush()

    look(LAPTOP, ALONE)
    assert [(one.name, one.kind, one.state, one.joined_unix_s) for one in stored(tmp_path)] == [
        ("generator 1", "process", "working", 100.0),
        ("laptop", "worker", "working", 100.0),
    ]
    look(LAPTOP, ALONE, for_s=9)
    look(GONE, ALONE)
    laptop = stored(tmp_path)[1]
    assert (laptop.state, laptop.detail, laptop.losses, laptop.seen_unix_s) == ("lost", "no beat for 15 s", 1, 109.0)
    assert laptop.tokens == round(9 * 212.4)
    look(LAPTOP, for_s=31)
    laptop = stored(tmp_path)[1]
    assert (laptop.state, laptop.losses, laptop.joined_unix_s) == ("working", 1, 100.0)
    sink.close()
    again = SqliteSink(tmp_path / STORE, clock=clock)
    again.open()
    again.write(status(members=(LAPTOP,)))
    again.flush()
    again.close()
    assert [(one.start, one.name) for one in stored(tmp_path)] == [(1, "generator 1"), (1, "laptop"), (2, "laptop")]


def test_a_store_of_an_older_version_has_none(tmp_path: Path) -> None:
    sink = SqliteSink(tmp_path / STORE)
    sink.open()
    sink.write(update(1))
    sink.flush()
    sink.close()
    assert stored(tmp_path) == []
    rows(tmp_path / STORE, "DROP TABLE members")
    assert stored(tmp_path) == []
