"""Messages of a run for its store, and the store's rows."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from tests.support.fakes import make_scored
from troupe.messages import ClosedState, GroupClosed, Update
from troupe.records.sinks.sqlite import SqliteSink

SCORES = (0.25, None, 1.0)


def closed(
    step: int, place: int, scores: Sequence[float | None] = SCORES, *, state: ClosedState = "trained", attempt: int = 0
) -> GroupClosed:
    """A group that ends with `step` ≥ 1; its rewards are twice the scores."""
    scored = make_scored(step - 1, place, scores, version=step - 1, attempt=attempt)
    return GroupClosed(
        gid=scored.group.prompt.gid,
        slot=scored.group.prompt.slot,
        state=state,
        version=step,
        scored=scored,
        rewards=tuple(None if score is None else 2 * score for score in scores),
        advantages=tuple(float(i) for i in range(len(scores))) if state == "trained" else None,
    )


def update(step: int, **metrics: float) -> Update:
    """The Update of a step of a run of nine."""
    return Update(step=step, version=step, total_steps=9, metrics=metrics)


def write_step(sink: SqliteSink, step: int, groups: int = 2) -> None:
    """Tell a sink of a step, and have it written."""
    for place in range(groups):
        sink.write(closed(step, place))
    sink.write(update(step, reward=step / 10))
    sink.flush()


def rows(path: Path, query: str) -> list[Any]:
    """What a query gives; the values themselves where it has one column."""
    with closing(sqlite3.connect(path)) as connection:
        found = connection.execute(query).fetchall()
    return [row[0] if len(row) == 1 else row for row in found]
