"""Completions as pages browse them: lines of a list, one of them whole, its tokens, and a chosen part of a run's.

Texts are as they were written: whoever shows them does it as text, and control characters as escapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from troupe.errors import InputError
from troupe.records.conversations import Said, conversation_of, observed_within, shortened
from troupe.records.layout import RUN_TOML
from troupe.records.store.completions import Key, Query, StoredCompletion
from troupe.records.store.read import StoredRun, open_store
from troupe.records.text import plain_text, prompt_text
from troupe.runtime.files import read_toml

if TYPE_CHECKING:
    from troupe.policy.text.tokenizer import Tokenizer

_STARTS = 240
"""Characters of a text in a list."""
_TEXT, _PROMPT, _SAID, _MOST_SAID, _COLUMN, _NAME = 200_000, 20_000, 6000, 60, 2000, 100
"""Characters of a text, a prompt, what is said at once in a conversation, how much of it, a dataset column, a name."""
_IN_A_PAGE_TEXT, _IN_A_PAGE_TOKENS, _IN_A_PAGE = 8000, 4000, 1_000_000
"""In a page that carries them: characters of a text, tokens of which figures are shown, bytes of all completions."""
_MOST_IN_A_PAGE = 400
_STEPS, _ROWS, _OF_A_ROW = 40, 8, 20
"""Steps and dataset rows that a page follows, and groups of each row."""


class _Shown(msgspec.Struct, frozen=True, kw_only=True):
    """What every view of a completion says of it."""

    gid: str
    """As text: JavaScript rounds whole numbers above 2^53."""
    sample: int
    step: int
    row: int | None
    state: str
    reward: float | None
    advantage: float | None
    tokens: int
    """Without those that it only read."""
    finish_reason: str


class Line(_Shown, frozen=True, kw_only=True):
    """A completion in a list."""

    start: str
    """How its text begins, or where it holds what is looked for."""


class Opened(_Shown, frozen=True, kw_only=True, omit_defaults=True):
    """A completion with all that a page shows of it."""

    scores: dict[str, float | None]
    text: str
    left_out: int = 0
    """Characters of it."""
    prompt: str = ""
    prompt_number: int | None = None
    """Where the prompt stands in a list of prompts, and not here."""
    policy: str = ""
    """Which versions made it."""
    columns: dict[str, str] = {}
    said: tuple[Said, ...] = ()
    colours: tuple[str, ...] = ()
    """What is stored of each token: "log_probs" …"""
    of_tokens: dict[str, Any] | None = None
    """What `tokens_of` gives, where it comes along."""


def line_of(completion: StoredCompletion, sought: str | None = None) -> Line:
    """A completion as a line of a list; `sought`: a part of its text that is to be seen."""
    at = completion.text.casefold().find(sought.casefold()) if sought else 0
    begin = max(0, at - _STARTS // 4)
    text = completion.text[begin : begin + _STARTS]
    return Line(start=f"… {text}" if begin else text, **_figures(completion))


def open_completion(completion: StoredCompletion, longest: int = _TEXT) -> Opened:
    """All of a completion that a page shows."""
    versions = [str(version) for version, _ in completion.versions]
    columns = {name[:_NAME]: plain_text(value)[:_COLUMN] for name, value in (completion.columns or {}).items()}
    return Opened(
        scores={name[:_NAME]: score for name, score in completion.scores.items()},
        text=completion.text[:longest],
        left_out=max(0, len(completion.text) - longest),
        prompt=prompt_text(completion.prompt)[:_PROMPT],
        policy=f"by policy {', '.join(versions[:4])}{' …' if len(versions) > 4 else ''}",
        columns=columns,
        said=shortened(conversation_of(completion), _SAID, _MOST_SAID),
        colours=tuple(_values_of(completion)),
        **_figures(completion),
    )


def tokens_of(completion: StoredCompletion, tokenizer: Tokenizer) -> dict[str, Any]:
    """The text of each token under `texts`, and what is stored of each; `read`: the ranges that were only read."""
    stream, texts = tokenizer.sampled_stream(), []
    for token in completion.token_ids:
        try:
            texts.append(stream.push(token))
        except ValueError:  # of the model's padded vocabulary, which has no text
            texts.append("")
    if texts:
        texts[-1] += stream.finish()
    read = [] if completion.episode is None else [list(ends) for ends in completion.episode.observed]
    values = {
        name: [None if value is None else round(value, 3) for value in values]
        for name, values in _values_of(completion).items()
    }
    return {"texts": texts, **values, **({"read": read} if read else {})}


def run_tokenizer(folder: Path) -> Tokenizer | None:
    """That of the run in a folder: of its final policy, its newest checkpoint, or the model that it began with. None
    where none of them has one that can be read."""
    from troupe.policy.text.tokenizer import Tokenizer  # where tokens are asked for: it brings MLX

    places = [folder / "final", *sorted((folder / "checkpoints").glob("step-*"), reverse=True)[:1]]
    try:
        model = read_toml(folder / RUN_TOML).get("model", {}).get("path")
        places += [Path(model)] if isinstance(model, str) else []
    except (InputError, AttributeError):
        pass
    for place in places:
        try:
            if place.is_dir():
                return Tokenizer.from_pretrained(place)
        except (InputError, OSError):
            continue
    return None


def about(run: StoredRun) -> dict[str, Any]:
    """What a browser of a run's completions knows from the beginning."""
    return {"rewards": [name[:_NAME] for name in run.reward_names()]}


