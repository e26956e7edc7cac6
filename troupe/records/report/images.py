"""The charts of a run as PNG files, drawn by matplotlib (the extra `report`)."""

import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from troupe.errors import InputError, OutputError, remedy
from troupe.records import text as words
from troupe.records.figures import OVERVIEW
from troupe.records.report.charts import Chart, sections_of
from troupe.records.report.picture import RunPicture

_COLOURS = ("#3a55c9", "#d9622b", "#12877f", "#9a3fb5", "#5f8d1d", "#c2306b", "#b88300", "#6d7684")
_TEXT, _MUTED, _GRID = "#1d1f24", "#676b75", "#e6e6e0"
_FORMATS = {"percent": words.percent, "seconds": words.seconds}
_SMOOTHING = 0.6
_ENOUGH_TO_SMOOTH = 3


def require_matplotlib() -> None:
    """InputError where matplotlib is not there."""
    if find_spec("matplotlib") is None:
        raise InputError(f"pictures are drawn by matplotlib, which is not installed; {remedy('report')}")


def write_pictures(run: RunPicture, folder: Path) -> list[Path]:
    """Draw every chart of a run into `folder`, one file each, and the most telling ones together as `overview.png`.

    Raises InputError without matplotlib, OutputError where the folder cannot be written.
    """
    require_matplotlib()
    charts = [chart for section in sections_of(run) for chart in section.charts]
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, drawn in _figures(run, charts):
            path = folder / f"{re.sub(r'[^a-z0-9_]', '_', name)}.png"
            drawn.savefig(path, dpi=160)
            written.append(path)
    except OSError as error:
        raise OutputError(
            f"{folder}: pictures cannot be written: {error}; name another place (--out FILE.html)"
        ) from None
    return written


def _figures(run: RunPicture, charts: Sequence[Chart]) -> Iterator[tuple[str, Any]]:
    from matplotlib.figure import Figure  # draws without any display

    by_key = {chart.key: chart for chart in charts}
    if chosen := [by_key[key] for key in OVERVIEW if key in by_key]:
        figure = Figure(figsize=(12.0, 3.1 * -(-len(chosen) // 2)), layout="constrained")
        axes = figure.subplots(-(-len(chosen) // 2), 2, squeeze=False).flatten()
        for place, chart in zip(axes, chosen, strict=False):
            _draw(place, run.metrics.steps, chart)
        for place in axes[len(chosen) :]:
            place.axis("off")
        yield "overview", figure
    for chart in charts:
        figure = Figure(figsize=(7.0, 3.6), layout="constrained")
        _draw(figure.subplots(), run.metrics.steps, chart)
        yield chart.key, figure


def _draw(axes: Any, steps: Sequence[int], chart: Chart) -> None:
    for number, line in enumerate(chart.lines):
        colour = _COLOURS[number % len(_COLOURS)]
        y = [_or_gap(value) for value in line.mean]
        for band in line.bands:
            low, high = ([_or_gap(value) for value in edge] for edge in band)
            axes.fill_between(steps, low, high, color=colour, alpha=0.14, linewidth=0)
        smooth = chart.spec.smooth and not line.points and len(y) >= _ENOUGH_TO_SMOOTH
        marker = "o" if len(y) == 1 or line.points else None
        axes.plot(
            steps, y, color=colour, linewidth=1.0 if smooth else 1.6, alpha=0.35 if smooth else 1.0, marker=marker,
            label=None if smooth else _plain(line.name),
        )  # fmt: skip
        if smooth:
            axes.plot(steps, _smoothed(line.mean), color=colour, linewidth=1.8, label=_plain(line.name))
    axes.set_title(_plain(chart.spec.title), loc="left", fontsize=11, fontweight="bold", color=_TEXT)
    axes.set_xlabel("step", fontsize=9, color=_MUTED)
    axes.tick_params(labelsize=9, colors=_MUTED, length=0)
    axes.grid(visible=True, axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_GRID)
    if (told := _FORMATS.get(chart.spec.format)) is not None:
        axes.yaxis.set_major_formatter(lambda value, _: told(value))
    if chart.spec.least is not None:
        axes.set_ylim(bottom=chart.spec.least)
    if len(chart.lines) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=_MUTED)


def _or_gap(value: float | None) -> float:
    return float("nan") if value is None else value


def _smoothed(values: Sequence[float | None]) -> list[float]:
    """The moving average of the page as it begins, freed of its start (`smoothedBy` in series.js); gaps stay gaps."""
    means, last, count = [], 0.0, 0
    for value in values:
        if value is not None:
            last, count = last * _SMOOTHING + (1 - _SMOOTHING) * value, count + 1
        means.append(float("nan") if value is None else last / (1 - _SMOOTHING**count))
    return means


def _plain(text: str) -> str:
    """Text in which no `$` begins a formula."""
    return text.replace("$", r"\$")
