"""Reading run.sqlite, also while the run writes it: what happened, and which completions there are.

The connection can neither change the file nor hold up who writes.
"""

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from troupe.dataset import CurriculumConfig
from troupe.errors import OutputError
from troupe.messages import Evaluated, EvaluatedRow, PromptText
from troupe.records.layout import RUN_TOML, STORE
from troupe.records.store import completions
from troupe.records.store.completions import Key, Piece, Query, StoredCompletion
from troupe.records.store.evaluations import stored_evaluations, stored_rows
from troupe.records.store.format import DamagedStoreError, connect_to_read, is_in_use, refuse_newer
from troupe.records.store.glance import Glance, read_glance
from troupe.records.store.members import StoredMember, stored_members
from troupe.records.store.rows import RowStory, prompts_of_rows, row_stories


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """One start of the run."""

    start: int
    """From 1."""
    unix_s: float
    pid: int
    first_step: int
    """Steps done before."""
    troupe: str
    """The version that ran it."""


class StoredCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint that was written."""

    version: int
    folder: str
    bytes: int
    seconds: float
    unix_s: float
    removed_at_unix_s: float | None


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """What happened so far."""

    steps: int
    """Learner batches that are stored."""
    newest_step: int | None
    """None before the first."""
    groups: dict[str, int]
    """State → groups that ended so."""
    completions: int
    rewards: dict[str, tuple[float | None, float | None]]
    """`reward` and every `rewards/NAME/mean` → the value of the first and of the newest step."""
    incidents: dict[str, int]
    """Kind → number, over all starts; the most frequent first."""
    newest_incidents: dict[str, str]
    """Kind → what the newest of them says."""
    checkpoints: tuple[StoredCheckpoint, ...]
    """Those that were not removed, the newest first."""
    starts: tuple[Start, ...]


class StoredStep(msgspec.Struct, frozen=True, kw_only=True):
    """One learner batch."""

    step: int
    start: int
    """The start of the run that made it."""
    unix_s: float
    metrics: dict[str, float | None]
    """None where a figure was no finite number."""


class StoredIncident(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong, once or several times alike after the same step."""

    start: int
    step: int
    """That of the newest step before it."""
    unix_s: float
    actor: str
    kind: str
    message: str
    gid: int | None
    """Of one of them."""
    times: int = 1


_FIGURES = msgspec.json.Decoder(dict[str, float | None])


