"""Evaluations in run.sqlite: stored whole, once a version and set, and taken back with the steps after a checkpoint."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec

from tests.records.sinks.steps import evaluated
from tests.support.stored import update
from troupe.messages import Evaluated, EvaluatedRow
from troupe.records.sinks.sqlite import SqliteSink
from troupe.records.store.evaluations import stored_evaluations, stored_rows


def told(path: Path, first_step: int, *messages: object) -> list[Evaluated]:
    """A start of a run with these messages; what is stored after it."""
    sink = SqliteSink(path, first_step=first_step)
    sink.open()
    for message in messages:
        sink.write(message)
    sink.flush()
    sink.close()
    with closing(sqlite3.connect(path)) as connection:
        return stored_evaluations(connection)


def rows_of(path: Path, version: int, name: str) -> tuple[EvaluatedRow, ...]:
    with closing(sqlite3.connect(path)) as connection:
        return stored_rows(connection, version, name)


def test_an_evaluation_is_read_as_it_was_told_and_stands_once_over_resumes(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    first, second, late = evaluated(0), evaluated(2, 0.75), evaluated(4)
    assert len(told(path, 0, first, update(1), update(2), second, evaluated(2, name="math"), late)) == 4
    again = msgspec.structs.replace(second, metrics={"eval/held_out/avg@1": 1.0})
    found = told(path, 2, again)
    assert [(one.version, one.name) for one in found] == [(0, "held_out"), (2, "math"), (2, "held_out")]
    assert [msgspec.structs.replace(one, rows=()) for one in (first, again)] == [found[0], found[-1]]
    assert rows_of(path, 2, "held_out") == second.rows
    assert rows_of(path, 4, "held_out") == ()


def test_rows_that_changed_under_a_name_stay_with_their_samples(tmp_path: Path) -> None:
    path, before = tmp_path / "run.sqlite", msgspec.structs.replace(evaluated(0), conditions={"rows": "2 (sum a)"})
    other = tuple(msgspec.structs.replace(row, prompt=f"other {row.row}") for row in before.rows)
    after = msgspec.structs.replace(before, version=2, rows=other, conditions={"rows": "2 (sum b)"})
    assert [one.conditions["rows"] for one in told(path, 0, before, update(1), update(2), after)] == [
        "2 (sum a)",
        "2 (sum b)",
    ]
    assert (rows_of(path, 0, "held_out"), rows_of(path, 2, "held_out")) == (before.rows, other)


def test_a_store_of_before_conditions_were_kept_is_read_and_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    told(path, 0, evaluated(0), update(1))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE evaluation_conditions")
        assert [one.conditions for one in stored_evaluations(connection)] == [{}]
    assert rows_of(path, 0, "held_out") == evaluated(0).rows
    now = msgspec.structs.replace(evaluated(1), conditions={"rows": "2 (sum a)"})
    assert [one.conditions for one in told(path, 1, now)] == [{}, {"rows": "2 (sum a)"}]
    assert rows_of(path, 0, "held_out") == evaluated(0).rows == rows_of(path, 1, "held_out")


def test_a_store_of_an_older_version_has_none(tmp_path: Path) -> None:
    with closing(sqlite3.connect(":memory:")) as connection:
        assert stored_evaluations(connection) == []
        assert stored_rows(connection, 0, "held_out") == ()
