"""run.sqlite: what is in it, as rows and the statements that add them, and how it is opened.

starts       one row a start of the run: 1, 2, … with every resume
machines     which machine a start ran on; stores of older versions have no such table
steps        one row a learner batch, its metrics as JSON
groups       one row a group that has ended, under the step that it ended with
completions  one row a sample of a group
answers      one row a turn of a sample whose step may still be made again; see `answers.py`
token_figures  one row a sample that was learned from, where they are kept: float32 of each token
episodes     one row a sample that acted in an environment or called tools; see `episodes.py`
evaluations, evaluation_rows, evaluation_samples, evaluation_conditions  what the policy came to on rows that it is not
             trained on; see `evaluations.py`
members      one row a worker, process, engine or rank and start that it worked in; see `members.py`
incidents    what went wrong, of all starts
checkpoints  those written; `removed_at` of those that made room for newer ones
"""

import sqlite3
import sys
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from troupe.errors import OutputError
from troupe.messages import CheckpointWritten, GroupClosed, Incident, Rollout, Update
from troupe.records.store.episodes import EPISODES, episode_rows
from troupe.records.store.evaluations import EVALUATIONS, EVALUATIONS_MADE_AGAIN
from troupe.records.store.members import MEMBERS
from troupe.records.store.text import json_text, safe_text

FORMAT = 1
"""`user_version` of the file. A store of a newer format is refused."""

TABLES = (
    "CREATE TABLE starts (start INTEGER PRIMARY KEY, time REAL, pid INTEGER, first_step INTEGER, troupe TEXT,"
    " settled INTEGER)",
    "CREATE TABLE steps (step INTEGER PRIMARY KEY, start INTEGER, version INTEGER, time REAL, metrics TEXT)",
    "CREATE TABLE groups (gid INTEGER PRIMARY KEY, step INTEGER, slot_step INTEGER, place INTEGER, attempt INTEGER,"
    " row INTEGER, epoch INTEGER, state TEXT, prompt TEXT, columns TEXT)",
    "CREATE INDEX groups_by_step ON groups (step)",
    "CREATE INDEX groups_by_row ON groups (row)",
    "CREATE TABLE completions (gid INTEGER, sample INTEGER, step INTEGER, text TEXT, token_ids BLOB, versions TEXT,"
    " finish_reason TEXT, reward REAL, advantage REAL, scores TEXT, extra TEXT, log_probs BLOB,"
    " PRIMARY KEY (gid, sample))",
    "CREATE INDEX completions_by_step ON completions"
    " (step, gid, sample, reward, advantage, finish_reason, length(token_ids))",  # all that is looked for besides texts
    "CREATE TABLE incidents (start INTEGER, step INTEGER, time REAL, actor TEXT, kind TEXT, message TEXT, gid INTEGER)",
    "CREATE TABLE checkpoints (version INTEGER PRIMARY KEY, folder TEXT, bytes INTEGER, seconds REAL, time REAL,"
    " removed_at REAL)",
)
MACHINES = "CREATE TABLE IF NOT EXISTS machines (start INTEGER PRIMARY KEY, machine TEXT)"
TOKEN_FIGURES = (
    "CREATE TABLE IF NOT EXISTS token_figures (gid INTEGER, sample INTEGER, step INTEGER, entropies BLOB, ratios BLOB,"
    " PRIMARY KEY (gid, sample))",
    "CREATE INDEX IF NOT EXISTS token_figures_by_step ON token_figures (step)",
)
ADDED_SINCE = (MACHINES, *EPISODES, *TOKEN_FIGURES, MEMBERS, *EVALUATIONS)
"""Tables that stores of older versions lack."""
TO_BE_MADE_AGAIN = (
    ("steps", "step"),
    ("groups", "step"),
    ("completions", "step"),
    ("episodes", "step"),
    ("token_figures", "step"),
    ("checkpoints", "version"),
    *EVALUATIONS_MADE_AGAIN,
)

ADD_GROUP = "INSERT OR REPLACE INTO groups VALUES (?,?,?,?,?,?,?,?,?,?)"
ADD_COMPLETION = "INSERT OR REPLACE INTO completions VALUES (?,?,?,?,?,?,?,?,?,?,?,?)"
ADD_TOKEN_FIGURES = "INSERT OR REPLACE INTO token_figures VALUES (?,?,?,?,?)"
ADD_STEP = "INSERT OR REPLACE INTO steps VALUES (?,(SELECT max(start) FROM starts),?,?,?)"
_ADD_INCIDENT = "INSERT INTO incidents VALUES ((SELECT max(start) FROM starts),?,?,?,?,?,?)"
_ADD_CHECKPOINT = (
    "INSERT INTO checkpoints VALUES (?,?,?,?,?,NULL) ON CONFLICT (version) DO UPDATE SET"
    " folder = excluded.folder, bytes = excluded.bytes, removed_at = NULL,"
    " seconds = iif(excluded.seconds > 0, excluded.seconds, seconds),"  # 0: told of once more
    " time = iif(excluded.seconds > 0, excluded.time, time)"
)
REMOVE_CHECKPOINT = "UPDATE checkpoints SET removed_at = ? WHERE version = ? AND removed_at IS NULL"

Row = tuple[Any, ...]
Statement = tuple[str, Row]