class StoredRun:
    """The store of a run, open for reading: `with open_store(folder) as run`. Each method sees one state of it."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection, self.path = connection, path
        self.connection = connection  # for what other files read of it
        completions.prepare(connection)

    def overview(self) -> Overview:
        """What happened so far."""
        ask = self._connection.execute
        ask("BEGIN")
        try:
            steps, newest = ask("SELECT count(*), max(step) FROM steps").fetchone()
            starts = ask("SELECT start, time, pid, first_step, troupe FROM starts ORDER BY start")
            written = ask("SELECT * FROM checkpoints WHERE removed_at IS NULL ORDER BY version DESC")
            newest_of_kinds = (
                "SELECT kind, message FROM incidents WHERE rowid IN (SELECT max(rowid) FROM incidents GROUP BY kind)"
            )
            incidents = "SELECT kind, count(*) FROM incidents GROUP BY kind ORDER BY count(*) DESC, kind"
            return Overview(
                steps=steps,
                newest_step=newest,
                groups=dict(ask("SELECT state, count(*) FROM groups GROUP BY state ORDER BY state")),
                completions=ask("SELECT count(*) FROM completions").fetchone()[0],
                rewards=self._rewards(),
                incidents=dict(ask(incidents)),
                newest_incidents=dict(ask(newest_of_kinds)),
                checkpoints=tuple(_struct(StoredCheckpoint, row) for row in written),
                starts=tuple(_struct(Start, row) for row in starts),
            )
        finally:
            ask("COMMIT")

    def glance(self) -> Glance:
        """Its first and its newest step, and how long it went on."""
        return read_glance(self._connection)

    def has_step(self, step: int) -> bool:
        """Whether anything of a step is stored: itself, or groups that ended with it."""
        tables = ("steps", "groups")
        found = (self._connection.execute(f"SELECT 1 FROM {table} WHERE step = ? LIMIT 1", (step,)) for table in tables)
        return any(rows.fetchone() is not None for rows in found)

    def step_range(self) -> tuple[int, int] | None:
        """The first and the newest step that are stored; None before the first."""
        first, newest = self._connection.execute("SELECT min(step), max(step) FROM steps").fetchone()
        return None if first is None else (first, newest)

    def steps(self) -> Iterator[StoredStep]:
        """Every step, in order."""
        rows = self._connection.execute("SELECT step, start, time, metrics FROM steps ORDER BY step")
        for step, start, unix_s, metrics in rows:
            try:
                figures = _FIGURES.decode(metrics)
            except (msgspec.DecodeError, TypeError) as error:
                raise DamagedStoreError(f"step {step}: {error}") from None
            yield StoredStep(step=step, start=start, unix_s=unix_s, metrics=figures)

    def values(self, metric: str, most: int, up_to: int | None = None) -> list[tuple[int, float]]:
        """(step, value) of a figure at no more than `most` steps, the first and the newest (or `up_to`) among them."""
        found = self.step_range()
        if found is None:
            return []
        first, newest = found
        newest = newest if up_to is None else min(newest, up_to)
        apart = max(1, -(-(newest - first) // max(1, most - 1)))
        steps = {*range(first, newest, apart), newest} if newest >= first else set()
        rows = self._connection.execute(
            f"SELECT step, metrics FROM steps WHERE step IN ({','.join(map(str, steps))}) ORDER BY step"
        )
        told = ((step, _FIGURES.decode(metrics).get(metric)) for step, metrics in rows)
        return [(step, value) for step, value in told if value is not None]

    def all_values(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of every step that has a figure."""
        found = self._connection.execute(
            "SELECT step, metrics FROM steps WHERE instr(metrics, ?) ORDER BY step", (f'"{metric}"',)
        )
        told = ((step, _FIGURES.decode(metrics).get(metric)) for step, metrics in found)
        return [(step, value) for step, value in told if value is not None]

    def newest_incidents(self, count: int) -> list[StoredIncident]:
        """At most `count`, the newest first; those that are alike are one."""
        rows = self._connection.execute(
            "SELECT start, step, max(time), actor, kind, message, max(gid), count(*) FROM incidents"
            " GROUP BY start, step, actor, kind, message ORDER BY max(rowid) DESC LIMIT ?",
            (count,),
        )
        return [_struct(StoredIncident, row) for row in rows]

    def machines(self) -> dict[int, str]:
        """Start → the machine that it ran on; those that a Troupe wrote which did not tell are left out."""
        ask = self._connection.execute
        if not ask("SELECT count(*) FROM sqlite_master WHERE name = 'machines'").fetchone()[0]:
            return {}
        return dict(ask("SELECT start, machine FROM machines WHERE machine != '' ORDER BY start"))

    def evaluations(self) -> list[Evaluated]:
        """Every evaluation without its rows, by version."""
        return stored_evaluations(self._connection)

    def evaluated_rows(self, version: int, name: str) -> tuple[EvaluatedRow, ...]:
        """What a version answered to each row of a set; nothing where that is not stored."""
        return stored_rows(self._connection, version, name)

    def members(self) -> list[StoredMember]:
        """Who did work in a process of its own, start by start."""
        return list(stored_members(self._connection))

    def rows(self, config: CurriculumConfig) -> Iterator[RowStory]:
        """What became of every row of the dataset that was seen; `config`: what passes, and where pools begin."""
        return row_stories(self._connection, config)

    def prompts_of_rows(self) -> dict[int, PromptText | None]:
        """Row → its prompt, of the rows that were seen."""
        return prompts_of_rows(self._connection)

    def steps_with_completions(self) -> list[int]:
        """The first and the newest step that have any; none, or one, where there are no two."""
        ends = self._connection.execute("SELECT min(step), max(step) FROM completions").fetchone()
        return [step for step in dict.fromkeys(ends) if step is not None]

    def rows_seen_most(self, count: int) -> list[int]:
        """The dataset rows that most groups were of, and more than one."""
        sql = (
            "SELECT row FROM groups WHERE row IS NOT NULL GROUP BY row HAVING count(*) > 1"
            " ORDER BY count(*) DESC, row LIMIT ?"
        )
        return [row for (row,) in self._connection.execute(sql, (count,))]

    def reward_names(self) -> list[str]:
        """The rewards of the newest group."""
        row = self._connection.execute("SELECT scores FROM completions ORDER BY step DESC LIMIT 1").fetchone()
        return [] if row is None else list(msgspec.json.decode(row[0]))

    def count(self, query: Query) -> int:
        """How many completions there are for the query, without its `count`."""
        return completions.count(self._connection, query)

    def completions(self, query: Query) -> Iterator[StoredCompletion]:
        """The completions, in the order that the query says."""
        return completions.load(self._connection, completions.keys(self._connection, query))

    def piece(self, query: Query, count: int, after: Key | None = None, *, patience_s: float = 0.1) -> Piece:
        """Some completions of a query, as `completions.piece` finds them."""
        return completions.piece(self._connection, query, count, after, patience_s=patience_s)

    def load(self, keys: Iterable[Key]) -> Iterator[StoredCompletion]:
        """The completions that were found."""
        return completions.load(self._connection, iter(keys))

    def _rewards(self) -> dict[str, tuple[float | None, float | None]]:
        ends = self.glance()
        names = [n for n in ends.newest if n == "reward" or (n.startswith("rewards/") and n.endswith("/mean"))]
        return {name: (ends.first.get(name), ends.newest[name]) for name in names}


