"""Curves of a run of any length in few points: the metrics of neighbouring steps become their mean, least and most.

Steps come one by one and are forgotten; sums over all of them are exact. Knows no metric but `step_time` and `time/…`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

MOST_POINTS = 1000
"""Points that a curve has at most."""

Metrics = Mapping[str, float | None]
Point = tuple[float | None, float | None, float | None]

_NOTHING: Point = (None, None, None)
_NUMBERS = (float, int)


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """One metric, a value a point; None where no step of the point has it."""

    mean: tuple[float | None, ...]
    low: tuple[float | None, ...] = ()
    """The least of the steps that a point stands for; empty where a point is one step."""
    high: tuple[float | None, ...] = ()
    """The most."""


class Thinned(msgspec.Struct, frozen=True, kw_only=True):
    """The metrics of all steps."""

    steps: tuple[int, ...] = ()
    """The last step of each point."""
    steps_a_point: int = 1
    curves: dict[str, Curve] = {}
    """Metric → curve; each has as many values as there are points."""
    seconds: float = 0.0
    """Σ `step_time`."""
    sampled: float = 0.0
    """Completion tokens, Σ `tokens_per_second` · `step_time`."""
    shares: dict[str, float] = {}
    """`ACTOR/busy` and `ACTOR/idle` → share of the time of all steps that say it."""
    totals: dict[str, float] = {}
    """`device_s`, `reward/hidden_s` and so on → seconds of all steps together."""


class Thinner:
    """Takes the metrics of steps in order. `expected`: how many will come, about."""

    def __init__(self, expected: int, most_points: int = MOST_POINTS) -> None:
        self._size = max(1, math.ceil(expected / most_points))
        self._last = -1
        self._bucket: list[Metrics] = []
        self._steps: list[int] = []
        self._points: dict[str, list[Point]] = {}
        self._seconds = self._told_s = self._sampled = 0.0
        self._share_s: dict[str, float] = {}
        self._totals: dict[str, float] = {}

    def add(self, step: int, metrics: Metrics) -> None:
        """Take a step; one that is not past all before is left out."""
        if step <= self._last:
            return
        self._last = step
        self._bucket.append(metrics)
        if len(self._bucket) == self._size:
            self._close()

    def result(self) -> Thinned:
        """What all steps so far make."""
        if self._bucket:
            self._close()
        curves = {}
        for name, points in self._points.items():
            points += [_NOTHING] * (len(self._steps) - len(points))
            mean, low, high = zip(*points, strict=True)
            curves[name] = Curve(mean=mean) if self._size == 1 else Curve(mean=mean, low=low, high=high)
        return Thinned(
            steps=tuple(self._steps),
            steps_a_point=self._size,
            curves=curves,
            seconds=self._seconds,
            sampled=self._sampled,
            shares={name: share_s / self._told_s for name, share_s in self._share_s.items()} if self._told_s else {},
            totals=self._totals,
        )

    def _close(self) -> None:
        """Make a point of the steps that wait."""
        bucket, self._bucket = self._bucket, []
        names: dict[str, object] = {}
        for metrics in bucket:
            names.update(metrics)
        for name in names:
            values = [value for metrics in bucket if type(value := metrics.get(name)) in _NUMBERS]
            point = _point(values)  # type: ignore[arg-type]
            if point is not None:
                points = self._points.setdefault(name, [])
                points += [_NOTHING] * (len(self._steps) - len(points))
                points.append(point)
        self._steps.append(self._last)
        self._sum_up(bucket, [name for name in names if name.startswith("time/")])

    def _sum_up(self, bucket: Sequence[Metrics], times: Sequence[str]) -> None:
        for metrics in bucket:
            seconds = metrics.get("step_time") or 0.0
            self._seconds += seconds
            self._sampled += seconds * (metrics.get("tokens_per_second") or 0.0)
            if metrics.get("time/device_s") is not None:
                self._told_s += seconds
        for name in times:
            key = name.removeprefix("time/")
            if key.endswith("_s"):
                sums, values = self._totals, [metrics.get(name) or 0.0 for metrics in bucket]
            else:
                sums = self._share_s
                values = [(metrics.get(name) or 0.0) * (metrics.get("step_time") or 0.0) for metrics in bucket]
            sums[key] = sums.get(key, 0.0) + math.fsum(values)


def _point(values: Sequence[float]) -> Point | None:
    """Mean, least and most; None where there is no number."""
    if not values:
        return None
    low, high = min(values), max(values)
    if not (math.isfinite(low) and math.isfinite(high)):
        return None
    try:
        mean = math.fsum(values) / len(values)
    except OverflowError:  # the sum is no number, yet the mean is
        mean = math.fsum(value / len(values) for value in values)
    return mean, low, high
