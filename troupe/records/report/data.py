"""What the script of a page draws, as it reads it: charts, their axes and marks, bars."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from troupe.records import text as words
from troupe.records.curves import Thinned
from troupe.records.figures import named_by
from troupe.records.report.charts import Chart, Line, Values
from troupe.records.report.picture import RunPicture
from troupe.records.text import shown

_LONGEST_NAME = 100
"""Characters of what is told of a line."""
_MOST_WAITS = 12
"""Environments and tools of which is told how long they took."""
_ACTORS = (
    "generator",
    "environment",
    "teacher",
    "scorer",
    "learner",
    "evaluator",
    "checkpointer",
    "prompter",
    "metrics",
)
_BESIDE = {
    "environment": "environments",
    "reward": "rewards",
    "checkpoint": "checkpoints",
    "logging": "logging",
    "evaluation": "evaluation",
}


class Axes(msgspec.Struct, frozen=True, kw_only=True):
    """Along what the values of lines may be drawn: as many places of each as there are values."""

    step: tuple[int, ...]
    time: Values = ()
    """Seconds of training since the run's start; empty where nobody knows."""
    tokens: Values = ()
    """Tokens of the run so far; empty where nobody knows."""

    @classmethod
    def of(cls, metrics: Thinned) -> "Axes":
        """Those of a run's curves."""
        return cls(step=metrics.steps, time=metrics.seconds, tokens=metrics.tokens)

    def at(self, steps: Iterable[int]) -> "Axes":
        """Those of points at these steps, such as versions that were evaluated: where the run was by then."""
        places = [(step, bisect_right(self.step, step) - 1) for step in steps]

        def seen(values: Values) -> Values:
            return tuple(values[place] if place >= 0 else 0.0 for _, place in places) if values else ()

        return Axes(step=tuple(step for step, _ in places), time=seen(self.time), tokens=seen(self.tokens))


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """A step that every chart marks."""

    step: int
    time: float | None = None
    tokens: float | None = None
    label: str


def marks_of(run: RunPicture) -> list[Mark]:
    """Where the run went on from a checkpoint."""
    starts = [start for start in run.stored.starts if start.first_step]
    places = Axes.of(run.metrics).at(start.first_step for start in starts)
    return [
        Mark(
            step=start.first_step,
            time=places.time[i] if places.time else None,
            tokens=places.tokens[i] if places.tokens else None,
            label=f"start {start.start}, {words.date(start.unix_s)}",
        )
        for i, start in enumerate(starts)
    ]


def chart_data(charts: Iterable[Chart], axes: Sequence[Axes], marks: Sequence[Mark] = ()) -> dict[str, Any]:
    """What `drawCharts` takes; keys as `charts.js` names them. Lines name their entry of `axes` by its place."""
    return {
        "axes": [
            {name: all_rounded(values, 9) for name, values in msgspec.to_builtins(one).items() if values}
            for one in axes
        ],
        "marks": [msgspec.to_builtins(mark) for mark in marks],
        "charts": [_chart_data(chart) for chart in charts],
    }


def bars_of(run: RunPicture) -> dict[str, list[dict[str, Any]]]:
    """Name of a card with bars → its rows, as `bars.js` names them."""
    return {"actors": _actor_bars(run), "beside": _beside_bars(run), "waits": _wait_bars(run)}


def _chart_data(chart: Chart) -> dict[str, Any]:
    spec = chart.spec
    told: dict[str, Any] = {"key": chart.key, "title": shown_name(spec.title), "about": spec.about}
    told |= {"format": spec.format, "series": [dict(_series(line)) for line in chart.lines]}
    told |= {"smooth": True} if spec.smooth else {}
    return told | ({"min": spec.least} if spec.least is not None else {})


def _series(line: Line) -> Iterator[tuple[str, Any]]:
    yield "name", shown_name(line.name)
    yield "y", all_rounded(line.mean)
    if line.bands:
        yield "bands", [{"low": all_rounded(low), "high": all_rounded(high)} for low, high in line.bands]
    if line.errors:
        yield "errors", all_rounded(line.errors)
    more = {"points": line.points, "axes": line.axes, "run": line.run, "color": line.colour, "dashed": line.dashed}
    yield from ((name, value) for name, value in more.items() if value)


def shown_name(text: str) -> str:
    """A name that others gave, harmless and not too long."""
    return shown(text[:_LONGEST_NAME])


def all_rounded(values: Sequence[float | None], digits: int = 5) -> list[float | None]:
    """Values as a page is given them."""
    return [rounded(value, digits) for value in values]


def rounded(value: float | None, digits: int = 5) -> float | None:
    """So many digits, by default more than any chart shows; None of what is not finite. Whole numbers stay."""
    if value is None or isinstance(value, int):
        return value
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _actor_bars(run: RunPicture) -> list[dict[str, Any]]:
    shares = run.metrics.sums.shares
    there = {name.partition("/")[0] for name in shares}
    rows = []
    for actor in [*(a for a in _ACTORS if a in there), *sorted(there - set(_ACTORS))]:
        busy, idle = shares.get(f"{actor}/busy", 0.0), shares.get(f"{actor}/idle", 0.0)
        parts = [
            {"name": "at work", "value": rounded(busy), "kind": "busy"},
            {"name": "waiting", "value": rounded(idle), "kind": "wait"},
            {"name": "the rest", "value": rounded(max(0.0, 1.0 - busy - idle)), "kind": "idle"},
        ]
        rows.append({"name": actor, "note": f"{words.percent(busy)} at work", "parts": parts})
    return rows


def _beside_bars(run: RunPicture) -> list[dict[str, Any]]:
    rows = []
    for name, label in _BESIDE.items():
        hidden, exposed = (run.metrics.sums.totals.get(f"{name}/{part}_s") for part in ("hidden", "exposed"))
        if hidden is None or exposed is None:
            continue
        parts = [
            {"name": "hidden under device work", "value": rounded(hidden), "kind": 3},
            {"name": "exposed: training waited", "value": rounded(exposed), "kind": 2},
        ]
        note = f"{words.seconds(hidden)} hidden, {words.seconds(exposed)} exposed"
        rows.append({"name": label, "note": note, "parts": parts})
    return rows


def _wait_bars(run: RunPicture) -> list[dict[str, Any]]:
    """How long calls and episodes took, by tool and environment, over all steps; those that took most first."""
    means = {}
    for name, curve in run.metrics.curves.items():
        tool, environment = named_by(name, ("tools/", "/wait_s")), named_by(name, ("environments/", "/wait_s"))
        label = f"{tool}, a call" if tool else f"{environment}, an episode" if environment else ""
        label = "an episode" if name == "environments/wait_s" else label
        if label and (values := [value for value in curve.mean if value is not None]):
            means[label] = math.fsum(values) / len(values)
    rows = []
    for label, mean_s in sorted(means.items(), key=lambda item: -item[1])[:_MOST_WAITS]:
        parts = [{"name": "waited, on average", "value": rounded(mean_s), "kind": "wait"}]
        rows.append({"name": shown_name(label), "note": words.seconds(mean_s), "parts": parts})
    return rows
