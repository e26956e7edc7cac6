"""run.sqlite: what a run did, step by step, group by group, completion by completion. The format and who writes it.

A step is written in one transaction, so that a reader, and who comes after a crash, sees whole steps only. Order is by
step and start; times are told, and nothing depends on them. It does not know who calls it, or when: `sinks/sqlite.py`
does; `stored_run.py` reads.

    starts       one row a start of the run: 1, 2, … with every resume
    machines     which machine played a start; stores of older versions have no such table
    steps        one row a learner batch, its metrics as JSON
    groups       one row a group that has ended, under the step that it ended with
    completions  one row a sample of a group
    incidents    what went wrong, of all starts
    checkpoints  those written; `removed_at` of those that made room for newer ones
"""

from __future__ import annotations

import os
import sqlite3
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import count, groupby
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from troupe.errors import OutputError
from troupe.messages import CheckpointWritten, GroupClosed, Incident, Rollout, Update

FORMAT = 1
"""`user_version` of the file. A store of a newer format is refused."""

_BUSY_S = 1.0
"""For how long another program may keep us from writing before that is an error."""
_CHECK_S = 2.0
"""For how long an existing file is looked through for damage; what is not found by then is found when it is met."""

_TABLES = (
    "CREATE TABLE starts (start INTEGER PRIMARY KEY, time REAL, pid INTEGER, first_step INTEGER, troupe TEXT,"
    " settled INTEGER)",
    "CREATE TABLE steps (step INTEGER PRIMARY KEY, start INTEGER, version INTEGER, time REAL, metrics TEXT)",
    "CREATE TABLE groups (gid INTEGER PRIMARY KEY, step INTEGER, slot_step INTEGER, place INTEGER, attempt INTEGER,"
    " row INTEGER, epoch INTEGER, state TEXT, prompt TEXT, columns TEXT)",
    "CREATE INDEX groups_by_step ON groups (step)",
    "CREATE TABLE completions (gid INTEGER, sample INTEGER, step INTEGER, text TEXT, token_ids BLOB, versions TEXT,"
    " finish_reason TEXT, reward REAL, advantage REAL, scores TEXT, extra TEXT, log_probs BLOB,"
    " PRIMARY KEY (gid, sample))",
    "CREATE INDEX completions_by_step ON completions (step)",
    "CREATE TABLE incidents (start INTEGER, step INTEGER, time REAL, actor TEXT, kind TEXT, message TEXT, gid INTEGER)",
    "CREATE TABLE checkpoints (version INTEGER PRIMARY KEY, folder TEXT, bytes INTEGER, seconds REAL, time REAL,"
    " removed_at REAL)",
)
_MACHINES = "CREATE TABLE IF NOT EXISTS machines (start INTEGER PRIMARY KEY, machine TEXT)"
_TO_BE_MADE_AGAIN = ("steps", "step"), ("groups", "step"), ("completions", "step"), ("checkpoints", "version")

_ADD_GROUP = "INSERT OR REPLACE INTO groups VALUES (?,?,?,?,?,?,?,?,?,?)"
_ADD_COMPLETION = "INSERT OR REPLACE INTO completions VALUES (?,?,?,?,?,?,?,?,?,?,?,?)"
_ADD_STEP = "INSERT OR REPLACE INTO steps VALUES (?,(SELECT max(start) FROM starts),?,?,?)"
_ADD_INCIDENT = "INSERT INTO incidents VALUES ((SELECT max(start) FROM starts),?,?,?,?,?,?)"
_ADD_CHECKPOINT = (
    "INSERT INTO checkpoints VALUES (?,?,?,?,?,NULL) ON CONFLICT (version) DO UPDATE SET"
    " folder = excluded.folder, bytes = excluded.bytes, removed_at = NULL,"
    " seconds = iif(excluded.seconds > 0, excluded.seconds, seconds),"  # 0: told of once more
    " time = iif(excluded.seconds > 0, excluded.time, time)"
)
_REMOVE_CHECKPOINT = "UPDATE checkpoints SET removed_at = ? WHERE version = ? AND removed_at IS NULL"

Row = tuple[Any, ...]
Statement = tuple[str, Row]


class DamagedStoreError(Exception):
    """The file is no run store, or not any more."""


