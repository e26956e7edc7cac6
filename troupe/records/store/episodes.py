"""Episodes in run.sqlite: what became of completions that talked to an environment or called tools, turn by turn."""

import sqlite3
from collections.abc import Sequence
from typing import Any, TypeAlias

import msgspec

from troupe.messages import Answer, Episode, GroupClosed, RowStart
from troupe.records.store.text import json_text, safe_text

EPISODES = (
    "CREATE TABLE IF NOT EXISTS episodes (gid INTEGER, sample INTEGER, step INTEGER, environment TEXT, reward REAL,"
    " failed TEXT, opening TEXT, turns TEXT, attributes TEXT, observed TEXT, rows BLOB, PRIMARY KEY (gid, sample))",
    "CREATE INDEX IF NOT EXISTS episodes_by_step ON episodes (step)",
)
"""One row a completion that acted. `opening`, `turns` and `attributes` are JSON as in `Episode`, `observed` is
[[start, stop], …], `rows` the RowStarts as msgpack."""
ADD_EPISODE = "INSERT OR REPLACE INTO episodes VALUES (?,?,?,?,?,?,?,?,?,?,?)"
COLUMNS = "environment", "reward", "failed", "opening", "turns", "attributes", "observed", "rows"

_Row: TypeAlias = tuple[Any, ...]


class StoredEpisode(Episode, frozen=True, kw_only=True):
    """An episode, and where in its completion's tokens it was read and not sampled."""

    observed: tuple[tuple[int, int], ...] = ()
    rows: tuple[RowStart, ...] = ()


def episode_rows(closed: GroupClosed) -> list[_Row]:
    """What is stored of a group's episodes; nothing where its completions answered once."""
    if closed.scored is None:
        return []
    group = closed.scored.group
    return [
        (
            closed.gid,
            sample,
            closed.version,
            safe_text(episode.environment),
            episode.reward,
            safe_text(episode.failed),
            json_text(_told(episode.opening)),
            json_text([msgspec.structs.replace(turn, answer=_told(turn.answer)) for turn in episode.turns]),
            json_text(episode.attributes),
            json_text(rollout.observed),
            msgspec.msgpack.encode(rollout.rows),
        )
        for sample, (rollout, episode) in enumerate(zip(group.rollouts, group.episodes, strict=False))
    ]


def has_episodes(connection: sqlite3.Connection) -> bool:
    """Whether a store has the table; those of older versions lack it."""
    found = connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'episodes'").fetchone()
    return bool(found[0])


def stored_episode(row: Sequence[Any]) -> StoredEpisode | None:
    """The episode of a row of COLUMNS; None where there is none, msgspec.MsgspecError where it is not as stored."""
    fields = dict(zip(COLUMNS, row, strict=True))
    if fields["environment"] is None:
        return None
    for name in ("opening", "turns", "attributes", "observed"):
        fields[name] = msgspec.json.decode(fields[name])
    fields["rows"] = msgspec.msgpack.decode(fields["rows"])
    return msgspec.convert(fields, StoredEpisode)


def _told(answer: Answer) -> Answer:
    """Without what an environment gave of itself to go on from: that is kept with the answers, and may be large."""
    return msgspec.structs.replace(answer, saved=b"") if answer.saved else answer
