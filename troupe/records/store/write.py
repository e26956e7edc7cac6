"""Writing run.sqlite: what a run did, step by step, group by group, completion by completion.

A step is written in one transaction, so that a reader, and who comes after a crash, sees whole steps only. Order is by
step and start; times are told, and nothing depends on them.
"""

import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import count
from pathlib import Path

from troupe.records.store.answers import ANSWERS
from troupe.records.store.episodes import ADD_EPISODE
from troupe.records.store.format import (
    ADD_COMPLETION,
    ADD_GROUP,
    ADD_STEP,
    ADD_TOKEN_FIGURES,
    ADDED_SINCE,
    FORMAT,
    REMOVE_CHECKPOINT,
    TABLES,
    TO_BE_MADE_AGAIN,
    DamagedStoreError,
    Row,
    Statement,
    StepRows,
    connect_to_read,
    refuse_newer,
    store_errors,
)
from troupe.records.store.text import safe_text
from troupe.runtime.held_folder import leads_to


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
        busy_s: float = 1.0,
        check_s: float = 2.0,
    ) -> None:
        """`start`: None begins a start of the run, for which the rows of steps past `first_step` are removed, since
        those will be made again; a number goes on with that start. `program`: the version of Troupe. `machine`: in
        words, for people. `busy_s`: for how long another program may keep us from writing before that is an error.
        `check_s`: for how long an existing file is looked through for damage; what is not found by then is found when
        it is met."""
        self._path = path
        self._folder: int | None = None
        with store_errors(path):
            self._connection = sqlite3.connect(path, timeout=busy_s, isolation_level=None)
        try:
            with store_errors(path):
                self._prepare(check_s)
                self._folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
                self._file = path.stat()
                with self._transaction() as do:
                    for table in (*ADDED_SINCE, ANSWERS):
                        do.execute(table)
                    self.start = self._begin(do, first_step, start, (clock(), os.getpid(), first_step, program))
                    do.execute("INSERT OR IGNORE INTO machines VALUES (?,?)", (self.start, safe_text(machine)))
        except BaseException:
            self.close()
            raise

    def add_step(self, rows: StepRows) -> None:
        """Write a step, whole or not at all. One that is there already is replaced."""
        with store_errors(self._path), self._transaction() as do:
            do.executemany(ADD_GROUP, (group.group for group in rows.groups))
            do.executemany(ADD_COMPLETION, (row for group in rows.groups for row in group.completions))
            do.executemany(ADD_TOKEN_FIGURES, (row for group in rows.groups for row in group.token_figures))
            do.executemany(ADD_EPISODE, (row for group in rows.groups for row in group.episodes))
            do.execute(ADD_STEP, rows.step)

    def do(self, statements: Iterable[Statement]) -> None:
        """Carry out what the `…_statement` functions gave, in one transaction."""
        with store_errors(self._path), self._transaction() as do:
            for sql, row in statements:
                do.execute(sql, row)

    def settle(self, step: int) -> None:
        """Have everything written so far on the disk, whatever happens to the machine; note that it holds `step`."""
        with store_errors(self._path):
            self._connection.execute("PRAGMA synchronous = FULL")
            with self._transaction() as do:  # the sync of a commit is one of all commits before
                do.execute("UPDATE starts SET settled = ? WHERE start = ?", (step, self.start))
            self._connection.execute("PRAGMA synchronous = NORMAL")

    @property
    def is_in_place(self) -> bool:
        """Whether the name still leads to the file, in the folder that it was opened in, wherever that was moved.
        SQLite itself writes on into a file that was removed."""
        return leads_to(self._path.name, self._file, self._folder)

    def count_steps(self, up_to: int) -> int:
        """How many steps, up to one, are stored."""
        with store_errors(self._path):
            found = self._connection.execute("SELECT count(*) FROM steps WHERE step BETWEEN 1 AND ?", (up_to,))
            return int(found.fetchone()[0])

    def close(self) -> None:
        """Release the file. What was not committed is gone."""
        with suppress(sqlite3.Error):
            self._connection.close()
        folder, self._folder = self._folder, None
        if folder is not None:
            os.close(folder)

    def _prepare(self, check_s: float) -> None:
        connection = self._connection
        found = refuse_newer(connection, self._path)
        connection.execute("PRAGMA page_size = 8192")  # a completion has some kB: less is left empty than with 4096
        connection.execute("PRAGMA journal_mode = WAL")  # readers never wait for us, nor we for them
        connection.execute("PRAGMA synchronous = NORMAL")
        if not found:
            with self._transaction() as do:
                for table in TABLES:
                    do.execute(table)
                do.execute(f"PRAGMA user_version = {FORMAT}")
        elif fault := _damage(connection, check_s):
            raise DamagedStoreError(fault)

    def _begin(self, do: sqlite3.Cursor, first_step: int, start: int | None, facts: Row) -> int:
        if start is None:
            for table, column in TO_BE_MADE_AGAIN:
                do.execute(f"DELETE FROM {table} WHERE {column} > ?", (first_step,))
            listed = do.execute("SELECT version, folder FROM checkpoints WHERE removed_at IS NULL").fetchall()
            here = self._path.parent / "checkpoints"  # the run folder may have been moved since
            gone = [
                version for version, folder in listed if not (here / Path(folder).name).is_dir()
            ]  # and a kill came before telling
            do.executemany(REMOVE_CHECKPOINT, [(facts[0], version) for version in gone])
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
        with store_errors(path), closing(connect_to_read(path)) as connection:
            if not connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'steps'").fetchone()[0]:
                return set()
            return {
                step for (step,) in connection.execute("SELECT step FROM steps WHERE step BETWEEN 1 AND ?", (up_to,))
            }
    except DamagedStoreError:
        return set()


def set_aside(path: Path) -> Path:
    """Rename a damaged store to the next free `NAME.damaged-N.sqlite`, which is returned."""
    names = (path.with_name(f"{path.stem}.damaged-{number}{path.suffix}") for number in count(1))
    place = next(name for name in names if not name.exists())
    path.replace(place)
    with suppress(FileNotFoundError):
        Path(f"{path}-wal").replace(f"{place}-wal")
    Path(f"{path}-shm").unlink(missing_ok=True)
    return place


def _damage(connection: sqlite3.Connection, check_s: float) -> str | None:
    """What is wrong with the file, as far as can be seen in a while."""
    until_s = time.perf_counter() + check_s
    connection.set_progress_handler(lambda: time.perf_counter() > until_s, 10_000)
    try:
        found = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.OperationalError:  # the time is up
        return None
    finally:
        connection.set_progress_handler(None, 0)
    return None if found == "ok" else found
