"""Completions in run.sqlite: which there are, in which order, piece by piece.

What a condition or an order needs besides texts stands in one index (`completions_by_step`), so that 100,000
completions are gone through without reading what they say. Texts are looked into one by one, for as long as who asks
will wait.
"""

import math
import sqlite3
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import msgspec

from troupe.errors import InputError
from troupe.messages import ClosedState, FinishReason, PromptText
from troupe.records.store.episodes import COLUMNS, StoredEpisode, has_episodes, stored_episode
from troupe.records.store.format import unpacked
from troupe.records.text import prompt_text

Choice = Literal[
    "all",
    "newest",
    "best",
    "worst",
    "longest",
    "shortest",
    "highest advantage",
    "lowest advantage",
    "random",
]
"""Which completions come first: those of the first step or of the newest, those with the highest or lowest reward, with
most or fewest tokens, with the highest or lowest advantage, or some by lot. What has no reward, or no advantage, is
left out where that is the order."""


class StoredCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """One completion with all that is known of it."""

    step: int
    """That its group ended with."""
    gid: int
    sample: int
    slot_step: int
    place: int
    attempt: int
    row: int | None
    """Of the dataset, from 0."""
    epoch: int | None
    state: ClosedState
    prompt: PromptText | None
    columns: dict[str, Any] | None
    """The other columns of the dataset row."""
    text: str
    token_ids: list[int]
    versions: list[tuple[int, int]]
    """(policy version, how many tokens in a row it made)."""
    finish_reason: str
    reward: float | None
    """Weighted sum of the scores; None where there is none."""
    advantage: float | None
    """None where the group was not trained on."""
    scores: dict[str, float | None]
    """Reward → score; None where it is missing."""
    extra: dict[str, Any]
    log_probs: list[float] | None
    """None where they were not stored."""
    entropies: list[float | None] | None = None
    """Of each token in nats, as in `TokenFigures`; None where they were not stored, or it was not learned from."""
    ratios: list[float | None] | None = None
    """The same of importance ratios."""
    episode: StoredEpisode | None = None
    """None where it answered once."""


class Query(msgspec.Struct, frozen=True, kw_only=True):
    """Which completions are wanted; every condition must hold."""

    choice: Choice = "all"
    count: int | None = None
    """At most; None: no limit."""
    step: int | None = None
    """Of this step; None: of any."""
    first_step: int | None = None
    """Of this step or a later one."""
    last_step: int | None = None
    """Of this step or an earlier one."""
    gid: int | None = None
    row: int | None = None
    """Of the dataset."""
    state: ClosedState | None = None
    finish_reason: FinishReason | None = None
    reward: str | None = None
    """The score that `choice`, `least` and `most` look at; None: the weighted sum."""
    least: float | None = None
    most: float | None = None
    text: str | None = None
    """Part of what was written, in letters of either case."""
    prompt: str | None = None
    """Part of the prompt."""


class Key(NamedTuple):
    """Where a completion stands in the order of a query."""

    value: float | None
    """What it is ordered by."""
    gid: int
    sample: int


class Piece(msgspec.Struct, frozen=True):
    """Some completions of a query, in its order."""

    keys: tuple[Key, ...]
    after: Key | None
    """What to go on after; None: there are no more."""


