"""Which charts a run gets: metrics by their names → sections of charts."""

from collections.abc import Iterator, Sequence

import msgspec

from troupe.records.figures import CHARTS, FIGURES, ChartSpec, function_of, lines_of, named_by
from troupe.records.held_out import HeldOut, changes_told, is_share
from troupe.records.report.picture import RunPicture

Values = tuple[float | None, ...]
Band = tuple[Values, Values]
"""The lower and the upper edge of a place about a line."""

_MOST_LINES = 6
"""In one chart of rewards; more make another chart."""
_MOST_NAMED = 8
"""Lines of a chart that whatever has a name adds to."""
_OF_SOME_STEPS = "eval_"
"""What metrics begin with that only some steps have."""
_PARTS = ChartSpec("Reward", "Parts of the reward", "Mean score of each reward function, not weighted.", least=None)
_HELD_OUT = "Held-out rows"
_ABOUT_SETS = "By the steps that the policy had learned from; bars are standard errors."
_OF_A_SET = ("accuracy", "avg@", "pass@", "maj@")
_MOST_OTHERS = 24
"""Charts of metrics that are not ours."""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a chart."""

    name: str
    mean: Values
    bands: tuple[Band, ...] = ()
    """About it, the widest first."""
    errors: Values = ()
    """Half the width of each value's error bar; empty where it has none."""
    points: bool = False
    """Whether each value is a dot."""
    axes: int = 0
    """Which of the chart's `axes` its values belong to."""
    run: str = ""
    """Of several runs, the one that it is of."""
    colour: int = 0
    """1 to 8; 0: by its place in the chart."""
    dashed: bool = False


class Chart(msgspec.Struct, frozen=True, kw_only=True):
    """A chart with the lines that a run has of it."""

    key: str
    """A name for files."""
    spec: ChartSpec
    lines: tuple[Line, ...]


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """Charts that are looked at together."""

    title: str
    charts: tuple[Chart, ...]
    flat: tuple[str, ...] = ()
    """Titles of those that were 0 throughout, and are left out."""


_OURS = (
    "rewards/",
    "completions/",
    "advantages/",
    "clip_ratio/",
    "covariance/",
    "sampling/",
    "groups/",
    "queue/",
    "time/",
    "diagnosis/",
    "tokens/",
)
"""How metrics begin that are no reward's own."""


def sections_of(run: RunPicture) -> tuple[Section, ...]:
    """The charts of a run, in the order in which they are looked at; those without a value are left out."""
    found: dict[str, list[Chart]] = {}
    for key, spec in CHARTS.items():
        charts = found.setdefault(spec.section, [])
        if (chart := _chart(run, key, spec)) is not None:
            charts.append(chart)
        if spec.parts:
            charts += _parts(run, alone=chart is None)
    found["Other metrics"] = _others(run)
    sections = [_section(title, charts) for title, charts in found.items() if charts]
    if (held_out := held_out_section(run)) is not None:
        sections.insert(min(1, len(sections)), held_out)
    return tuple(sections)


def held_out_section(run: RunPicture) -> Section | None:
    """A chart of each set that several versions were evaluated on; None without any. The lines of the n-th set have
    the n-th axes after those of the run."""
    charts = []
    for place, held_out in enumerate(run.held_out.values(), 1):
        lines: dict[Values, Line] = {}
        for figure in held_out.figures:
            if figure.startswith(_OF_A_SET) and len(held_out.versions) > 1:
                for line in _lines_of_set(held_out, figure, place):
                    lines.setdefault(line.mean, line)  # the same where a row has one sample, or passes or fails
        if lines:
            some = tuple(lines.values())[:_MOST_LINES]
            title = f"{held_out.name}: {some[0].name}" if len(some) == 1 else held_out.name
            written = "percent" if all(is_share(line.name.split(" ")[0]) for line in some) else "number"
            about = " ".join([_ABOUT_SETS, *changes_told(held_out)])
            spec = ChartSpec(_HELD_OUT, title, about, written, least=None, smooth=False)
            charts.append(Chart(key=f"held_out_{place}", spec=spec, lines=some))
    return Section(title=_HELD_OUT, charts=tuple(charts)) if charts else None