@contextmanager
def open_store(folder: Path) -> Iterator[StoredRun]:
    """The store in a run folder. OutputError where there is none, or one that is damaged or of a newer Troupe."""
    path = folder / STORE
    try:
        is_folder, is_store = folder.is_dir(), path.is_file()
    except OSError as error:
        raise OutputError(f"{folder}: the run folder cannot be read: {error}") from None
    if not is_folder:
        raise OutputError(f"{folder}: there is no such run folder; give the folder that `troupe train` wrote into")
    if not is_store and not (folder / RUN_TOML).is_file():
        raise OutputError(
            f"{path}: there is no run store; nor is there a run.toml, so {folder} is not the folder of a run"
        )
    if not is_store:
        raise OutputError(
            f"{path}: there is no run store; runs have one from their first step on where metrics.sinks names 'sqlite'"
        )
    unwatched = not is_in_use(path)
    try:
        with closing(connect_to_read(path)) as connection:
            connection.isolation_level = None
            if not refuse_newer(connection, path):
                raise OutputError(f"{path}: the run store is empty as yet; ask again when the run has begun")
            yield StoredRun(connection, path)
    except sqlite3.OperationalError as error:
        raise OutputError(f"{path}: the run store cannot be read now: {error}") from None
    except msgspec.DecodeError as error:
        raise OutputError(f"{path}: the run store holds what no run wrote: {error}") from None
    except (sqlite3.DatabaseError, DamagedStoreError) as error:
        if unwatched and is_in_use(path):
            raise OutputError(f"{path}: a run has begun to write into the store meanwhile; ask again") from None
        raise OutputError(
            f"{path}: the run store is damaged: {error}; a run that goes on in this folder sets it aside and begins a "
            "new one"
        ) from None


def _struct(kind: Any, row: tuple[Any, ...]) -> Any:
    return kind(**dict(zip(kind.__struct_fields__, row, strict=True)))
