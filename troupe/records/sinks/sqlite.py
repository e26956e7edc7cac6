"""run.sqlite: every step, completion, incident and checkpoint of a run. When to write; how is in `store/write.py`."""

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from troupe.messages import Answered, CheckpointWritten, Evaluated, GroupClosed, Incident, Status, Update
from troupe.records.store.answers import answer_statements, forgetting_statement
from troupe.records.store.evaluations import evaluation_statements
from troupe.records.store.format import (
    DamagedStoreError,
    GroupRows,
    Statement,
    StepRows,
    checkpoint_statements,
    group_rows,
    incident_statement,
    step_rows,
)
from troupe.records.store.members import MemberBook
from troupe.records.store.write import StoreWriter, set_aside
from troupe.runtime.held_folder import HeldFolder


class SqliteSink:
    """Keeps what ended with a step until its Update, and then writes all of it in one transaction.

    What cannot be written stays and comes with the next `flush`. A file that is damaged is set aside, and a new one is
    begun with what comes from then on; so it is with one that somebody has removed.
    """

    name = "sqlite"
    takes: tuple[type, ...] = (Update, GroupClosed, Incident, CheckpointWritten, Answered, Evaluated, Status)

    def __init__(
        self,
        path: Path,
        *,
        first_step: int = 0,
        program: str = "",
        machine: str = "",
        log_probs: bool = False,
        clock: Callable[[], float] = time.time,
        make_store: Callable[..., StoreWriter] = StoreWriter,
    ) -> None:
        """`first_step`: steps done before this start. `program`, `machine`: the version of Troupe and what it runs on,
        for the store to tell. `log_probs`: whether those of every token are stored."""
        self.notes: deque[Incident] = deque()
        self.lacking: int | None = None
        """Steps up to the newest that was committed which are not in the store; None before it was opened."""
        self._held: HeldFolder | None = None
        self._committed = first_step
        self._path, self._first_step, self._program, self._log_probs = path, first_step, program, log_probs
        self._machine = machine
        self._clock, self._make_store = clock, make_store
        self._step = first_step
        self._start: int | None = None
        self._store: StoreWriter | None = None
        self._opened = False
        self._groups: list[GroupRows] = []
        self._steps: deque[StepRows] = deque()
        self._others: list[Statement] = []
        self._members = MemberBook(clock)

    def open(self) -> None:
        """Begin a start of the run: what will be made again is removed."""
        self._opened = True
        self.flush()

    def write(self, message: object) -> None:
        """Take a message; it is written with the next `flush`, a group with the one after its step's Update."""
        if isinstance(message, GroupClosed):
            self._groups.append(group_rows(message, log_probs=self._log_probs))
        elif isinstance(message, Update):
            self._steps.append(step_rows(message, self._groups, self._clock()))
            self._groups, self._step = [], message.step
        elif isinstance(message, Incident):
            self._others.append(incident_statement(message, self._step, self._clock()))
        elif isinstance(message, CheckpointWritten):
            self._others += [*checkpoint_statements(message, self._clock()), forgetting_statement()]
        elif isinstance(message, Answered):
            self._others += answer_statements(message)
        elif isinstance(message, Evaluated):
            self._others += evaluation_statements(message, self._clock())
        elif isinstance(message, Status) and message.members:
            self._others += self._members.look(message.members)

    def flush(self) -> None:
        if not self._opened:
            return
        try:
            self._put_out()
        except DamagedStoreError as damage:
            self._begin_anew(damage)
            self._put_out()

    def settle(self) -> None:
        if self._store is not None:
            try:
                self._store.settle(self._step)
            except (OSError, DamagedStoreError) as error:
                self._disconnect()
                raise OSError(str(error)) from error  # damage is met again by the next flush, and dealt with

    def close(self) -> None:
        """Close the file; groups whose step has not ended are made again by who resumes, and not kept."""
        self._opened = False
        if self._store is not None and (rest := self._members.rest()):
            with suppress(OSError, DamagedStoreError):
                self._store.do(rest)
        self._disconnect()
        if self._held is not None:
            self._held.close()
            self._held = None

    def _put_out(self) -> None:
        if self._store is not None and not self._store.is_in_place:
            self._disconnect()
            self._check_folder()
            message = (
                f"{self._path} was removed or exchanged under the run; what is there now is gone on with, or a new one "
                f"begun, without those of the {self._committed} steps before that are not in it"
            )
            self.notes.append(Incident(actor="metrics", kind="file_lost", message=message))
        if self._store is None:
            self._check_folder()
            self._store = self._make_store(
                self._path,
                first_step=self._first_step,
                start=self._start,
                program=self._program,
                machine=self._machine,
                clock=self._clock,
            )
            self._start = self._store.start
            self.lacking = self._committed - self._store.count_steps(self._committed)
        try:
            while self._steps:
                self._store.add_step(self._steps[0])
                self._committed = max(self._committed, self._steps.popleft().step[0])
            if self._others:
                self._store.do(self._others)
                self._others = []
        except (OSError, DamagedStoreError):
            self._disconnect()
            raise

    def _check_folder(self) -> None:
        """FolderGoneError where the folder was moved since it was opened first: its name leads to what is not this
        run's."""
        if self._held is None:
            with suppress(OSError):  # SQLite says so of the file
                self._held = HeldFolder(self._path.parent)
        if self._held is not None:
            self._held.check()

    def _begin_anew(self, damage: DamagedStoreError) -> None:
        aside = set_aside(self._path)
        message = (
            f"{self._path} is damaged ({damage}) and was set aside as {aside.name}; a new one is begun, without the "
            "steps before"
        )
        self.notes.append(Incident(actor="metrics", kind="store_damaged", message=message))

    def _disconnect(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            store.close()