class GroupRows(NamedTuple):
    """A group as it is stored; a small part of the memory that its messages take."""

    group: Row
    completions: list[Row]


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
    prompt = scored.group.prompt
    group = (*place, prompt.row, prompt.epoch, closed.state, json_text(prompt.prompt), json_text(prompt.columns))
    completions = []
    for sample, rollout in enumerate(scored.group.rollouts):
        completions.append(
            (
                closed.gid,
                sample,
                closed.version,
                safe_text(rollout.text),
                _packed("i", rollout.token_ids),
                _runs(rollout),
                rollout.finish_reason,
                closed.rewards[sample] if closed.rewards else None,
                closed.advantages[sample] if closed.advantages else None,
                json_text({name: scores[sample] for name, scores in scored.scores.items()}),
                json_text({name: values[sample] for name, values in scored.extra.items()}) if scored.extra else "{}",
                _packed("f", rollout.log_probs) if log_probs else None,
            )
        )
    return GroupRows(group, completions)


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
    return [(_ADD_CHECKPOINT, row), *((_REMOVE_CHECKPOINT, (unix_s, version)) for version in written.removed)]


class StoreWriter:
    """A run's connection to its store; made, used and closed in one thread.

    Every method raises OSError where the disk, the file system or another program is in the way, which may pass, and
    DamagedStoreError where the file is beyond use; after either, close the writer and make another one.
    """

    def __init__(
        self,
        path: Path,
        *,
        first_step: int,
        start: int | None = None,
        program: str,
        machine: str = "",
        clock: Callable[[], float],
    ) -> None:
        """`start`: None begins a start of the run, for which the rows of steps past `first_step` are removed, since
        those will be made again; a number goes on with that start. `program`: the version of Troupe. `machine`: in
        words, for people."""
        self._path = path
        self._folder: int | None = None
        with _told_as_ours(path):
            self._connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
        try:
            with _told_as_ours(path):
                self._prepare()
                self._folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
                self._file = path.stat()
                with self._transaction() as do:
                    self.start = self._begin(do, first_step, start, (clock(), os.getpid(), first_step, program))
                    do.execute(_MACHINES)
                    do.execute("INSERT OR IGNORE INTO machines VALUES (?,?)", (self.start, safe_text(machine)))
        except BaseException:
            self.close()
            raise

    def add_step(self, rows: StepRows) -> None:
        """Write a step, whole or not at all. One that is there already is replaced."""
        with _told_as_ours(self._path), self._transaction() as do:
            do.executemany(_ADD_GROUP, (group for group, _ in rows.groups))
            do.executemany(_ADD_COMPLETION, (row for _, completions in rows.groups for row in completions))
            do.execute(_ADD_STEP, rows.step)

    def do(self, statements: Iterable[Statement]) -> None:
        """Carry out what the `…_statement` functions gave, in one transaction."""
        with _told_as_ours(self._path), self._transaction() as do:
            for sql, row in statements:
                do.execute(sql, row)

    def settle(self, step: int) -> None:
        """Have everything written so far on the disk, whatever happens to the machine; note that it holds `step`."""
        with _told_as_ours(self._path):
            self._connection.execute("PRAGMA synchronous = FULL")
            with self._transaction() as do:  # the sync of a commit is one of all commits before
                do.execute("UPDATE starts SET settled = ? WHERE start = ?", (step, self.start))
            self._connection.execute("PRAGMA synchronous = NORMAL")

    @property
    def is_in_place(self) -> bool:
        """Whether the name still leads to the file, in the folder that it was opened in, wherever that was moved.
        SQLite itself writes on into a file that was removed. True, too, where the system does not tell."""
        try:
            return os.path.samestat(os.stat(self._path.name, dir_fd=self._folder), self._file)
        except FileNotFoundError:
            return False
        except OSError:
            return True

    def count_steps(self, up_to: int) -> int:
        """How many steps, up to one, are stored."""
        with _told_as_ours(self._path):
            found = self._connection.execute("SELECT count(*) FROM steps WHERE step BETWEEN 1 AND ?", (up_to,))
            return int(found.fetchone()[0])

    def close(self) -> None:
        """Release the file. What was not committed is gone."""
        with suppress(sqlite3.Error):
            self._connection.close()
        folder, self._folder = self._folder, None
        if folder is not None:
            os.close(folder)

    def _prepare(self) -> None:
        connection = self._connection
        found = refuse_newer(connection, self._path)
        connection.execute("PRAGMA page_size = 8192")  # a completion has some kB: less is left empty than with 4096
        connection.execute("PRAGMA journal_mode = WAL")  # readers never wait for us, nor we for them
        connection.execute("PRAGMA synchronous = NORMAL")
        if not found:
            with self._transaction() as do:
                for table in _TABLES:
                    do.execute(table)
                do.execute(f"PRAGMA user_version = {FORMAT}")
        elif fault := _damage(connection):
            raise DamagedStoreError(fault)

    def _begin(self, do: sqlite3.Cursor, first_step: int, start: int | None, facts: Row) -> int:
        if start is None:
            for table, column in _TO_BE_MADE_AGAIN:
                do.execute(f"DELETE FROM {table} WHERE {column} > ?", (first_step,))
            listed = do.execute("SELECT version, folder FROM checkpoints WHERE removed_at IS NULL").fetchall()
            here = self._path.parent / "checkpoints"  # the run folder may have been moved since
            gone = [
                version for version, folder in listed if not (here / Path(folder).name).is_dir()
            ]  # and a kill came before telling
            do.executemany(_REMOVE_CHECKPOINT, [(facts[0], version) for version in gone])
            start = int(do.execute("SELECT coalesce(max(start), 0) + 1 FROM starts").fetchone()[0])
        do.execute("INSERT OR IGNORE INTO starts VALUES (?,?,?,?,?,NULL)", (start, *facts))
        return start

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Cursor]:
        cursor = self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield cursor
            cursor.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                self._connection.rollback()
            raise


