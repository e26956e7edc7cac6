"""The figures of a run's steps in a bounded place: where there are too many, neighbours become their mean.

Knows nothing of how they are drawn.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

FIGURES = frozenset(
    {
        "reward",
        "reward_std",
        "reward_std_within_groups",
        "loss",
        "kl",
        "entropy",
        "grad_norm",
        "learning_rate",
        "completions/mean_length",
        "completions/min_length",
        "completions/max_length",
        "completions/clipped_ratio",
        "frac_reward_zero_std",
        "tokens_per_second",
        "step_time",
    }
)
"""What is kept of a step's metrics, besides the mean of every reward."""
_MOST_REWARDS = 8


def figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Those of a step's metrics that are drawn; what is not finite is left out."""
    rewards = [name for name in metrics if name.startswith("rewards/") and name.endswith("/mean")][:_MOST_REWARDS]
    drawn = [*(name for name in metrics if name in FIGURES), *rewards]
    return {name: float(f"{metrics[name]:.6g}") for name in drawn if _is_finite(metrics[name])}


class Curves:
    """At most `most` points, each the mean of so many steps, in ascending order."""

    def __init__(self, most: int = 1000) -> None:
        self._most = most
        self._stride = 1  # steps a point
        self._steps = array("q")  # the last one of each point
        self._counts = array("q")
        self._columns: dict[str, array[float]] = {}

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """The figures of one more step. One that was there already is made again: it and what came after it go."""
        if self._steps and step <= self._steps[-1]:
            self.cut(step - 1)
        for name in metrics:
            if name not in self._columns:
                self._columns[name] = array("d", [math.nan] * len(self._steps))
        if self._steps and (step - 1) // self._stride == (self._steps[-1] - 1) // self._stride:
            count = self._counts[-1]
            for name, column in self._columns.items():
                column[-1] = _mean(column[-1], count, metrics.get(name, math.nan), 1)
            self._steps[-1], self._counts[-1] = step, count + 1
            return
        self._steps.append(step)
        self._counts.append(1)
        for name, column in self._columns.items():
            column.append(metrics.get(name, math.nan))
        while len(self._steps) > self._most:
            self._thin()

    def cut(self, step: int) -> None:
        """Forget the points that have steps after this one."""
        while self._steps and self._steps[-1] > step:
            self._steps.pop()
            self._counts.pop()
            for column in self._columns.values():
                column.pop()

    def table(self) -> dict[str, list[Any]]:
        """Column → a value for each point, the steps under `step`; None where there is none."""
        values = {
            name: [None if math.isnan(value) else float(f"{value:.6g}") for value in column]
            for name, column in self._columns.items()
        }
        return {"step": list(self._steps), **values}

    def _thin(self) -> None:
        """Points twice as wide."""
        self._stride *= 2
        steps, counts, columns = self._steps, self._counts, self._columns
        self._steps, self._counts = array("q"), array("q")
        self._columns = {name: array("d") for name in columns}
        for index, (step, count) in enumerate(zip(steps, counts, strict=True)):
            joins = bool(self._steps) and (step - 1) // self._stride == (self._steps[-1] - 1) // self._stride
            for name, column in columns.items():
                if joins:
                    thin = self._columns[name]
                    thin[-1] = _mean(thin[-1], self._counts[-1], column[index], count)
                else:
                    self._columns[name].append(column[index])
            if joins:
                self._steps[-1] = step
                self._counts[-1] += count
            else:
                self._steps.append(step)
                self._counts.append(count)


def read_curves(path: Path, most: int = 1000) -> Curves:
    """Those of a `metrics.jsonl`; what is no line of one is passed over, and so is a file that cannot be read."""
    curves = Curves(most)
    decode = msgspec.json.Decoder(dict[str, Any]).decode
    try:
        with path.open("rb") as lines:
            for line in lines:
                try:
                    metrics = decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                    continue
                step = metrics.get("step")
                if isinstance(step, int) and 0 < step < 2**62:
                    curves.add(step, figures(metrics))
    except OSError:
        return curves
    return curves


def _mean(one: float, count: int, other: float, other_count: int) -> float:
    if math.isnan(one):
        return other
    if math.isnan(other):
        return one
    return (one * count + other * other_count) / (count + other_count)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and -1e300 < value < 1e300