class DamagedStoreError(Exception):
    """The file is no run store, or not any more."""


class GroupRows(NamedTuple):
    """A group as it is stored; a small part of the memory that its messages take."""

    group: Row
    completions: list[Row]
    episodes: Sequence[Row] = ()
    token_figures: Sequence[Row] = ()


class StepRows(NamedTuple):
    """All that one transaction writes."""

    step: Row
    groups: Sequence[GroupRows]


def group_rows(closed: GroupClosed, *, log_probs: bool = False) -> GroupRows:
    """What is stored of a group; `log_probs`: those of its tokens, too."""
    slot, scored = closed.slot, closed.scored
    place = (closed.gid, closed.version, slot.step, slot.place, slot.attempt)
    if scored is None:
        return GroupRows((*place, None, None, closed.state, None, None), [])
    prompt, was_sampled = scored.group.prompt, not scored.group.supervised
    row = prompt.row if was_sampled else None  # of other rows than those that are sampled
    group = (*place, row, prompt.epoch, closed.state, json_text(prompt.prompt), json_text(prompt.columns))
    completions = []
    for sample, rollout in enumerate(scored.group.rollouts):
        completions.append(
            (
                closed.gid,
                sample,
                closed.version,
                safe_text(rollout.text),
                packed("i", rollout.token_ids),
                _runs(rollout),
                rollout.finish_reason,
                closed.rewards[sample] if closed.rewards else None,
                closed.advantages[sample] if closed.advantages else None,
                json_text({name: scores[sample] for name, scores in scored.scores.items()}),
                json_text({name: values[sample] for name, values in scored.extra.items()}) if scored.extra else "{}",
                packed("f", rollout.log_probs) if log_probs and was_sampled else None,
            )
        )
    return GroupRows(group, completions, episode_rows(closed), _token_rows(closed))


def _token_rows(closed: GroupClosed) -> list[Row]:
    return [
        (closed.gid, sample, closed.version, packed("f", figures.entropies), packed("f", figures.ratios))
        for sample, figures in enumerate(closed.token_figures)
        if figures is not None
    ]


def step_rows(update: Update, groups: Sequence[GroupRows], unix_s: float) -> StepRows:
    """A step with the groups that ended with it."""
    return StepRows((update.step, update.version, unix_s, json_text(update.metrics)), groups)


def incident_statement(incident: Incident, step: int, unix_s: float) -> Statement:
    """What adds an incident; `step`: that of the newest Update before it."""
    texts = (safe_text(incident.actor), safe_text(incident.kind), safe_text(incident.message))
    return _ADD_INCIDENT, (step, unix_s, *texts, incident.gid)


def checkpoint_statements(written: CheckpointWritten, unix_s: float) -> list[Statement]:
    """What adds a checkpoint and notes which were removed."""
    row = (written.version, safe_text(written.folder), written.bytes, written.seconds, unix_s)
    return [(_ADD_CHECKPOINT, row), *((REMOVE_CHECKPOINT, (unix_s, version)) for version in written.removed)]


def connect_to_read(path: Path) -> sqlite3.Connection:
    """A connection that cannot change the store, does not hold up who writes, and leaves no file behind.

    sqlite3.Error where it cannot be. Where nobody writes, the file is read as it is: who joins the log of a store
    makes that log's files, and only a writer may remove them.
    """
    mode = "mode=ro" if is_in_use(path) else "immutable=1"
    return sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True, timeout=5.0)


def is_in_use(path: Path) -> bool:
    """Whether somebody writes the store, or was killed writing it: then a part of it is in its log. Who ends as one
    should leaves none."""
    try:
        return Path(f"{path}-wal").stat().st_size > 0
    except OSError:
        return False


def refuse_newer(connection: sqlite3.Connection, path: Path) -> int:
    """The format of a store, 0 where there is none yet. OutputError where it is newer than ours, DamagedStoreError
    where it is something else."""
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version > FORMAT:
        raise OutputError(
            f"{path}: the run store has format {version}, this version of Troupe knows formats up to {FORMAT}; use the "
            "Troupe that wrote it or a newer one, or move the file away"
        )
    if version == 0 and connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        raise DamagedStoreError("it is an SQLite file of something else")
    return version


def packed(code: str, numbers: Sequence[float]) -> bytes:
    """int32 ("i") or float32 ("f"), little-endian."""
    data = array(code, numbers)
    if sys.byteorder == "big":
        data.byteswap()
    return data.tobytes()


def unpacked(code: str, data: bytes) -> list[Any]:
    """What was packed."""
    numbers = array(code)
    numbers.frombytes(data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()


def _runs(rollout: Rollout) -> str:
    """The policy versions of the tokens as [[version, tokens], …]."""
    if len(set(rollout.versions)) == 1:  # nearly always
        return f"[[{rollout.versions[0]},{len(rollout.versions)}]]"
    return json_text([(version, len(list(run))) for version, run in groupby(rollout.versions)])


@contextmanager
def store_errors(path: Path) -> Iterator[None]:
    """Raise as OSError what may pass, and as DamagedStoreError what does not."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise OSError(f"{path}: {error}") from error
    except sqlite3.DatabaseError as error:
        if type(error) is sqlite3.DatabaseError:
            raise DamagedStoreError(str(error)) from error
        raise
