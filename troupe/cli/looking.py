"""The commands that only look: `inspect` and `doctor`. Quick to import, and without MLX where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click
import msgspec

from troupe.cli import doctor as machine_doctor
from troupe.cli import inspect as inspecting
from troupe.cli.terminal import Number, report_errors
from troupe.messages import ClosedState
from troupe.records.store.read import Choice, open_store
from troupe.runtime.terminal import tell, tell_json

_FOLDER = click.Path(path_type=Path)
_HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
_COUNT = click.IntRange(min=1, max=2**31)


@click.command(name="inspect", context_settings=_HELP, short_help="Look into a run, also while it goes on.")
@click.argument("out", metavar="OUT_DIR", type=_FOLDER)
@click.option(
    "--step", metavar="N|last|all", help="Completions of this step.  [default: last; all with --gid, --jsonl]"
)
@click.option("--best", type=_COUNT, metavar="K", help="The K completions with the highest reward.")
@click.option("--worst", type=_COUNT, metavar="K", help="The K completions with the lowest reward.")
@click.option("--random", type=_COUNT, metavar="K", help="K completions by lot.")
@click.option("--min-reward", "least", type=Number(), metavar="X", help="Only those with at least this reward.")
@click.option("--max-reward", "most", type=Number(), metavar="X", help="Only those with at most this reward.")
@click.option("--reward", metavar="NAME", help="Look at this score, not at the weighted sum of all.")
@click.option("--state", type=click.Choice(get_args(ClosedState)), help="Only those of groups that ended so.")
@click.option("--gid", type=click.IntRange(min=0, max=2**63 - 1), metavar="G", help="Only those of this group.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, or one a completion.")
@click.option("--jsonl", type=_FOLDER, metavar="FILE", help="Write all that fit to a file, one JSON object each.")
@report_errors
def inspect(
    out: Path,
    *,
    step: str | None,
    best: int | None,
    worst: int | None,
    random: int | None,
    as_json: bool,
    jsonl: Path | None,
    **conditions: Any,
) -> None:
    """Look into a run, also while it goes on: what happened, and what the policy wrote for which reward.

    Without options: an overview, with the best and the worst completion of the newest step.
    """
    chosen: dict[Choice, int | None] = {"best": best, "worst": worst, "random": random}
    with open_store(out) as run:
        if jsonl is None and step is None and not any(v is not None for v in (*chosen.values(), *conditions.values())):
            inspecting.tell_overview(run, out, as_json=as_json)
            return
        query = inspecting.query_for(run, chosen=chosen, step=step, everywhere=jsonl is not None, **conditions)
        if jsonl is not None:
            tell(f"{inspecting.export(run, query, jsonl)} completions written to {jsonl}")
        else:
            inspecting.tell_completions(run, query, as_json=as_json)


@click.command(name="doctor", context_settings=_HELP, short_help="Tell what this machine gives, and lacks.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Tell what this machine gives, what is slow, and how to mend it."""
    report = machine_doctor.examine()
    if as_json:
        tell_json(msgspec.json.encode(report).decode())
    else:
        tell(machine_doctor.describe(report))
