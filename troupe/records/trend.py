"""How one figure went through a run, in as many letters as there is room for: from its first value to its newest, and
an area below its curve."""

import math
from collections.abc import Container, Sequence
from pathlib import Path

from troupe.errors import OutputError
from troupe.records.curves import Curves
from troupe.records.store.read import open_store
from troupe.runtime.terminal import can_write

_MOST_POINTS = 512
_BLOCKS, _LETTERS = " ▁▂▃▄▅▆▇█", " .:#"
"""How much of a letter is filled, from nothing to all of it; the second where there are no blocks."""
_VALUE = "value"


class Trend:
    """Takes a figure step by step, for ever; of many steps it keeps means. May be read while it takes one."""

    def __init__(self, of: str = "reward") -> None:
        self.of = of
        """Name of the figure."""
        self.first: float | None = None
        self.newest: float | None = None
        """Of the newest step that has a finite one."""
        self.steps: tuple[int, int] = (0, 0)
        """The first and the newest step that have one."""
        self.values: tuple[float, ...] = ()
        """The curve, a mean for each point."""
        self._curves = Curves(_MOST_POINTS)

    def add(self, step: int, value: float) -> None:
        """The value of one more step; what is no finite number is left out."""
        if not math.isfinite(value):
            return
        self._curves.add(step, {_VALUE: value})
        self.values = tuple(mean for mean in self._curves.curves()[_VALUE].mean if mean is not None)
        self.steps = (step if self.first is None else self.steps[0], step)
        self.first = value if self.first is None else self.first
        self.newest = value


def stored_rewards(folder: Path, up_to: int | None = None, figure: str = "reward") -> tuple[tuple[int, float], ...]:
    """(step, reward), or another `figure`, of steps of a run that lie evenly, from the first to the newest (or
    `up_to`); nothing where there is no store that can be read now."""
    try:
        with open_store(folder) as store:
            return tuple(store.values(figure, _MOST_POINTS, up_to))
    except OutputError:
        return ()


def measured(folder: Path, figure: str) -> tuple[tuple[int, float], ...]:
    """(step, value) of every step that has a figure which few have; nothing where there is no store that can be read
    now."""
    try:
        with open_store(folder) as store:
            return tuple(store.all_values(figure))
    except OutputError:
        return ()


def telling(names: Container[str]) -> str:
    """The figure that tells best how a step went, of those that it has: where nothing is scored, the loss."""
    return "loss" if "loss" in names and "reward" not in names else "reward"


def trend_of(points: Sequence[tuple[int, float]], of: str = "reward") -> Trend:
    """The trend of (step, value)."""
    trend = Trend(of)
    for step, value in points:
        trend.add(step, value)
    return trend


def area(values: Sequence[float], width: int, rows: int = 1, *, encoding: str = "utf-8") -> list[str]:
    """What lies below the curve of finite values, drawn in `rows` lines of `width` letters, the highest first.

    The least column fills the least of a letter, the largest all rows; where all are equal, half of them are filled.
    """
    levels = _BLOCKS if can_write(_BLOCKS, encoding) else _LETTERS
    most = len(levels) - 1
    columns = spread(values, width)
    least, largest = min(columns, default=0.0), max(columns, default=0.0)
    heights = [max(1, rows * most // 2)] * len(columns)
    if largest > least:
        across = largest / 2 - least / 2  # halves: no overflow
        heights = [1 + round((value / 2 - least / 2) / across * (rows * most - 1)) for value in columns]
    return [
        "".join(levels[min(max(height - below, 0), most)] for height in heights).ljust(width)
        for below in range((rows - 1) * most, -1, -most)
    ]


def spread(values: Sequence[float], width: int) -> list[float]:
    """One value a column: the mean of those that share it, or one over several columns; nothing of nothing."""
    found = []
    for column in range(width if values else 0):
        first = column * len(values) // width
        shared = values[first : max(first + 1, (column + 1) * len(values) // width)]
        found.append(math.fsum(value / len(shared) for value in shared))
    return found
