"""`troupe compare`: runs beside each other."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec

from troupe.cli.commands import Number, report_errors
from troupe.cli.report import ask_status
from troupe.cli.tables import ANY_WIDTH, Column, lines_width, screen_width, table
from troupe.records.compare.held_out import paired
from troupe.records.compare.listing import runs_meant
from troupe.records.compare.runs import RunComparison, read_runs
from troupe.records.compare.words import (
    HeldOutTable,
    about_figures,
    figures_told,
    held_out_tables,
    run_figures,
    setting_rows,
    steps_told,
    told_together,
)
from troupe.runtime.terminal import tell, tell_json


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
    found = read_runs(runs_meant(folders), ask_status, reach)
    if as_json:
        tell_json(msgspec.json.encode(as_builtins(found)).decode())
        return
    for line in show(found, screen_width()):
        tell(line)


def show(found: RunComparison, width: int) -> Iterator[str]:
    """What is told of the runs, line by line."""
    yield from _runs(found, width)
    yield about_figures(found)
    if found.differences:
        yield from ["", "Settings that differ", *_settings(found, width)]
    else:
        yield from ["", "No setting differs."]
    for one in held_out_tables(found):
        yield from ["", f"Held-out rows: {one.name}", *_held_out(one, width)]
    findings = [f"{run.name}: {told}" for run in found.runs if (told := run.picture.diagnosis)]
    yield from ["", *findings] if findings else []
    notes = [f"{run.name}: {note}" for run in found.runs for note in run.picture.notes]
    yield from ["", *notes] if notes else []


def _runs(found: RunComparison, width: int) -> Iterator[str]:
    """Each run, and under those that differ in their seeds alone what they came to together."""
    figures = run_figures(found)
    columns = [
        Column("run", most=40),
        Column("state", goes=2),
        Column("steps", right=True, goes=3),
        *(Column(figure.title, right=True, goes=figure.goes) for figure in figures),
    ]
    rows = []
    for group in found.groups:
        members = [found.runs[place] for place in group.runs]
        rows += [[run.name, run.picture.state, steps_told(run), *figures_told(run, figures)] for run in members]
        if len(members) > 1:
            rows.append([group.name, f"{len(members)} seeds", "", *told_together(members, figures)])
    yield from table(columns, rows, width)


def _settings(found: RunComparison, width: int) -> Iterator[str]:
    """A column for each group of runs; where there is no room, who has which value."""
    columns = [Column("", most=48), *(Column(group.name, most=36) for group in found.groups)]
    rows = setting_rows(found)
    if lines_width(columns, rows) <= width:
        yield from table(columns, rows, width)
        return
    for key, *values in rows:
        yield key
        for value in dict.fromkeys(values):
            who = ", ".join(group.name for group, other in zip(found.groups, values, strict=True) if other == value)
            yield f"  {value}: {who}"


def _held_out(one: HeldOutTable, width: int) -> Iterator[str]:
    """Each run's figures on a set, and below how it differs from the first run that was asked it."""
    columns = [
        Column("run"),
        Column("version", right=True, goes=1),
        *(Column(figure, right=True, goes=0 if at == 0 else 1 + at) for at, figure in enumerate(one.figures)),
    ]
    yield from table(columns, [[run, version, *figures] for run, version, figures, _ in one.rows], width)
    if one.is_paired:
        told = [[run, against] for run, _, _, against in one.rows if against]
        yield from table([Column(f"against {one.base}"), Column("", most=200)], told, ANY_WIDTH)


def as_builtins(found: RunComparison) -> dict[str, Any]:
    """The same for a program: all figures, and every run's pairs with the first on rows of both."""
    runs = []
    for run in found.runs:
        picture = run.picture
        told = {"name": run.name, "folder": picture.folder, "state": picture.state, "step": picture.step}
        told |= {"total_steps": picture.total_steps, "seed": run.seed, "tokens": picture.tokens}
        told |= {"seconds": picture.seconds, "reward": run.figures, "notes": picture.notes}
        told["findings"] = picture.findings
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
