"""`troupe inspect`: an overview of a run, or its completions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import click
import msgspec

from troupe.cli.blocks import newest_extremes, print_blocks, show_completions, show_overview
from troupe.cli.commands import Number, report_errors
from troupe.cli.rows import RowOrder, tell_rows
from troupe.errors import InputError, OutputError
from troupe.messages import ClosedState, FinishReason
from troupe.records.export import export
from troupe.records.layout import CHANGES, METRICS
from troupe.records.store.completions import Choice, Query
from troupe.records.store.read import StoredRun, open_store
from troupe.runtime.terminal import tell, tell_json

_DIGITS = 19
"""Numbers of so many may be more than a store can hold."""
_OF_A_RUN = (METRICS, CHANGES)
"""What a run itself writes, of files that an export may be called like."""
_PATH = click.Path(path_type=Path)
_COUNT = click.IntRange(min=1, max=2**31)
_ANY_WHOLE = click.IntRange(min=0, max=2**63 - 1)


@click.command(name="inspect", short_help="Look into a run, also while it goes on.")
@click.argument("out", metavar="OUT_DIR", type=_PATH)
@click.option(
    "--step",
    "--steps",
    metavar="N|A:B|last|all",
    help="Completions of this step, or of those from A to B.  [default: last; all with --gid, --row, --text, --prompt "
    "and files]",
)
@click.option("--best", type=_COUNT, metavar="K", help="The K completions with the highest reward.")
@click.option("--worst", type=_COUNT, metavar="K", help="The K completions with the lowest reward.")
@click.option("--longest", type=_COUNT, metavar="K", help="The K completions with the most tokens.")
@click.option("--shortest", type=_COUNT, metavar="K", help="The K completions with the fewest tokens.")
@click.option("--random", type=_COUNT, metavar="K", help="K completions by lot.")
@click.option("--min-reward", "least", type=Number(), metavar="X", help="Only those with at least this reward.")
@click.option("--max-reward", "most", type=Number(), metavar="X", help="Only those with at most this reward.")
@click.option("--reward", metavar="NAME", help="Look at this score, not at the weighted sum of all.")
@click.option("--state", type=click.Choice(get_args(ClosedState)), help="Only those of groups that ended so.")
@click.option("--finish-reason", type=click.Choice(get_args(FinishReason)), help="Only those that ended so.")
@click.option("--gid", type=_ANY_WHOLE, metavar="G", help="Only those of this group.")
@click.option("--row", type=_ANY_WHOLE, metavar="R", help="Only those to the prompt of this dataset row, from 0.")
@click.option("--text", metavar="TEXT", help="Only those that hold this text, in letters of either case.")
@click.option("--prompt", metavar="TEXT", help="Only those to prompts that hold this text.")
@click.option("--rows", is_flag=True, help="What became of each row of the dataset: pass rates, pool, lengths.")
@click.option(
    "--sort",
    type=click.Choice(get_args(RowOrder)),
    help="With --rows: which come first.  [default: pass-rate, the lowest first]",
)
@click.option("--limit", type=_COUNT, metavar="K", help="With --rows: so many.  [default: 20; all with --json]")
@click.option("--full", is_flag=True, help="Long texts of a conversation, such as results of tools, whole.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, or one a completion.")
@click.option("--jsonl", type=_PATH, metavar="FILE", help="Write all that is stored of those that fit, as --json does.")
@click.option(
    "--export",
    "table",
    type=_PATH,
    metavar="FILE",
    help="Write those that fit as a dataset, prompt, completion, reward …: .jsonl, or .parquet.",
)
@report_errors
def inspect(
    out: Path,
    *,
    step: str | None,
    full: bool,
    as_json: bool,
    jsonl: Path | None,
    table: Path | None,
    rows: bool,
    sort: RowOrder | None,
    limit: int | None,
    **asked: Any,
) -> None:
    """Look into a run, also while it goes on: what happened, and what the policy wrote for which reward.

    Without options: an overview, with the best and the worst completion of the newest step.
    """
    choices: tuple[Choice, ...] = ("best", "worst", "longest", "shortest", "random")
    chosen: dict[Choice, int | None] = {choice: asked.pop(choice) for choice in choices}
    file = jsonl or table
    if jsonl is not None and table is not None:
        raise InputError("--jsonl and --export: give one of them")
    if not rows and (sort is not None or limit is not None):
        raise InputError(f"{'--limit' if sort is None else '--sort'}: this goes with --rows")
    with open_store(out) as run:
        if rows:
            reward = asked.pop("reward")
            if full or any(value is not None for value in (file, step, *chosen.values(), *asked.values())):
                raise InputError("--rows: of the other options --reward, --sort, --limit and --json go with it")
            tell_rows(run, out, reward=reward, order=sort or "pass-rate", limit=limit, as_json=as_json)
            return
        if file is None and step is None and not any(v is not None for v in (*chosen.values(), *asked.values())):
            tell_overview(run, out, as_json=as_json, full=full)
            return
        query = query_for(run, chosen=chosen, step=step, everywhere=file is not None, **asked)
        if file is not None:
            check_target(run, file)
            count = export(run.completions(query), file, whole=jsonl is not None)
            tell(f"{count} completions written to {file}")
        else:
            tell_completions(run, query, as_json=as_json, full=full)


def query_for(
    run: StoredRun, *, chosen: Mapping[Choice, int | None], step: str | None, everywhere: bool, **conditions: Any
) -> Query:
    """The query that the options mean. InputError where they contradict each other, or the run.

    `chosen`: "best", "worst", … → how many. `step`: a number, "A:B", "last" or "all"; None is "last", but "all" where
    completions are looked for `everywhere`, by gid or row, or by what they say. `conditions`: as in `Query`.
    """
    asked = {choice: count for choice, count in chosen.items() if count is not None}
    if len(asked) > 1:
        raise InputError(f"{' and '.join(f'--{choice}' for choice in asked)}: give one of them")
    choice: Choice = next(iter(asked), "all")
    if step is None:
        by_itself = any(conditions.get(name) is not None for name in ("gid", "row", "text", "prompt"))
        step = "all" if everywhere or by_itself else "last"
    names = run.reward_names()
    if (reward := conditions.get("reward")) is not None and names and reward not in names:
        raise InputError(f"--reward {reward}: the run has no such reward; it has {', '.join(names)}")
    return Query(choice=choice, count=asked.get(choice), **_steps(run, step), **conditions)


def _steps(run: StoredRun, step: str) -> dict[str, Any]:
    """The fields of a `Query` that `--step` means."""
    if step == "last":
        return {"step": (run.step_range() or (None, None))[1]}
    if step == "all":
        return {}
    if _is_number(step):
        if not run.has_step(int(step)):
            raise InputError(f"--step {step}: {_steps_there(run)}")
        return {"step": int(step)}
    first, colon, last = step.partition(":")
    if not colon or not (first or last) or not all(map(_is_number, filter(None, (first, last)))):
        raise InputError(f"--step {step}: give the number of a step, from 1, or two as 10:20, or 'last', or 'all'")
    if first and last and int(first) > int(last):
        raise InputError(f"--step {step}: the first step comes first; give {last}:{first}")
    return {"first_step": int(first) if first else None, "last_step": int(last) if last else None}


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < _DIGITS


def _steps_there(run: StoredRun) -> str:
    there = run.step_range()
    if there is None:
        return "no step is stored yet"
    first, newest = there
    if first == newest:
        return f"the run has step {newest} only; give that, or 'last', or 'all'"
    return f"the run has the steps {first} to {newest}; give one of them, or 'last', or 'all'"


def tell_overview(run: StoredRun, folder: Path, *, as_json: bool, full: bool = False) -> None:
    """Print what happened, and the best and the worst completion of the newest step."""
    overview = run.overview()
    extremes = newest_extremes(run, overview)
    if as_json:
        tell_json(msgspec.json.encode({**msgspec.to_builtins(overview), **extremes}).decode())
        return
    print_blocks(show_overview(overview, folder, extremes, full=full))


def tell_completions(run: StoredRun, query: Query, *, as_json: bool, full: bool = False) -> None:
    """Print the completions of a query."""
    if as_json:
        for completion in run.completions(query):
            tell_json(msgspec.json.encode(completion).decode())
        return
    print_blocks(show_completions(run, query, full=full))


def check_target(run: StoredRun, path: Path) -> None:
    """OutputError where a file cannot be written, or is one of the run's."""
    try:
        target = path.resolve()
        is_exported = target.suffix in (".jsonl", ".parquet") and target.name not in _OF_A_RUN
        if path.exists() and target.is_relative_to(run.path.parent.resolve()) and not is_exported:
            raise OutputError(f"{path}: this is a file of the run; give another name, or a file outside its folder")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}") from None
