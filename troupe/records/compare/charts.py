"""Curves of several runs over each other: a chart a metric, a line a run, a band the seeds of one configuration."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import ceil
from statistics import fmean
from typing import TypeVar

import msgspec

from troupe.records.compare.held_out import HEADLINES, distinct_figures
from troupe.records.compare.runs import Group, RunComparison
from troupe.records.figures import CHARTS, ChartSpec, function_of, lines_of, named_by
from troupe.records.held_out import is_share
from troupe.records.report.charts import Chart, Line, Section, Values, sections_of
from troupe.records.report.data import Axes

_MOST_VALUES = 4000
"""In a chart, about; longer runs get fewer points."""
_FEWEST_POINTS = 100
_COLOURS = 8
_OTHERS = "Other metrics"
_HELD_OUT = "Held-out rows"

T = TypeVar("T")


class Laid(msgspec.Struct, frozen=True, kw_only=True):
    """What a page draws of several runs."""

    sections: tuple[Section, ...]
    axes: tuple[Axes, ...]
    colours: dict[str, int]
    """Name of a run or of a group → 1 to 8."""
    within: tuple[str, ...]
    """The runs that a band stands for, too: at first they are not shown."""


class Overlay:
    """Lays the curves of runs over each other."""

    def __init__(self, found: RunComparison) -> None:
        self._found = found
        lines = len(found.runs) + len(found.groups)
        most = max(_FEWEST_POINTS, _MOST_VALUES // lines)
        self._joined = [ceil(len(run.picture.metrics.steps) / most) or 1 for run in found.runs]
        self._axes = [
            Axes(
                step=_ends(run.picture.metrics.steps, join),
                time=_ends(run.picture.metrics.seconds, join),
                tokens=_ends(run.picture.metrics.tokens, join),
            )
            for run, join in zip(found.runs, self._joined, strict=True)
        ]
        self._bands = {at: group for at, group in enumerate(found.groups) if len(group.runs) > 1}
        within = [place for group in self._bands.values() for place in group.runs]
        names = [group.name for group in found.groups] + [found.runs[place].name for place in within]
        self._colours = {name: at % _COLOURS + 1 for at, name in enumerate(names)}

    def laid(self) -> Laid:
        """All charts of all runs."""
        charts: dict[str, list[Chart]] = {}
        flat: dict[str, list[str]] = {}
        for spec, title, metric in self._metrics():
            lines = tuple(self._lines(metric))
            named = msgspec.structs.replace(spec, title=title, bands=(), spread=())
            if spec.least == 0.0 and not any(any(line.mean) for line in lines):
                flat.setdefault(spec.section, []).append(title)
            else:
                charts.setdefault(spec.section, []).append(Chart(key=metric, spec=named, lines=lines))
        sections = [
            Section(title=name, charts=tuple(charts.get(name, ())), flat=tuple(flat.get(name, ())))
            for name in dict.fromkeys((*charts, *flat))
        ]
        if any(run.held_out for run in self._found.runs):
            sections.insert(1, self._held_out())  # after the reward
        within = [self._found.runs[place].name for group in self._bands.values() for place in group.runs]
        return Laid(sections=tuple(sections), axes=tuple(self._axes), colours=self._colours, within=tuple(within))

    def _metrics(self) -> Iterator[tuple[ChartSpec, str, str]]:
        """(chart, title, metric) of each metric that a run has, in the order in which they are looked at."""
        there = dict.fromkeys(
            metric
            for run in self._found.runs
            for metric, curve in run.picture.metrics.curves.items()
            if any(value is not None for value in curve.mean)
        )
        for key, spec in CHARTS.items():
            lines = [(metric, name) for metric, name in lines_of(key) if metric in there]
            if spec.of_names is not None:
                lines += [(metric, name) for metric in there if (name := named_by(metric, spec.of_names))]
            for metric, name in lines:
                yield spec, spec.title if len(lines) == 1 else f"{spec.title}: {name}", metric
            parts = [(metric, name) for metric in there if (name := function_of(metric))] if spec.parts else []
            if len(parts) > 1:
                for metric, name in parts:
                    yield spec, f"{spec.title}: {name}", metric
        others = dict.fromkeys(
            (chart.spec, line.name)
            for run in self._found.runs
            for section in sections_of(run.picture)
            if section.title == _OTHERS
            for chart in section.charts
            for line in chart.lines
        )
        for spec, metric in others:
            yield spec, metric, metric

    def _lines(self, metric: str) -> Iterator[Line]:
        """Bands first, so that single runs are drawn over them."""
        values = {}
        for place, run in enumerate(self._found.runs):
            curve = run.picture.metrics.curves.get(metric)
            if curve is not None:
                values[place] = _means(curve.mean, self._joined[place])
        for group in self._bands.values():
            points = {place: _points(self._axes[place].step, values[place]) for place in group.runs if place in values}
            if len(points) > 1:
                yield self._band(group, points)
        for place, mean in values.items():
            name = self._found.runs[place].name
            yield Line(name=name, mean=mean, axes=place, run=name, colour=self._colours[name])

    def _band(self, group: Group, points: Mapping[int, Sequence[tuple[float, float]]]) -> Line:
        """The mean of the seeds, and from the least to the most of them, at the steps that two of them have."""
        steps = sorted({step for one in points.values() for step, _ in one})
        seen = [
            (int(step), [value for one in points.values() if (value := _at(one, step)) is not None]) for step in steps
        ]
        seen = [(step, values) for step, values in seen if len(values) > 1]
        axes = self._axes_of([step for step, _ in seen], list(points))
        return Line(
            name=group.name,
            mean=tuple(fmean(values) for _, values in seen),
            bands=((tuple(min(values) for _, values in seen), tuple(max(values) for _, values in seen)),),
            axes=axes,
            run=group.name,
            colour=self._colours[group.name],
        )

    def _axes_of(self, steps: Sequence[int], places: Sequence[int]) -> int:
        """The place of axes at these steps, where the runs are on average."""
        ways: list[Values] = []
        for name in ("time", "tokens"):
            there = [_points(self._axes[p].step, values) for p in places if (values := getattr(self._axes[p], name))]
            ways.append(tuple(_mean_at(there, step) for step in steps) if there else ())
        return self._place_of(Axes(step=tuple(steps), time=ways[0], tokens=ways[1]))

    def _held_out(self) -> Section:
        """Each figure of each set, by the version that was evaluated."""
        charts = []
        for name in dict.fromkeys(name for run in self._found.runs for name in run.held_out):
            there = [run.held_out[name] for run in self._found.runs if name in run.held_out]
            for figure, same in distinct_figures(there).items():
                lines = tuple(self._held_out_lines(name, figure))
                if not figure.startswith(HEADLINES) and not any(any(line.mean) for line in lines):
                    continue
                about = "By the steps learned from; bars are standard errors."
                about += f" The same as {', '.join(same)}." if same else ""
                about += "".join(
                    f" {run.name} from step {run.held_out[name].since:,} on, before under other conditions."
                    for run in self._found.runs
                    if name in run.held_out and run.held_out[name].changes
                )
                written = "percent" if is_share(figure) else "number"
                least = None if figure.startswith(HEADLINES) else 0.0
                spec = ChartSpec(_HELD_OUT, f"{name}: {figure}", about, written, least=least, smooth=False)
                charts.append(Chart(key=f"eval/{name}/{figure}", spec=spec, lines=lines))
        return Section(title=_HELD_OUT, charts=tuple(charts))

    def _held_out_lines(self, name: str, figure: str) -> Iterator[Line]:
        """Each run, and the mean of the seeds of one configuration with their band."""
        curves = {}
        for place, run in enumerate(self._found.runs):
            if name in run.held_out and (points := run.held_out[name].compared(figure)):
                curves[place] = points
        for group in self._bands.values():
            there = {
                place: [(float(point.version), point.value) for point in curves[place]]
                for place in group.runs
                if place in curves
            }
            if len(there) > 1:
                yield msgspec.structs.replace(self._band(group, there), points=True)
        for place, points in curves.items():
            run = self._found.runs[place]
            axes = Axes.of(run.picture.metrics).at(point.version for point in points)
            yield Line(
                name=run.name,
                mean=tuple(point.value for point in points),
                errors=tuple(point.se for point in points) if any(point.se for point in points) else (),
                points=True,
                axes=self._place_of(axes),
                run=run.name,
                colour=self._colours[run.name],
            )

    def _place_of(self, axes: Axes) -> int:
        if axes not in self._axes:
            self._axes.append(axes)
        return self._axes.index(axes)


def _ends(values: Sequence[T], join: int) -> tuple[T, ...]:
    """The last of each `join` values."""
    return tuple(values[min(at + join, len(values)) - 1] for at in range(0, len(values), join))


def _means(values: Sequence[float | None], join: int) -> Values:
    """The mean of each `join` values, of those that are known."""
    if join == 1:
        return tuple(values)
    parts = (_known(values[at : at + join]) for at in range(0, len(values), join))
    return tuple(fmean(part) if part else None for part in parts)


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _points(xs: Sequence[float], values: Values) -> list[tuple[float, float]]:
    return [(x, value) for x, value in zip(xs, values, strict=True) if value is not None]


def _at(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """The height of a line at a place between its first and its last point."""
    place = bisect_left(points, (x,))
    if place < len(points) and points[place][0] == x:
        return points[place][1]
    if not 0 < place < len(points):
        return None
    (left, low), (right, high) = points[place - 1], points[place]
    return low + (high - low) * (x - left) / (right - left)


def _mean_at(lines: Sequence[Sequence[tuple[float, float]]], x: float) -> float | None:
    values = _known(_at(line, x) for line in lines)
    return fmean(values) if values else None