def check_store(path: Path) -> None:
    """OutputError where the store at `path` was written by a newer Troupe. A damaged one, or none, is no hindrance."""
    if path.exists():
        with suppress(sqlite3.Error, DamagedStoreError), closing(connect_to_read(path)) as connection:
            refuse_newer(connection, path)


def stored_steps(path: Path, up_to: int) -> set[int]:
    """The steps, up to one, that a store holds; none of a file that is not there, or damaged. OSError where it cannot
    be read now."""
    if not path.exists():
        return set()
    try:
        with _told_as_ours(path), closing(connect_to_read(path)) as connection:
            if not connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'steps'").fetchone()[0]:
                return set()
            return {
                step for (step,) in connection.execute("SELECT step FROM steps WHERE step BETWEEN 1 AND ?", (up_to,))
            }
    except DamagedStoreError:
        return set()


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


def set_aside(path: Path) -> Path:
    """Rename a damaged store to the next free `NAME.damaged-N.sqlite`, which is returned."""
    names = (path.with_name(f"{path.stem}.damaged-{number}{path.suffix}") for number in count(1))
    place = next(name for name in names if not name.exists())
    path.replace(place)
    with suppress(FileNotFoundError):
        Path(f"{path}-wal").replace(f"{place}-wal")
    Path(f"{path}-shm").unlink(missing_ok=True)
    return place


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


def json_text(value: Any) -> str:
    """A value as JSON. What JSON does not have, such as an array or any object, is told as well as can be."""
    try:
        return _JSON.encode(value).decode()
    except Exception:  # whatever a user's object does when it is looked at
        if isinstance(value, dict):
            parts = (f"{json_text(_name(key))}:{json_text(item)}" for key, item in value.items())
            return "{" + ",".join(parts) + "}"
        return _JSON.encode(_name(value)).decode()


def safe_text(text: str) -> str:
    """The text; lone surrogates, which no file takes, are replaced."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _name(value: object) -> str:
    try:
        return safe_text(str(value))
    except Exception:
        return f"<{type(value).__name__}>"


def _plain(value: Any) -> Any:
    """What arrays and numbers of other packages stand for; the text of anything else."""
    tolist = getattr(value, "tolist", None)
    return tolist() if callable(tolist) else _name(value)


_JSON = msgspec.json.Encoder(enc_hook=_plain)


def _packed(code: str, numbers: Sequence[float]) -> bytes:
    """int32 ("i") or float32 ("f"), little-endian."""
    packed = array(code, numbers)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _runs(rollout: Rollout) -> str:
    """The policy versions of the tokens as [[version, tokens], …]."""
    if len(set(rollout.versions)) == 1:  # nearly always
        return f"[[{rollout.versions[0]},{len(rollout.versions)}]]"
    return json_text([(version, len(list(run))) for version, run in groupby(rollout.versions)])


def _damage(connection: sqlite3.Connection) -> str | None:
    """What is wrong with the file, as far as can be seen in a while."""
    until_s = time.perf_counter() + _CHECK_S
    connection.set_progress_handler(lambda: time.perf_counter() > until_s, 10_000)
    try:
        found = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.OperationalError:  # the time is up
        return None
    finally:
        connection.set_progress_handler(None, 0)
    return None if found == "ok" else found


@contextmanager
def _told_as_ours(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise OSError(f"{path}: {error}") from error
    except sqlite3.DatabaseError as error:
        if type(error) is sqlite3.DatabaseError:
            raise DamagedStoreError(str(error)) from error
        raise
