"""What `troupe inspect` shows, as blocks: each a table, and under it a text; in a terminal, a file or a pipe.

What a policy wrote may hold anything, and so may names, so control characters are shown as escapes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace
from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from troupe.records.conversations import INDENT, SPEAKER, conversation_of, observed_within, shortened
from troupe.records.conversations import as_text as conversation_text
from troupe.records.store.completions import Choice, Query, StoredCompletion
from troupe.records.store.read import Overview, StoredRun
from troupe.records.text import MISSING, date, plain_text, prompt_text, seconds, shown, size
from troupe.runtime.terminal import tell

_MOST_SHOWN = 20
"""Completions that a person is shown where no number was asked for."""
_MOST_OF_A_TEXT = 1000
"""Characters of what is said in a conversation, where it is not asked for whole."""


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """One part of what is shown: a table, and under it a text."""

    title: str
    rows: Sequence[Sequence[str]] = ()
    text: str = ""
    what: str = "completion"
    """That the text is."""


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
        yield Block(title=f"{left} more: ask for fewer, or for a number (--best K), or write them out (--export FILE)")
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


def print_blocks(blocks: Iterable[Block]) -> None:
    """Tables in a terminal, lines elsewhere."""
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
