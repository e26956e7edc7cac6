"""Answers of environments in run.sqlite: what a run that is killed amid its episodes need not ask again."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from troupe.messages import Answer, Answered, Slot
from troupe.records.store.format import DamagedStoreError, connect_to_read, packed, store_errors, unpacked

ANSWERS = (
    "CREATE TABLE IF NOT EXISTS answers (gid INTEGER, step INTEGER, place INTEGER, attempt INTEGER, sample INTEGER,"
    " turn INTEGER, token_ids BLOB, answer BLOB, PRIMARY KEY (gid, sample, turn))"
)
"""One row a turn of a sample; `step` is that of the slot, `answer` is msgpack. Those of groups that have ended go with
the second checkpoint after their end, so that the one before can still be gone on from."""
_CUT = (
    "DELETE FROM answers WHERE gid = ?1 AND sample = ?2 AND (turn >= ?3 OR turn < 0) AND EXISTS (SELECT 1 FROM answers"
    " WHERE gid = ?1 AND sample = ?2 AND turn = ?3 AND token_ids <> ?4)"
)
_ADD = "INSERT OR REPLACE INTO answers VALUES (?,?,?,?,?,?,?,?)"
_FORGET = (
    "DELETE FROM answers WHERE gid IN (SELECT gid FROM groups WHERE step <= (SELECT version FROM checkpoints"
    " WHERE removed_at IS NULL ORDER BY version DESC LIMIT 1 OFFSET 1))"
)
_OPEN = "SELECT * FROM answers WHERE gid NOT IN (SELECT gid FROM groups WHERE step <= ?) ORDER BY gid, sample, turn"

_Statement: TypeAlias = tuple[str, tuple[Any, ...]]


def answer_statements(answered: Answered) -> list[_Statement]:
    """What adds an answer; where other tokens were answered in this turn before, what came after it holds no more."""
    slot, ids = answered.slot, packed("i", answered.token_ids)
    answer = msgspec.msgpack.encode(answered.answer)
    name = answered.gid, answered.sample, answered.turn
    row = (answered.gid, slot.step, slot.place, slot.attempt, answered.sample, answered.turn, ids, answer)
    return [(_CUT, (*name, ids)), (_ADD, row)]


def forgetting_statement() -> _Statement:
    """What removes the answers that nobody can need any more, when a checkpoint was written."""
    return _FORGET, ()


def stored_answers(path: Path, version: int) -> list[Answered]:
    """The answers for groups that had not ended with step `version`; none of a file that is not there, damaged, or of a
    Troupe that stored none. OSError where it cannot be read now."""
    if not path.exists():
        return []
    try:
        with store_errors(path), closing(connect_to_read(path)) as connection:
            if not connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'answers'").fetchone()[0]:
                return []
            return [_answered(row) for row in connection.execute(_OPEN, (version,))]
    except (DamagedStoreError, sqlite3.DatabaseError, msgspec.MsgspecError):
        return []


def _answered(row: tuple[Any, ...]) -> Answered:
    gid, step, place, attempt, sample, turn, ids, answer = row
    return Answered(
        gid=gid,
        slot=Slot(step=step, place=place, attempt=attempt),
        sample=sample,
        turn=turn,
        token_ids=tuple(unpacked("i", ids)),
        answer=msgspec.msgpack.decode(answer, type=Answer),
    )
