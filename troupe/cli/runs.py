"""`troupe runs`: the runs in a folder, a line each."""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import msgspec

from troupe.cli.commands import report_errors
from troupe.cli.status import duration
from troupe.cli.tables import Column, screen_width, table
from troupe.records.compare.listing import Ends, ListedRun, find_runs, list_run
from troupe.records.compare.words import figure_told
from troupe.records.text import MISSING
from troupe.records.trend import area
from troupe.runtime.terminal import tell, tell_json

_COLUMNS = (
    Column("run", most=48),
    Column("state"),
    Column("steps", right=True, goes=2),
    Column("reward", goes=1),
    Column("trend", goes=5),
    Column("held-out", goes=4),
    Column("teacher KL", goes=5),
    Column("diagnosis", goes=3),
    Column("when", goes=6),
    Column("took", right=True, goes=7),
    Column("data", goes=8),
    Column("model", goes=9),
    Column("seed", right=True, goes=10),
)
_DAY_S = 86_400.0
_TREND = 12
"""Letters."""


def _last(ends: Ends) -> float:
    return -float("inf") if ends[1] is None else ends[1]


_SORTS: dict[str, Callable[[ListedRun], tuple[object, ...]]] = {
    "when": lambda run: (-(run.newest_unix_s or 0.0), run.name),
    "name": lambda run: (run.name,),
    "reward": lambda run: (-_last(run.reward), run.name),
    "held-out": lambda run: (-_last(run.held_out), run.name),
    "steps": lambda run: (-run.step, run.name),
    "state": lambda run: (run.state or "", run.name),
    "took": lambda run: (-(run.seconds or 0.0), run.name),
}


@click.command(short_help="List the runs in a folder.")
@click.argument("folder", metavar="[DIR]", default="runs", type=click.Path(path_type=Path))
@click.option(
    "--sort",
    type=click.Choice(list(_SORTS)),
    default="when",
    show_default=True,
    help="What comes first: newest, best, …",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a run.")
@report_errors
def runs(folder: Path, *, sort: str, as_json: bool) -> None:
    """List the runs in DIR and in the folders in it: how each stands, and what came of it.

    Rewards and scores on held-out rows are those of the first and of the newest step or evaluation.
    """
    found = [list_run(run, _name(run, folder)) for run in find_runs(folder)]
    found.sort(key=_SORTS[sort])
    if as_json:
        for run in found:
            tell_json(msgspec.json.encode(run).decode())
        return
    if not found:
        tell(f"{folder}: there is no run in this folder, or in those in it")
        return
    for line in show_runs(found, screen_width(), time.time(), sys.stdout.encoding):
        tell(line)


def _name(run: Path, folder: Path) -> str:
    return run.absolute().name if run == folder else str(run.relative_to(folder))


def show_runs(found: Sequence[ListedRun], width: int, now_s: float, encoding: str = "utf-8") -> list[str]:
    """The table of the runs, and below it what is to be known of some. `now_s`: unix seconds."""
    rows = [_row(run, now_s, encoding) for run in found]
    notes = [f"{run.name}: {run.note}" for run in found if run.note and run.state is not None]
    return [*table(_COLUMNS, rows, width), *([""] if notes else []), *notes]


def _row(run: ListedRun, now_s: float, encoding: str) -> list[str]:
    if run.state is None:
        return [run.name, f"damaged: {run.note}"]
    of = "" if run.total_steps is None else f"/{run.total_steps:,}"
    return [
        run.name,
        run.state,
        f"{run.step:,}{of}",
        _ends(run.reward),
        area(run.trend, _TREND, encoding=encoding)[0] if len(run.trend) > 1 else "",
        _ends(run.held_out, run.held_out_metric),
        _ends(run.teacher_kl),
        _findings(run.findings),
        _when(run.newest_unix_s, now_s),
        "" if run.seconds is None else duration(run.seconds),
        run.data or "",
        run.model or "",
        "" if run.seed is None else str(run.seed),
    ]


def _ends(ends: Ends, metric: str | None = None) -> str:
    first, last = (_figure(end, metric) for end in ends)
    return "" if ends == (None, None) else f"{first} → {last}"


def _figure(value: float | None, metric: str | None) -> str:
    if value is None:
        return MISSING
    return figure_told((metric or "").rpartition("/")[2], value)


def _findings(rules: Sequence[str]) -> str:
    """The first, and how many more."""
    return "" if not rules else rules[0] if len(rules) == 1 else f"{rules[0]} (+{len(rules) - 1})"


def _when(unix_s: float | None, now_s: float) -> str:
    """How long ago within a day, else the day."""
    if unix_s is None:
        return ""
    ago_s = now_s - unix_s
    if not 0 <= ago_s < _DAY_S:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_s))
    return f"{ago_s / 60:.0f} min ago" if ago_s < 3600 else f"{ago_s / 3600:.0f} h ago"
