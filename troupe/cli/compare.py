"""`troupe compare`: runs beside each other."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import msgspec

from troupe.cli.commands import Number, report_errors
from troupe.cli.report import ask_status
from troupe.cli.status import duration
from troupe.cli.tables import Column, lines_width, screen_width, table
from troupe.records import text as words
from troupe.records.compare.held_out import HeldOut, Point, paired
from troupe.records.compare.listing import find_runs
from troupe.records.compare.runs import ComparedRun, Group, RunComparison, read_runs
from troupe.records.text import MISSING
from troupe.rewards.estimates import Comparison
from troupe.runtime.terminal import tell, tell_json

Figure = tuple[str, Callable[[ComparedRun], float | None], Callable[[float], str]]
"""Its title, what it is of a run, and how that is written."""
_MOST_FIGURES = 4
"""Of a set of rows."""


@click.command(short_help="Set runs beside each other.")
@click.argument("folders", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--reach", type=Number(), metavar="X", help="Count how soon each run has this reward.  [default: one that all had]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@report_errors
def compare(folders: tuple[Path, ...], *, reach: float | None, as_json: bool) -> None:
    """Set runs beside each other: which settings differ, what each came to, and whether that is more than noise.

    RUN is the folder of a run, or one that runs lie in. Held-out rows are compared with the first run's, row by row.
    """
    found = read_runs(run_folders(folders), ask_status, reach)
    if as_json:
        tell_json(msgspec.json.encode(as_builtins(found)).decode())
        return
    for line in show(found, screen_width()):
        tell(line)


def run_folders(folders: Sequence[Path]) -> list[Path]:
    """The runs that are meant: a folder that runs lie in stands for all of them."""
    return [run for folder in folders for run in (list(find_runs(folder)) if folder.is_dir() else []) or [folder]]


def show(found: RunComparison, width: int) -> Iterator[str]:
    """What is told of the runs, line by line."""
    yield from _runs(found, width)
    level = found.level
    steps = f"mean of {level.window:,} step{'' if level.window == 1 else 's'}"
    yield f"reward: {steps}; area: mean reward of steps 1 to {level.steps:,}, which all have made"
    if found.differences:
        yield from ["", "Settings that differ", *_settings(found, width)]
    else:
        yield from ["", "No setting differs."]
    for name in dict.fromkeys(name for run in found.runs for name in run.held_out):
        yield from ["", f"Held-out rows: {name}", *_held_out(found, name, width)]
    notes = [f"{run.name}: {note}" for run in found.runs for note in run.picture.notes]
    yield from ["", *notes] if notes else []


def _figures(found: RunComparison) -> list[Figure]:
    level = found.level.reward
    soon = (
        []
        if level is None
        else [
            (f"steps to {level:g}", lambda run: run.figures.reached_step, _whole),
            (f"time to {level:g}", lambda run: run.figures.reached_s, duration),
        ]
    )
    return [
        ("first", lambda run: run.figures.first, _short),
        ("last", lambda run: run.figures.last, _short),
        ("best", lambda run: run.figures.best, _short),
        ("area", lambda run: run.figures.area, _short),
        *soon,
        ("tokens", lambda run: run.picture.tokens, words.number),
        ("time", lambda run: run.picture.seconds, duration),
    ]  # fmt: skip


def _runs(found: RunComparison, width: int) -> Iterator[str]:
    """Each run, and under those that differ in their seeds alone what they came to together."""
    figures = _figures(found)
    goes = {"last": 0, "best": 1, "area": 4, "first": 5, "tokens": 7, "time": 6}
    columns = [
        Column("run", most=40),
        Column("state", goes=2),
        Column("steps", right=True, goes=3),
        *(Column(title, right=True, goes=goes.get(title, 3)) for title, _, _ in figures),
    ]
    rows = []
    for group in found.groups:
        members = [found.runs[place] for place in group.runs]
        rows += [_row(run, figures) for run in members]
        if len(members) > 1:
            rows.append([group.name, f"{len(members)} seeds", "", *(_together(members, figure) for figure in figures)])
    yield from table(columns, rows, width)


def _row(run: ComparedRun, figures: Sequence[Figure]) -> list[str]:
    of = "" if run.picture.total_steps is None else f"/{run.picture.total_steps:,}"
    values = [(value(run), written) for _, value, written in figures]
    told = [MISSING if value is None else written(value) for value, written in values]
    return [run.name, run.picture.state, f"{run.picture.step:,}{of}", *told]


def _together(members: Sequence[ComparedRun], figure: Figure) -> str:
    """Mean, and between the least and the most, of those that have a value; and how many have, where not all do."""
    _, value_of, written = figure
    values = [value for run in members if (value := value_of(run)) is not None]
    if not values:
        return MISSING
    least, most = written(min(values)), written(max(values))
    told = least if least == most else f"{written(fmean(values))} ({least}–{most})"
    return told if len(values) == len(members) else f"{told}, {len(values)} of {len(members)}"


def _settings(found: RunComparison, width: int) -> Iterator[str]:
    """A column for each group of runs; seeds are listed in it. Where there is no room, who has which value."""
    columns = [Column("", most=48), *(Column(group.name, most=36) for group in found.groups)]
    rows = [
        [difference.key, *(_value_of(group, difference.values) for group in found.groups)]
        for difference in found.differences
    ]
    if lines_width(columns, rows) <= width:
        yield from table(columns, rows, width)
        return
    for key, *values in rows:
        yield key
        for value in dict.fromkeys(values):
            who = ", ".join(group.name for group, other in zip(found.groups, values, strict=True) if other == value)
            yield f"  {value}: {who}"


def _value_of(group: Group, values: Sequence[Any]) -> str:
    return ", ".join(dict.fromkeys(setting_text(values[place]) for place in group.runs))


def setting_text(value: Any) -> str:
    """A setting as it is written in a configuration; a dash where it is not said."""
    if value is None:
        return MISSING
    return value if isinstance(value, str) and value else msgspec.json.encode(value).decode()


def _held_out(found: RunComparison, name: str, width: int) -> Iterator[str]:
    """Each run's newest figures on a set, and how it differs from the first run that was asked it."""
    there = [run for run in found.runs if name in run.held_out]
    figures = list(dict.fromkeys(figure for run in there for figure in run.held_out[name].figures))[:_MOST_FIGURES]
    base = there[0]
    columns = [
        Column("run"),
        Column("version", right=True, goes=2),
        *(Column(figure, right=True, goes=0 if at == 0 else 1 + at) for at, figure in enumerate(figures)),
        Column(f"against {base.name}", goes=1, most=90),
    ]
    rows = []
    for run in there:
        held_out = run.held_out[name]
        newest = max(points[-1].version for points in held_out.figures.values())
        told = [_ends(figure, held_out.figures.get(figure, ())) for figure in figures]
        rows.append([run.name, f"{newest:,}", *told, "" if run is base else _against(base.held_out[name], held_out)])
    yield from table(columns, rows, width)


