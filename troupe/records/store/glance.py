"""What run.sqlite tells of a run at a glance: few rows are read, however long the run is."""

import sqlite3
from collections.abc import Iterator

import msgspec

from troupe.records.store.format import DamagedStoreError

Figures = dict[str, float | None]
_FIGURES = msgspec.json.Decoder(Figures)
_STARTS = (
    "SELECT s.time, e.time FROM starts s LEFT JOIN steps e ON e.start = s.start AND e.step = coalesce("
    "(SELECT n.first_step FROM starts n WHERE n.start > s.start ORDER BY n.start LIMIT 1),"
    " (SELECT max(step) FROM steps)) ORDER BY s.start"
)
"""When each start began, and when it made the last step that the next one went on from; None where it made none."""


_POINTS = 12
"""Steps of which the reward is read."""


class Glance(msgspec.Struct, frozen=True, kw_only=True):
    """The two ends of a run, and how long it went on."""

    first: Figures = {}
    """Metrics of the first step; empty before it is done."""
    newest: Figures = {}
    """Metrics of the newest step."""
    rewards: tuple[float, ...] = ()
    """Of some steps, evenly spaced from the first to the newest."""
    step: int = 0
    """The newest; 0 before the first."""
    began_unix_s: float | None = None
    newest_unix_s: float | None = None
    """When the newest step was done."""
    seconds: float | None = None
    """From the beginning of each start to its last step, all starts together, by the time of day; None before the
    first step."""


def read_glance(connection: sqlite3.Connection) -> Glance:
    """What the store says of its first and its newest step. DamagedStoreError where their metrics are no JSON."""
    starts = list(connection.execute(_STARTS))
    first, newest = _end(connection, "ASC"), _end(connection, "DESC")
    began = starts[0][0] if starts else None
    if first is None or newest is None:
        return Glance(began_unix_s=began)
    return Glance(
        first=_figures(first),
        newest=_figures(newest),
        rewards=tuple(_rewards(connection, first[0], newest[0])),
        step=newest[0],
        began_unix_s=began,
        newest_unix_s=newest[1],
        seconds=sum(_durations(starts)) or None,
    )


def _end(connection: sqlite3.Connection, order: str) -> tuple[int, float, str] | None:
    row: tuple[int, float, str] | None = connection.execute(
        f"SELECT step, time, metrics FROM steps ORDER BY step {order} LIMIT 1"
    ).fetchone()
    return row


def _rewards(connection: sqlite3.Connection, first: int, newest: int) -> Iterator[float]:
    steps = {first + round((newest - first) * at / (_POINTS - 1)) for at in range(_POINTS)}
    marks = ",".join("?" * len(steps))
    sql = f"SELECT step, time, metrics FROM steps WHERE step IN ({marks}) ORDER BY step"
    for row in connection.execute(sql, tuple(steps)):
        if (reward := _figures(row).get("reward")) is not None:
            yield reward


def _figures(row: tuple[int, float, str]) -> Figures:
    try:
        return _FIGURES.decode(row[2])
    except (msgspec.DecodeError, TypeError) as error:
        raise DamagedStoreError(f"step {row[0]}: {error}") from None


def _durations(starts: list[tuple[float, float | None]]) -> Iterator[float]:
    for began, ended in starts:
        if ended is not None and ended > began:  # else the clock was set meanwhile
            yield ended - began