def part_in(folder: Path) -> dict[str, Any]:
    """`part_of` the run in a folder; nothing where it has no store that can be read."""
    try:
        with open_store(folder) as run:
            return part_of(run, folder)
    except InputError:
        return {}


def part_of(run: StoredRun, folder: Path) -> dict[str, Any]:
    """A part of a run's completions for a page that has no server: whole ones under `rows`, their prompts, and what was
    chosen in words under `says`."""
    total = run.count(Query())
    tokenizer: Tokenizer | None = None
    rows: list[Opened] = []
    prompts: dict[str, int] = {}
    size = 0
    for completion in run.load(_chosen(run, total)):
        opened = open_completion(completion, _IN_A_PAGE_TEXT)
        if opened.colours:
            of_tokens = None
            if len(completion.token_ids) <= _IN_A_PAGE_TOKENS and (tokenizer := tokenizer or run_tokenizer(folder)):
                of_tokens = tokens_of(completion, tokenizer)
            opened = msgspec.structs.replace(opened, of_tokens=of_tokens, colours=opened.colours if of_tokens else ())
        is_new = opened.prompt not in prompts
        takes = len(msgspec.json.encode(opened)) - (0 if is_new else len(opened.prompt.encode(errors="replace")))
        if size + takes > _IN_A_PAGE:
            continue
        size += takes
        number = prompts.setdefault(opened.prompt, len(prompts))
        rows.append(msgspec.structs.replace(opened, prompt="", prompt_number=number))
    return {
        **about(run),
        "rows": rows,
        "prompts": list(prompts),
        "folder": str(folder),
        "says": "" if len(rows) == total else _says(rows, total, folder),
    }


def _says(rows: Sequence[Opened], total: int, folder: Path) -> str:
    return (
        f"this page has {len(rows):,} of {total:,} completions: the best, the worst and others of "
        f"{len({one.step for one in rows}):,} steps, and prompts that came again; troupe inspect {folder} has all"
    )


def _chosen(run: StoredRun, total: int) -> list[Key]:
    """At most so many as a page may have, those first that it should rather have."""
    if total <= _MOST_IN_A_PAGE:
        return list(run.piece(Query(), _MOST_IN_A_PAGE).keys)
    ends = run.steps_with_completions()
    steps = _spread(range(ends[0], ends[-1] + 1), _STEPS)
    of_a_step = _MOST_IN_A_PAGE // len(steps) + 1
    chosen: dict[tuple[int, int], Key] = {}
    kinds: list[Iterable[Key]] = [
        (key for step in steps for key in run.piece(Query(choice="best", step=step), 1).keys),
        (key for step in steps for key in run.piece(Query(choice="worst", step=step), 1).keys),
        (key for row in run.rows_seen_most(_ROWS) for key in _through_the_steps(run, row)),
        (key for step in steps for key in _spread(run.piece(Query(step=step), 1000).keys, of_a_step)),
    ]
    for key in (key for kind in kinds for key in kind):
        chosen.setdefault((key.gid, key.sample), key)
    return list(chosen.values())[:_MOST_IN_A_PAGE]


def _through_the_steps(run: StoredRun, row: int) -> Iterator[Key]:
    """The first completion of each group of a dataset row; of many, some from first to last."""
    groups = {key.gid: key for key in reversed(run.piece(Query(row=row), 10_000).keys)}
    yield from _spread(sorted(groups.values(), key=lambda key: (key.value or 0, key.gid)), _OF_A_ROW)


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """So many of them, evenly from the first to the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _figures(completion: StoredCompletion) -> dict[str, Any]:
    length, episode = len(completion.token_ids), completion.episode
    names = ("sample", "step", "row", "state", "reward", "advantage", "finish_reason")
    read = 0 if episode is None else observed_within(episode.observed, 0, length)
    told = {name: getattr(completion, name) for name in names}
    return {**told, "gid": str(completion.gid), "tokens": length - read}


def _values_of(completion: StoredCompletion) -> dict[str, Sequence[float | None]]:
    """What is stored of each token."""
    names = ("log_probs", "entropies", "ratios")
    return {name: values for name in names if (values := getattr(completion, name)) is not None}