def _against(base: HeldOut, other: HeldOut) -> str:
    if not base.rows and not other.rows:
        return ""
    pair = paired(base, other)
    return "no row of both is stored" if pair is None else pair_text(pair)


def pair_text(pair: Comparison) -> str:
    """What a paired test says, on one line."""
    said = "more than noise" if pair.is_more_than_noise else "may be noise"
    between = "" if pair.low is None or pair.high is None else f" ({pair.low:+.3f} to {pair.high:+.3f})"
    rows = f"{len(pair.better):,} rows better, {len(pair.worse):,} worse, {pair.ties:,} alike"
    return f"{pair.difference:+.3f}{between}, p {pair.p:.2g}: {said}; {rows}".replace("-", "−")


def _ends(figure: str, points: Sequence[Point]) -> str:
    if not points:
        return MISSING
    last = points[-1]
    error = "" if last.se is None else f" ± {figure_text(figure, last.se)}"
    return f"{figure_text(figure, points[0].value)} → {figure_text(figure, last.value)}{error}"


def figure_text(figure: str, value: float) -> str:
    """A figure of a set of rows, as people read it."""
    is_share = figure == "accuracy" or figure.startswith(("pass@", "maj@"))
    return f"{100 * value:.1f} %" if is_share else f"{value:.3g}".replace("-", "−")


def _short(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def as_builtins(found: RunComparison) -> dict[str, Any]:
    """The same for a program: all figures, and every run's pairs with the first on rows of both."""
    runs = []
    for run in found.runs:
        picture = run.picture
        told = {"name": run.name, "folder": picture.folder, "state": picture.state, "step": picture.step}
        told |= {"total_steps": picture.total_steps, "seed": run.seed, "tokens": picture.tokens}
        told |= {"seconds": picture.seconds, "reward": run.figures, "notes": picture.notes}
        told["held_out"] = {name: held_out.figures for name, held_out in run.held_out.items()}
        told["against_first"] = {
            name: pair
            for name, held_out in run.held_out.items()
            if run is not found.runs[0]
            and name in found.runs[0].held_out
            and (pair := paired(found.runs[0].held_out[name], held_out)) is not None
        }
        runs.append(told)
    groups = [{"name": group.name, "runs": [found.runs[place].name for place in group.runs]} for group in found.groups]
    settings = {one.key: list(one.values) for one in found.differences}
    return {"level": found.level, "runs": runs, "groups": groups, "settings": settings}
