"""What is told of several runs, on the terminal and on the page: figures with titles, settings, paired tests."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import msgspec

from troupe.records import text as words
from troupe.records.compare.held_out import HEADLINES, distinct_figures, paired
from troupe.records.compare.runs import ComparedRun, Group, RunComparison
from troupe.records.held_out import HeldOut, Point, is_share
from troupe.records.text import MISSING
from troupe.rewards.estimates import Comparison


class Figure(msgspec.Struct, frozen=True):
    """A figure of a run."""

    title: str
    of: Callable[[ComparedRun], float | None]
    written: Callable[[float], str]
    goes: int = 0
    """Those with the highest number are left out first where there is no room."""


def short(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}".replace("-", "−")


def run_figures(found: RunComparison) -> list[Figure]:
    """What is told of each run besides its name and how far it is."""
    if all(run.figures.last is None for run in found.runs):
        return _held_out_figures(found)
    level = found.level.reward
    soon = [
        Figure(f"steps to {level:g}", lambda run: run.figures.reached_step, lambda value: f"{value:,.0f}", 3),
        Figure(f"time to {level:g}", lambda run: run.figures.reached_s, words.seconds, 4),
    ]
    return [
        Figure("first", lambda run: run.figures.first, short, 6),
        Figure("last", lambda run: run.figures.last, short),
        Figure("best", lambda run: run.figures.best, short, 1),
        Figure("area", lambda run: run.figures.area, short, 5),
        *(soon if level is not None else ()),
        *_held_out_figures(found),
        Figure("tokens", lambda run: run.picture.tokens, words.number, 8),
        Figure("time", lambda run: run.picture.seconds, words.seconds, 7),
    ]


def _held_out_figures(found: RunComparison) -> list[Figure]:
    """The most telling one of the first set that all runs were asked; none where there is no such set."""
    name = next((name for name in found.runs[0].held_out if all(name in run.held_out for run in found.runs)), None)
    if name is None:
        return []
    figure = found.runs[0].held_out[name].headline

    def newest(run: ComparedRun) -> float | None:
        points = run.held_out[name].compared(figure)
        return points[-1].value if points else None

    return [Figure(f"{name} {figure}", newest, lambda value: figure_told(figure, value), 2)]


def about_figures(found: RunComparison) -> str:
    """What the figures are, in a sentence."""
    level = found.level
    steps = "one step" if level.window == 1 else f"{level.window:,} steps"
    return (
        f"First, last and best are mean rewards of {steps}; area is the mean reward of steps 1 to {level.steps:,}, "
        "which all runs have made."
    )


def figures_told(run: ComparedRun, figures: Sequence[Figure]) -> list[str]:
    """The figures of a run; a dash where nothing tells one."""
    return [MISSING if (value := figure.of(run)) is None else figure.written(value) for figure in figures]


def told_together(members: Sequence[ComparedRun], figures: Sequence[Figure]) -> list[str]:
    """Of each figure the mean of several runs, and from the least to the most; and how many have it, where not all."""
    return [told_of([figure.of(run) for run in members], figure.written) for figure in figures]


def told_of(values: Sequence[float | None], written: Callable[[float], str]) -> str:
    """Mean, and from the least to the most, of those that are known; and how many are, where not all."""
    known = [value for value in values if value is not None]
    if not known:
        return MISSING
    least, most = written(min(known)), written(max(known))
    told = least if least == most else f"{written(fmean(known))} ({least}–{most})"
    return told if len(known) == len(values) else f"{told}, {len(known)} of {len(values)}"


def steps_told(run: ComparedRun) -> str:
    """Steps done, and how many there will be."""
    of = "" if run.picture.total_steps is None else f"/{run.picture.total_steps:,}"
    return f"{run.picture.step:,}{of}"


def setting_rows(found: RunComparison) -> list[list[str]]:
    """Each setting that differs: its key, and its value in each group; of other seeds, all."""
    return [[one.key, *(_value_in(group, one.values) for group in found.groups)] for one in found.differences]


def _value_in(group: Group, values: Sequence[Any]) -> str:
    return ", ".join(dict.fromkeys(_setting(values[place]) for place in group.runs))


def _setting(value: Any) -> str:
    """As it is written in a configuration; a dash where it is not said."""
    if value is None:
        return MISSING
    return value if isinstance(value, str) and value else msgspec.json.encode(value, enc_hook=str).decode()


class HeldOutTable(msgspec.Struct, frozen=True, kw_only=True):
    """What runs came to on a set."""

    name: str
    base: str
    """The run that the others are set against."""
    figures: tuple[str, ...]
    rows: tuple[tuple[str, str, tuple[str, ...], str], ...]
    """Run, newest version, figures, and how it differs from the base."""

    @property
    def is_paired(self) -> bool:
        """Whether anything is told of differences."""
        return any(against for *_, against in self.rows)


_MOST_FIGURES = 4
_PASS = "pass@"


def held_out_tables(found: RunComparison) -> Iterator[HeldOutTable]:
    """A table for each set of rows."""
    for name in dict.fromkeys(name for run in found.runs for name in run.held_out):
        there = [run for run in found.runs if name in run.held_out]
        figures = _most_telling([run.held_out[name] for run in there])
        base = there[0]
        rows = []
        for group in found.groups:
            members = [run for place in group.runs if name in (run := found.runs[place]).held_out]
            for run in members:
                held_out = run.held_out[name]
                told = tuple(_ends(figure, held_out.compared(figure)) for figure in figures)
                against = "" if run is base else _against(base.held_out[name], held_out)
                rows.append((run.name, f"{held_out.newest:,}", told, against))
            if len(members) > 1:
                told = tuple(_newest_together(members, name, figure) for figure in figures)
                rows.append((group.name, f"{len(members)} seeds", told, ""))
        yield HeldOutTable(name=name, base=base.name, figures=tuple(figures), rows=tuple(rows))


def _most_telling(runs: Sequence[HeldOut]) -> list[str]:
    """The figures of a set that a table has: of pass@k the largest k, and none that is 0 throughout."""
    figures = [
        figure
        for figure in distinct_figures(runs)
        if figure.startswith(HEADLINES) or any(p.value for run in runs for p in run.compared(figure))
    ]
    largest = max((f for f in figures if f.startswith(_PASS)), key=lambda f: int(f.removeprefix(_PASS)), default="")
    return [f for f in figures if f == largest or f == figures[0] or not f.startswith(_PASS)][:_MOST_FIGURES]


def _newest_together(members: Sequence[ComparedRun], name: str, figure: str) -> str:
    """A figure's mean over runs at last, and from the least to the most."""
    points = [run.held_out[name].compared(figure) for run in members]
    return told_of([one[-1].value if one else None for one in points], partial(figure_told, figure))


def _against(base: HeldOut, other: HeldOut) -> str:
    if not base.rows and not other.rows:
        return ""
    pair = paired(base, other)
    return "no row of both is stored" if pair is None else pair_told(pair)


def pair_told(pair: Comparison) -> str:
    """What a paired test says, on one line."""
    between = "" if pair.low is None or pair.high is None else f" ({pair.low:+.3f} to {pair.high:+.3f})"
    difference = f"{pair.difference:+.3f}{between}".replace("-", "−")
    return f"{difference}: {pair.verdict}; {pair.counts}"


def _ends(figure: str, points: Sequence[Point]) -> str:
    """A figure at first and at last, with the error of the latter."""
    if not points:
        return MISSING
    first, last = points[0], points[-1]
    error = "" if last.se is None else f" ± {figure_told(figure, float(f'{last.se:.2g}'))}"
    now = f"{figure_told(figure, last.value)}{error}"
    return now if first is last else f"{figure_told(figure, first.value)} → {now}"


def figure_told(figure: str, value: float) -> str:
    """A figure of a set of rows, such as `accuracy` or `avg@4`."""
    return f"{100 * value:.1f} %" if is_share(figure) else short(value)
