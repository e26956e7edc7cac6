"""What is known of the rows of a dataset, by which the rows of steps to come are chosen: what a checkpoint keeps."""

from typing import Literal

import msgspec

Pool = Literal["easy", "normal", "hard", "retired"]
"""Where a row stands, by how often its completions passed. Rows that were never seen are normal."""


class RowRecord(msgspec.Struct, frozen=True, array_like=True):
    """A row that was seen."""

    row: int
    pool: Pool
    turn: int
    """The walk through its pool that it is part of."""
    visits: int
    """Groups of which a pass rate is known."""
    rates: tuple[float, ...]
    """The newest of them, the last one last; each from 0 to 1."""
    step: int
    """Learner batch that it was last part of, from 0."""


class StepRows(msgspec.Struct, frozen=True, array_like=True):
    """The rows that were chosen for a step."""

    step: int
    rows: tuple[int, ...]
    """(P,) by place."""
    replacements: tuple[int, ...] = ()
    """Those that are sampled where a group is without signal: element (attempt − 1)·P + place."""


class CurriculumState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that a choice follows from, besides seed and settings."""

    records: tuple[RowRecord, ...] = ()
    """By row."""
    chosen: tuple[StepRows, ...] = ()
    """For steps that are not learned yet, by step."""
    away: tuple[int, ...] = ()
    """Rows that were chosen and have not come back, ascending."""
    turns: dict[Pool, int] = {}
    """The walk that each pool is at."""
    end: int | None = None
    """The first step that has no rows, because every row is retired."""
