"""Curves of a run of any length in few points: of neighbouring steps, the mean, the least and the most.

Steps come one by one and are forgotten; sums over all of them are exact.
"""

import math
from collections.abc import Mapping
from typing import Any

import msgspec

MOST_POINTS = 1000
"""Points that a curve has at most."""

Metrics = Mapping[str, Any]
_Point = tuple[int, float, float, float]
"""How many steps have a value, and its mean, least and most."""


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """One metric, a value a point; None where no step of the point has it."""

    mean: tuple[float | None, ...]
    low: tuple[float | None, ...] = ()
    """The least of the steps that a point stands for; empty where a point is one step."""
    high: tuple[float | None, ...] = ()
    """The most."""


_ELAPSED = "\0elapsed"
"""What the time at a point is kept under, among the metrics."""
_NOTHING = Curve(mean=())


class Curves:
    """At most `most` points, each of so many steps, in ascending order; what is no finite number is left out.

    When there are too many points, each two become one. `steps_a_point`: with how many to begin.
    """

    def __init__(self, most: int = MOST_POINTS, steps_a_point: int = 1) -> None:
        self._most = most
        self.steps_a_point = steps_a_point
        self.steps: list[int] = []
        """The last step of each point."""
        self._columns: dict[str, list[_Point | None]] = {}
        """Metric → its points; the last ones may lack."""

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, step: int, metrics: Metrics) -> None:
        """The figures of one more step. One that was there already is made again: it and what came after it go."""
        self.cut(step - 1)
        self._put(step, {name: (1, value, value, value) for name, value in metrics.items() if _is_finite(value)})
        while len(self.steps) > self._most:
            self.steps_a_point *= 2
            steps, columns = self.steps, self._columns
            self.steps, self._columns = [], {}
            for at, last in enumerate(steps):
                points = {name: column[at] for name, column in columns.items() if at < len(column)}
                self._put(last, {name: point for name, point in points.items() if point is not None})

    def cut(self, step: int) -> None:
        """Forget the points that have steps after this one."""
        while self.steps and self.steps[-1] > step:
            self.steps.pop()
            for column in self._columns.values():
                del column[len(self.steps) :]

    def curves(self) -> dict[str, Curve]:
        """Metric → curve; each has as many values as there are points."""
        found = {}
        for name, column in self._columns.items():
            points = [point or (0, None, None, None) for point in column]
            points += [(0, None, None, None)] * (len(self.steps) - len(points))
            _, mean, low, high = zip(*points, strict=True) if points else ((), (), (), ())
            found[name] = Curve(mean=mean) if self.steps_a_point == 1 else Curve(mean=mean, low=low, high=high)
        return found

    def _put(self, step: int, points: Mapping[str, _Point]) -> None:
        """Take a point into the last one where both stand for the same steps, else beside it."""
        if self.steps and (step - 1) // self.steps_a_point == (self.steps[-1] - 1) // self.steps_a_point:
            self.steps[-1] = step
        else:
            self.steps.append(step)
        for name, point in points.items():
            column = self._columns.setdefault(name, [])
            if len(column) == len(self.steps):
                column[-1] = _joined(column[-1], point)
            else:
                column += [None] * (len(self.steps) - 1 - len(column))
                column.append(point)


class Sums(msgspec.Struct):
    """What all steps took, exactly."""

    seconds: float = 0.0
    """Σ `step_time`."""
    sampled: float = 0.0
    """Completion tokens, Σ `tokens_per_second` · `step_time`."""
    totals: dict[str, float] = {}
    """`device_s`, `reward/hidden_s` and so on → seconds."""
    timed_s: float = 0.0
    """Σ `step_time` of the steps that say what actors did."""
    actor_s: dict[str, float] = {}
    """`ACTOR/busy` and `ACTOR/idle` → seconds."""

    def add(self, metrics: Metrics) -> None:
        """One more step."""
        seconds = metrics.get("step_time") or 0.0
        self.seconds += seconds
        self.sampled += seconds * (metrics.get("tokens_per_second") or 0.0)
        if metrics.get("time/device_s") is not None:
            self.timed_s += seconds
        for name in [name for name in metrics if name.startswith("time/")]:
            key, value = name.removeprefix("time/"), metrics[name] or 0.0
            if key.endswith("_s"):
                self.totals[key] = self.totals.get(key, 0.0) + value
            else:
                self.actor_s[key] = self.actor_s.get(key, 0.0) + value * seconds

    @property
    def shares(self) -> dict[str, float]:
        """`ACTOR/busy` and `ACTOR/idle` → share of the time of all steps that say it."""
        return {name: actor_s / self.timed_s for name, actor_s in self.actor_s.items()} if self.timed_s else {}


class Thinned(msgspec.Struct, frozen=True, kw_only=True):
    """The metrics of all steps: their curves and their sums."""

    steps: tuple[int, ...] = ()
    """The last step of each point."""
    seconds: tuple[float | None, ...] = ()
    """How long the run had trained at each point: Σ `step_time`; empty where no step says it."""
    tokens: tuple[float | None, ...] = ()
    """How many tokens it had trained on at each point: `num_tokens`; empty where no step says it."""
    steps_a_point: int = 1
    curves: dict[str, Curve] = {}
    sums: Sums = msgspec.field(default_factory=Sums)


class Thinner:
    """Takes the metrics of steps in order. `expected`: how many will come, about."""

    def __init__(self, expected: int, most_points: int = MOST_POINTS) -> None:
        self._curves = Curves(most_points, max(1, math.ceil(expected / most_points)))
        self._sums = Sums()

    def add(self, step: int, metrics: Metrics) -> None:
        """Take a step; one that is not past all before is left out."""
        if not self._curves.steps or step > self._curves.steps[-1]:
            self._sums.add(metrics)
            self._curves.add(step, {**metrics, _ELAPSED: self._sums.seconds} if self._sums.seconds else metrics)

    def result(self) -> Thinned:
        """What all steps so far make."""
        curves = self._curves.curves()
        elapsed, tokens = curves.pop(_ELAPSED, _NOTHING), curves.get("num_tokens", _NOTHING)
        return Thinned(
            steps=tuple(self._curves.steps),
            seconds=elapsed.high or elapsed.mean,
            tokens=tokens.high or tokens.mean,
            steps_a_point=self._curves.steps_a_point,
            curves=curves,
            sums=self._sums,
        )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and -math.inf < value < math.inf


def _joined(one: _Point | None, other: _Point) -> _Point:
    if one is None:
        return other
    count = one[0] + other[0]
    mean = one[1] + (other[1] - one[1]) * (other[0] / count)
    return count, mean, min(one[2], other[2]), max(one[3], other[3])