_NUMBERED = (
    "c.step, c.gid, c.sample, g.slot_step, g.place, g.attempt, g.row, g.epoch, g.state, g.prompt, g.columns, c.text,"
    " c.token_ids, c.versions, c.finish_reason, c.reward, c.advantage, c.scores, c.extra, c.log_probs"
)
_LENGTH = "length(c.token_ids)"
_ORDERS: dict[Choice, tuple[str, bool]] = {
    "all": ("c.step", False),
    "newest": ("c.step", True),
    "best": ("reward", True),
    "worst": ("reward", False),
    "longest": (_LENGTH, True),
    "shortest": (_LENGTH, False),
    "highest advantage": ("c.advantage", True),
    "lowest advantage": ("c.advantage", False),
    "random": ("0", False),
}
"""What each orders by, and whether the highest comes first."""
_CONDITIONS = {
    "step": "c.step = :step",
    "first_step": "c.step >= :first_step",
    "last_step": "c.step <= :last_step",
    "gid": "c.gid = :gid",
    "row": "c.gid IN (SELECT gid FROM groups WHERE row = :row)",
    "state": "+c.gid IN (SELECT gid FROM groups WHERE state = :state)",  # `+`: not the way to find them
    "finish_reason": "c.finish_reason = :finish_reason",
}
_AT_ONCE = 2000
"""Completions whose texts are looked into before it is seen whether time is up."""


def prepare(connection: sqlite3.Connection) -> None:
    """Have a connection know what queries use."""
    connection.create_function("score", 2, _score, deterministic=True)


def keys(connection: sqlite3.Connection, query: Query) -> Iterator[Key]:
    """The completions of a query, all of one state of the store."""
    looks = _looks_into(connection, query)
    most = query.count
    for key in _ordered(connection, query, None, -1 if looks or most is None else most):
        if most is not None and most <= 0:
            return
        if looks is None or looks(key.gid, key.sample):
            yield key
            most = None if most is None else most - 1


def piece(
    connection: sqlite3.Connection, query: Query, count: int, after: Key | None = None, *, patience_s: float = 0.1
) -> Piece:
    """The next `count` completions of a query; fewer, and maybe none, where its texts cannot be looked into in time:
    then there is something to go on after. `query.count` says nothing here, and by lot there is one piece."""
    looks = _looks_into(connection, query)
    until_s = time.perf_counter() + patience_s
    at_once = count if looks is None else max(count, _AT_ONCE)
    found: list[Key] = []
    while True:
        seen = 0
        for key in _ordered(connection, query, after, at_once):
            seen, after = seen + 1, key
            if looks is None or looks(key.gid, key.sample):
                found.append(key)
                if len(found) == count:
                    return Piece(tuple(found), None if query.choice == "random" else after)
            if looks is not None and time.perf_counter() > until_s:
                return Piece(tuple(found), after)
        if seen < at_once or query.choice == "random":
            return Piece(tuple(found), None)


def count(connection: sqlite3.Connection, query: Query) -> int:
    """How many completions there are for the query, without its `count`; of one that looks into texts, by doing so."""
    if _looks_into(connection, query) is not None:
        return sum(1 for _ in keys(connection, msgspec.structs.replace(query, count=None)))
    where, values = _where(query)
    found: int = connection.execute(f"SELECT count(*) FROM completions c WHERE {where}", values).fetchone()[0]
    return found


def load(connection: sqlite3.Connection, found: Iterator[Key]) -> Iterator[StoredCompletion]:
    """The completions themselves."""
    acted, has_figures = has_episodes(connection), _has_token_figures(connection)
    more = "".join(f", t.{name}" if has_figures else ", NULL" for name in ("entropies", "ratios"))
    more += "".join(f", e.{name}" if acted else ", NULL" for name in COLUMNS)
    join = "LEFT JOIN token_figures t ON t.gid = c.gid AND t.sample = c.sample" if has_figures else ""
    join += " LEFT JOIN episodes e ON e.gid = c.gid AND e.sample = c.sample" if acted else ""
    sql = (
        f"SELECT {_NUMBERED}{more} FROM completions c JOIN groups g ON g.gid = c.gid {join}"
        " WHERE c.gid = ? AND c.sample = ?"
    )
    for _, gid, sample in found:
        for row in connection.execute(sql, (gid, sample)):
            yield _completion(row)


def _has_token_figures(connection: sqlite3.Connection) -> bool:
    """Stores of older versions have no such table."""
    found = connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'token_figures'").fetchone()
    return bool(found[0])


