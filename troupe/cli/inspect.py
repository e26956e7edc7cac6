"""`troupe inspect`: an overview of a run, or its completions.

What a policy wrote may hold anything, and so may names, so control characters are shown as escapes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import click
import msgspec
from msgspec.structs import replace
from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from troupe.cli.commands import Number, report_errors
from troupe.errors import InputError, OutputError
from troupe.messages import ClosedState
from troupe.records.conversations import INDENT, SPEAKER, conversation_of, observed_within, shortened
from troupe.records.conversations import as_text as conversation_text
from troupe.records.layout import CHANGES, METRICS
from troupe.records.store.read import Choice, Overview, Query, StoredCompletion, StoredRun, open_store
from troupe.records.text import MISSING, date, plain_text, prompt_text, seconds, shown, size
from troupe.runtime.terminal import tell, tell_json

_MOST_SHOWN = 20
"""Completions that a person is shown where no number was asked for."""
_MOST_OF_A_TEXT = 1000
"""Characters of what is said in a conversation, where it is not asked for whole."""
_DIGITS = 19
"""Numbers of so many may be more than a store can hold."""
_OF_A_RUN = (METRICS, CHANGES)
"""What a run itself writes, of files that an export may be called like."""
_PATH = click.Path(path_type=Path)
_COUNT = click.IntRange(min=1, max=2**31)


@click.command(name="inspect", short_help="Look into a run, also while it goes on.")
@click.argument("out", metavar="OUT_DIR", type=_PATH)
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
@click.option("--full", is_flag=True, help="Long texts of a conversation, such as results of tools, whole.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, or one a completion.")
@click.option("--jsonl", type=_PATH, metavar="FILE", help="Write all that fit to a file, one JSON object each.")
@report_errors
def inspect(
    out: Path,
    *,
    step: str | None,
    best: int | None,
    worst: int | None,
    random: int | None,
    full: bool,
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
            tell_overview(run, out, as_json=as_json, full=full)
            return
        query = query_for(run, chosen=chosen, step=step, everywhere=jsonl is not None, **conditions)
        if jsonl is not None:
            tell(f"{export(run, query, jsonl)} completions written to {jsonl}")
        else:
            tell_completions(run, query, as_json=as_json, full=full)


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """One part of what is shown: a table, and under it a text."""

    title: str
    rows: Sequence[Sequence[str]] = ()
    text: str = ""
    what: str = "completion"
    """That the text is."""


def query_for(
    run: StoredRun, *, chosen: Mapping[Choice, int | None], step: str | None, everywhere: bool, **conditions: Any
) -> Query:
    """The query that the options mean. InputError where they contradict each other, or the run.

    `chosen`: "best", "worst", "random" → how many. `step`: a number, "last" or "all"; None is "last", but "all" where
    completions are looked for `everywhere` or by gid. `conditions`: as in `Query`.
    """
    asked = {choice: count for choice, count in chosen.items() if count is not None}
    if len(asked) > 1:
        raise InputError(f"{' and '.join(f'--{choice}' for choice in asked)}: give one of them")
    choice: Choice = next(iter(asked), "all")
    step = step or ("all" if everywhere or conditions.get("gid") is not None else "last")
    if step == "last":
        number = (run.step_range() or (None, None))[1]
    elif step == "all":
        number = None
    elif step.isdecimal() and len(step) < _DIGITS:
        number = int(step)
        if not run.has_step(number):
            raise InputError(f"--step {step}: {_steps_there(run)}")
    else:
        raise InputError(f"--step {step}: give the number of a step, from 1, or 'last', or 'all'")
    names = run.reward_names()
    if (reward := conditions.get("reward")) is not None and names and reward not in names:
        raise InputError(f"--reward {reward}: the run has no such reward; it has {', '.join(names)}")
    return Query(choice=choice, count=asked.get(choice), step=number, **conditions)


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
    _print(show_overview(overview, folder, extremes, full=full))


def tell_completions(run: StoredRun, query: Query, *, as_json: bool, full: bool = False) -> None:
    """Print the completions of a query."""
    if as_json:
        for completion in run.completions(query):
            tell_json(msgspec.json.encode(completion).decode())
        return
    _print(show_completions(run, query, full=full))


def export(run: StoredRun, query: Query, path: Path) -> int:
    """Write the completions of a query to a file, one JSON object a line; how many. OutputError where it cannot be
    written, or is a file of the run."""
    count = 0
    try:
        target = path.resolve()
        is_exported = target.suffix == ".jsonl" and target.name not in _OF_A_RUN
        if path.exists() and target.is_relative_to(run.path.parent.resolve()) and not is_exported:
            raise OutputError(f"{path}: this is a file of the run; give another name, or a file outside its folder")
        with path.open("wb") as file:
            for completion in run.completions(query):
                file.write(msgspec.json.encode(completion) + b"\n")
                count += 1
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}") from None
    return count


def show_overview(
    overview: Overview, folder: Path, extremes: Mapping[Choice, StoredCompletion], *, full: bool = False
) -> Iterator[Block]:
    """What happened, and some completions."""
    yield Block(title=str(folder), rows=_facts(overview))
    if overview.rewards:
        rows = [(name, _number(first), _number(newest)) for name, (first, newest) in overview.rewards.items()]
        yield Block(title="Rewards", rows=[("", "first step", "newest step"), *rows])
    if overview.incidents:
        newest = overview.newest_incidents
        rows = [(kind, str(n), newest.get(kind, "")) for kind, n in overview.incidents.items()]
        yield Block(title="Incidents, with the newest of each kind", rows=rows)
    if overview.checkpoints:
        written = [
            (f"step {found.version}", size(found.bytes), f"{found.seconds:.2f} s", found.folder)
            for found in overview.checkpoints
        ]
        yield Block(title="Checkpoints", rows=written)
    for choice, completion in extremes.items():
        yield _completion(completion, f"{choice.capitalize()} of step {completion.step}: ", full=full)


def newest_extremes(run: StoredRun, overview: Overview) -> dict[Choice, StoredCompletion]:
    """The best and the worst completion of the newest step, where it has any with a reward."""
    choices: tuple[Choice, ...] = ("best", "worst")
    found = {
        choice: list(run.completions(Query(choice=choice, count=1, step=overview.newest_step))) for choice in choices
    }
    return {choice: completions[0] for choice, completions in found.items() if completions}


def show_completions(run: StoredRun, query: Query, most: int = _MOST_SHOWN, *, full: bool = False) -> Iterator[Block]:
    """The completions of a query, one by one; `most` where it names no number. `full`: long texts of conversations
    whole."""
    count = 0
    for completion in run.completions(replace(query, count=query.count or most)):
        count += 1
        yield _completion(completion, full=full)
    left = run.count(query) - count if query.count is None else 0
    if left > 0:
        yield Block(title=f"{left} more: ask for fewer, or for a number (--best K), or write them out (--jsonl FILE)")
    elif not count:
        yield Block(title="there is no such completion")


def as_text(block: Block) -> str:
    """A block for a file or a pipe: columns in line, nothing but text."""
    block = _shown_block(block)
    count = max((len(row) for row in block.rows), default=0)
    widths = [max(len(row[i]) for row in block.rows if i < len(row)) for i in range(count)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in block.rows]
    text = [f"  {block.what}:", block.text] if block.text else []
    return "\n".join([block.title, *(f"  {line}".rstrip() for line in lines), *text, ""])


def as_renderable(block: Block) -> RenderableType:
    """A block for a terminal."""
    block = _shown_block(block)
    if not block.rows:
        return Text(block.title, style="dim")
    table = Table(
        title=Text(block.title, style="bold"), title_justify="left", box=box.SIMPLE, show_header=False, pad_edge=False
    )
    for _ in range(max(len(row) for row in block.rows)):
        table.add_column(overflow="fold")
    for row in block.rows:
        table.add_row(*map(Text, row))
    if not block.text:
        return table
    grid = Table.grid()
    grid.add_row(table)
    is_talk = block.what == "conversation"
    grid.add_row(Panel(_conversation(block.text) if is_talk else Text(block.text), box=box.ROUNDED))
    return grid


def _conversation(text: str) -> RenderableType:
    """Nothing but who speaks stands at the left edge, also where lines are folded."""
    return Group(
        *(
            Text(line, style="bold")
            if line.startswith(SPEAKER)
            else Padding(Text(line.removeprefix(INDENT)), (0, 0, 0, len(INDENT)))
            for line in text.split("\n")
        )
    )


def _shown_block(block: Block) -> Block:
    """Names, folders and kinds may hold anything, as completions may."""
    rows = [[shown(cell) for cell in row] for row in block.rows]
    return replace(block, title=shown(block.title), rows=rows, text=shown(block.text))


def _print(blocks: Iterable[Block]) -> None:
    console = Console()
    for block in blocks:
        if console.is_terminal:
            console.print(as_renderable(block))
        else:
            tell(as_text(block))


def _facts(overview: Overview) -> list[tuple[str, str]]:
    groups = ", ".join(f"{count} {state}" for state, count in overview.groups.items()) or "none"
    starts = [
        f"{date(start.unix_s)} after step {start.first_step} (process {start.pid}, Troupe {start.troupe})"
        for start in overview.starts
    ]
    return [
        ("steps", str(overview.steps)),
        ("groups", groups),
        ("completions", str(overview.completions)),
        *(("start" if i == 0 else "", text) for i, text in enumerate(starts)),
    ]


def _completion(completion: StoredCompletion, before: str = "", *, full: bool = False) -> Block:
    place = f"group {completion.gid}, sample {completion.sample}"
    facts = [
        ("reward", _number(completion.reward)),
        ("advantage", _number(completion.advantage)),
        *((f"score {name}", _number(score)) for name, score in completion.scores.items()),
        *((name, plain_text(value)) for name, value in completion.extra.items()),
        *((name, plain_text(value)) for name, value in (completion.columns or {}).items()),
        ("ended by", completion.finish_reason),
        ("tokens", f"{len(completion.token_ids)} by policy {describe_versions(completion.versions)}"),
        *_episode_facts(completion),
    ]
    title = f"{before}{place}, {completion.state} in step {completion.step}, row {completion.row}"
    if completion.episode is None:
        prompt = ("prompt", prompt_text(completion.prompt) or MISSING)
        return Block(title=title, rows=[*facts, prompt], text=completion.text)
    said = conversation_of(completion)
    text = conversation_text(said if full else shortened(said, _MOST_OF_A_TEXT))
    return Block(title=title, rows=facts, text=text, what="conversation")


def _episode_facts(completion: StoredCompletion) -> Iterator[tuple[str, str]]:
    if (episode := completion.episode) is None:
        return
    observed = observed_within(episode.observed, 0, len(completion.token_ids))
    yield "observed", f"{observed} of the tokens"
    turns = f"{len(episode.turns)}, waited {seconds(sum(turn.answer.seconds for turn in episode.turns))}"
    yield "turns", turns
    yield "environment", episode.environment or "tools alone"
    if episode.reward is not None:
        yield "its reward", _number(episode.reward)
    if episode.failed:
        yield "failed", episode.failed
    if episode.attributes:
        yield "at the end", plain_text(episode.attributes)


def describe_versions(versions: Sequence[tuple[int, int]]) -> str:
    """Which versions of the policy sampled how many tokens."""
    if len(versions) == 1:
        return f"version {versions[0][0]}"
    return "versions " + ", ".join(f"{version} ({tokens})" for version, tokens in versions)


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4g}"