def _lines_of_set(held_out: HeldOut, figure: str, axes: int) -> Iterator[Line]:
    """A line for each stretch of versions that can be compared, the newest first."""
    for stretch in reversed(held_out.stretches(figure)):
        known = {point.version: point for point in stretch}
        there = [known.get(version) for version in held_out.versions]
        last = stretch[-1].version
        yield Line(
            name=figure if last >= held_out.since else f"{figure} to step {last:,}",
            mean=tuple(None if point is None else point.value for point in there),
            errors=tuple(None if point is None else point.se for point in there),
            points=True,
            axes=axes,
        )


def _section(title: str, charts: Sequence[Chart]) -> Section:
    flat = [chart for chart in charts if chart.spec.least == 0.0 and not any(any(line.mean) for line in chart.lines)]
    shown = tuple(chart for chart in charts if chart not in flat)
    return Section(title=title, charts=shown, flat=tuple(chart.spec.title for chart in flat))


def _chart(run: RunPicture, key: str, spec: ChartSpec) -> Chart | None:
    there = [(metric, name) for metric, name in lines_of(key) if _has(run, metric)]
    if spec.of_names is not None:
        named = [(metric, named_by(metric, spec.of_names)) for metric in run.metrics.curves if _has(run, metric)]
        there += [(metric, name) for metric, name in named if name][:_MOST_NAMED]
    if not there:
        return None
    lines = [_line(run, metric, name, band=len(there) == 1) for metric, name in there]
    if spec.spread or spec.bands:
        lines[0] = msgspec.structs.replace(lines[0], bands=tuple(_bands(run, spec, lines[0].mean)))
    return Chart(key=key, spec=spec, lines=tuple(lines))


def _bands(run: RunPicture, spec: ChartSpec, middle: Values) -> Iterator[Band]:
    """The bands about a line; none where what makes them is not measured."""
    measured = [(low, high) for low, high in spec.bands if _has(run, low) and _has(run, high)]
    for low, high in measured:
        lower, upper = run.metrics.curves[low], run.metrics.curves[high]
        is_extreme = low.partition("/")[2].startswith("min")  # of the steps of a point the very least and most
        yield (lower.low, upper.high) if is_extreme and lower.low else (lower.mean, upper.mean)
    half = next((run.metrics.curves[metric].mean for metric in spec.spread if _has(run, metric)), None)
    if half is not None and not measured:
        known = [value for value in middle if value is not None]
        pairs = list(zip(middle, half, strict=True))
        yield (
            tuple(None if m is None or s is None else max(m - s, min(known)) for m, s in pairs),
            tuple(None if m is None or s is None else min(m + s, max(known)) for m, s in pairs),
        )


def _line(run: RunPicture, metric: str, name: str, *, band: bool = False) -> Line:
    curve = run.metrics.curves[metric]
    bands = ((curve.low, curve.high),) if band and curve.low else ()
    return Line(name=name, mean=curve.mean, bands=bands, points=metric.startswith(_OF_SOME_STEPS))


def _has(run: RunPicture, metric: str) -> bool:
    curve = run.metrics.curves.get(metric)
    return curve is not None and any(value is not None for value in curve.mean)


def _parts(run: RunPicture, *, alone: bool) -> Iterator[Chart]:
    """The reward functions, where there are several, or nothing says what they come to."""
    parts = {name: metric for metric in run.metrics.curves if (name := function_of(metric)) and _has(run, metric)}
    if len(parts) < 2 and not (parts and alone):
        return
    lines = [_line(run, metric, name) for name, metric in parts.items()]
    for start in range(0, len(lines), _MOST_LINES):
        number = "" if start == 0 else f"_{start // _MOST_LINES + 1}"
        some = tuple(lines[start : start + _MOST_LINES])
        yield Chart(key=f"reward_parts{number}", spec=_PARTS, lines=some)


def _others(run: RunPicture) -> list[Chart]:
    """What depends on the loss and has no chart, and what rewards log."""
    known = {metric for metric, figure in FIGURES.items() if figure.chart or figure.of != "loss"}
    named = [spec.of_names for spec in CHARTS.values() if spec.of_names is not None]
    names = [
        name
        for name in run.metrics.curves
        if name not in known
        and not name.startswith(_OURS)
        and not any(named_by(name, ends) for ends in named)
        and _has(run, name)
    ]
    return [
        Chart(
            key=f"logged_{number}",
            spec=ChartSpec("Other metrics", name, least=None),
            lines=(_line(run, name, name, band=True),),
        )
        for number, name in enumerate(names[:_MOST_OTHERS], 1)
    ]