def _ordered(connection: sqlite3.Connection, query: Query, after: Key | None, limit: int) -> Iterator[Key]:
    """The completions for which all holds that is known without their texts; `limit`: -1 is none."""
    where, values = _where(query)
    value, falls = _value(query)
    if after is not None:
        beyond = "<" if falls else ">"
        where += f" AND ({value} {beyond} :value OR ({value} = :value AND (c.gid, c.sample) > (:after, :sample)))"
        values |= {"value": after.value, "after": after.gid, "sample": after.sample}
    order = "random()" if query.choice == "random" else f"{value}{' DESC' if falls else ''}, c.gid, c.sample"
    sql = f"SELECT {value}, c.gid, c.sample FROM completions c WHERE {where} ORDER BY {order} LIMIT :limit"
    return map(Key._make, connection.execute(sql, values | {"limit": limit}))


def _where(query: Query) -> tuple[str, dict[str, Any]]:
    """The conditions that need no text, and the values in them."""
    reward = _reward(query)
    conditions = {**_CONDITIONS, "least": f"{reward} >= :least", "most": f"{reward} <= :most"}
    values = {key: value for key in conditions if (value := getattr(query, key)) is not None}
    value, _ = _value(query)
    there = [f"{value} IS NOT NULL"] if value in (reward, "c.advantage") else []
    where = " AND ".join(["TRUE", *(conditions[key] for key in values), *there])
    return where, values | {"reward": query.reward}


def _value(query: Query) -> tuple[str, bool]:
    value, falls = _ORDERS[query.choice]
    return _reward(query) if value == "reward" else value, falls


def _reward(query: Query) -> str:
    return "c.reward" if query.reward is None else "score(c.scores, :reward)"


def _score(scores: str, name: str) -> float | None:
    value: float | None = msgspec.json.decode(scores).get(name)
    return value


def _looks_into(connection: sqlite3.Connection, query: Query) -> Callable[[int, int], bool] | None:
    """Whether the texts of a completion, gid and sample, hold what they should; None where all may."""
    wanted, asked = (query.text or "").casefold(), (query.prompt or "").casefold()
    if not wanted and not asked:
        return None

    def text_of(gid: int, sample: int) -> str:
        sql = "SELECT text FROM completions WHERE gid = ? AND sample = ?"
        found: str = connection.execute(sql, (gid, sample)).fetchone()[0]
        return found

    @lru_cache(maxsize=1024)
    def is_asked(gid: int) -> bool:
        row = connection.execute("SELECT prompt FROM groups WHERE gid = ?", (gid,)).fetchone()
        return row is not None and row[0] is not None and asked in _prompt(row[0]).casefold()

    def holds(gid: int, sample: int) -> bool:
        return (not asked or is_asked(gid)) and (not wanted or wanted in text_of(gid, sample).casefold())

    return holds


def _prompt(stored: str) -> str:
    return prompt_text(msgspec.json.decode(stored))


def _completion(row: tuple[Any, ...]) -> StoredCompletion:
    *names, _ = StoredCompletion.__struct_fields__
    fields: dict[str, Any] = dict(zip(names, row, strict=False))  # then comes an episode's
    for name in ("prompt", "columns", "versions", "scores", "extra"):
        fields[name] = None if fields[name] is None else msgspec.json.decode(fields[name])
    fields["token_ids"] = unpacked("i", fields["token_ids"])
    if fields["log_probs"] is not None:
        fields["log_probs"] = unpacked("f", fields["log_probs"])
    for name in ("entropies", "ratios"):
        if fields[name] is not None:
            fields[name] = [value if math.isfinite(value) else None for value in unpacked("f", fields[name])]
    try:
        return msgspec.convert(fields | {"episode": stored_episode(row[len(names) :])}, StoredCompletion)
    except msgspec.MsgspecError as error:
        raise InputError(f"group {fields['gid']}, sample {fields['sample']}: not as a run stores it: {error}") from None
