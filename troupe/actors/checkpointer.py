"""Checkpointer: writes snapshots to the disk while the learner goes on, and tries again where the disk fails; and its
CheckpointWriter: what of a snapshot goes where, and which older checkpoints go for it."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import msgspec

from troupe.actors.ledgers import CheckpointLedger
from troupe.checkpoint import (
    Checkpoint,
    CheckpointConfig,
    Made,
    Pruned,
    RunState,
    checkpoint_folder,
    clear_leftovers,
    newer_versions,
    prune_checkpoints,
    read_state,
    save_checkpoint,
    save_final_policy,
)
from troupe.errors import CheckpointError, FolderGoneError, RunError
from troupe.messages import CheckpointWritten, Incident, Snapshot, Unfinished
from troupe.policy import Companions, NetworkConfig, Weights
from troupe.policy.adapter.files import AdapterFiles
from troupe.runtime.actor import Actor
from troupe.runtime.backoff import backoff_s
from troupe.runtime.device import DeviceThread
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.reporter import Reporter

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_NICENESS = 5
"""Of the thread that writes checkpoints, and of those that it starts. Where all processors are busy it gets about a
quarter of one: more would be taken from the learner, and with much less it would have to be waited for."""
UNSETTLED = "not all that was told of the steps up to {} is on the disk yet, but its checkpoint is written"


class Judged(NamedTuple):
    """What evaluations say of versions; as for `prune_checkpoints`."""

    judged: Mapping[int, float] | None = None
    pending: Collection[int] = ()


class Checkpointer(Actor):
    """Receives Snapshot; sends CheckpointWritten. Every snapshot is written when it comes; none is overwritten by the
    next.

    A snapshot holds immutable arrays by reference, so what is written never changes underneath. A disk that fails is an
    incident, and the last whole checkpoint stays. The snapshot is tried again, after pauses that grow, until it is
    written or the next one has come: nobody waits for that. Only the final policy must be written, or the run has
    failed.
    """

    name = "checkpointer"

    def __init__(
        self,
        inbox: Mailbox,
        written: Channel[CheckpointWritten],
        *,
        writer: CheckpointWriter,
        device: DeviceThread,
        settle: Callable[[int], Awaitable[bool]],
        pauses: Callable[[], Iterable[float]] | None = None,
        report: Reporter | None = None,
    ) -> None:
        """`writer` outlives the actor, and works on the thread of `device`. `settle`: comes back when all that was told
        up to the Update of a version is on the disk; False where that took too long. `pauses`: seconds between
        attempts.

        Settling comes before writing: it takes a moment, while nobody waits for the checkpoint yet, and writing stays
        one call that nothing can leave half done.
        """
        super().__init__(inbox, [written], report)
        self._written = written
        self._writer = writer
        self._ledger = writer.ledger
        self._device = device
        self._settle = settle
        self._pauses = pauses or growing_pauses

    async def start(self) -> None:
        """Let all others have the processors first: nobody waits for a checkpoint as long as a step takes longer. Tell
        of a checkpoint that nobody has been told of."""
        await self._device.run(lower_priority)
        await self._tell_of_written()

    async def handle(self, message: Snapshot) -> None:
        """Write a checkpoint; for the last one also the plain model folder `final/`."""
        self._ledger.pending = None
        with self.report.span("checkpoint", step=message.version):
            if not await self._settle(message.version):
                await self._tell("checkpoint_unsettled", UNSETTLED.format(message.version))
            try:
                await self._attempt(message)
            except OSError as error:
                if message.final:
                    raise RunError(
                        f"{self._writer.run}: the final policy could not be written: {error}; make room or mend the "
                        "permissions, then go on with --resume"
                    ) from error
                await self._failed(message, error)

    async def _take(self) -> Any:
        """The next message; while none comes, what could not be written is tried again."""
        for pause_s in self._pauses():
            if self._ledger.pending is None:
                break
            with anyio.move_on_after(pause_s):
                return await super()._take()
            await self._try_again()
        return await super()._take()

    async def _try_again(self) -> None:
        snapshot = self._ledger.pending
        assert snapshot is not None
        with self.report.span("checkpoint again", step=snapshot.version):
            try:
                await self._attempt(snapshot)
            except (OSError, _SupersededError):
                return
        self._ledger.pending = None

    async def _attempt(self, snapshot: Snapshot) -> None:

        def give_way() -> None:
            if snapshot is self._ledger.pending and len(self.inbox):
                raise _SupersededError

        try:
            await self._device.run(self._writer.write, snapshot, give_way)
        except FolderGoneError as error:
            await self._tell("folder_gone", str(error))
            raise
        ledger = self._ledger
        if ledger.failing:
            ledger.failing = False
            await self._tell("checkpoint_back", f"the checkpoint of step {snapshot.version} is written: the disk works")
        if ledger.taken_away is not None:
            message, ledger.taken_away = ledger.taken_away, None
            await self._tell("checkpoints_gone", message)
        if ledger.pruning_faults:
            faults, ledger.pruning_faults = ledger.pruning_faults, ()
            message = f"old checkpoints could not be removed: {'; '.join(faults)}; they go when that is mended"
            await self._tell("prune_failed", message)
        await self._tell_of_written()

    async def _tell_of_written(self) -> None:
        if self._ledger.untold is not None:
            await self._written.send(self._ledger.untold)
        self._ledger.untold = None

    async def _failed(self, snapshot: Snapshot, error: OSError) -> None:
        again = "the next one will be tried"
        if self._writer.tries_again:
            self._ledger.pending = snapshot
            again = "it is tried again"
        self._ledger.failing = True
        message = (
            f"the checkpoint of step {snapshot.version} could not be written: {error}; training goes on, whole "
            f"checkpoints from before stay, and {again}"
        )
        await self._tell("checkpoint_failed", message)

    async def _tell(self, kind: str, message: str) -> None:
        await self.report.incident(Incident(actor=self.name, kind=kind, message=message))


class _SupersededError(Exception):
    """A newer snapshot has come while an older one was tried again."""


def lower_priority() -> None:
    """Lower the priority of this thread, where the system knows one for a single thread and it is not lower already."""
    if sys.platform == "linux" and threading.current_thread() is not threading.main_thread():
        thread = threading.get_native_id()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, max(_NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))


def growing_pauses() -> Iterator[float]:
    """1 s, 2 s, 4 s … 60 s, 60 s …"""
    return (backoff_s(nth, _FIRST_PAUSE_S, _LONGEST_PAUSE_S) for nth in itertools.count(1))


class CheckpointWriter:
    """Writes snapshots of one run, in the thread that calls it, and notes in the ledger what came of it."""

    def __init__(
        self,
        run: Path,
        config: CheckpointConfig,
        policy_config: NetworkConfig,
        source: Path | Companions | None,
        *,
        run_state: Callable[[Snapshot], RunState],
        made: Callable[[], Made] = Made,
        adapter_files: Callable[[Weights], AdapterFiles | None] = lambda weights: None,
        check_folder: Callable[[], None] = lambda: None,
        ledger: CheckpointLedger | None = None,
        judged: Callable[[], Judged] = Judged,
    ) -> None:
        """`adapter_files`: what to write of weights that are an adapter's, else None. `judged`: what is known of
        `metric_for_best`, where not the checkpoints say it.

        `check_folder`: raises FolderGoneError where the run folder is not in its place any more."""
        self.ledger = CheckpointLedger() if ledger is None else ledger
        self.run = run
        self._config = config
        self._policy_config = policy_config
        self._source = source
        self._run_state = run_state
        self._made = made
        self._adapter_files = adapter_files
        self._check_folder = check_folder
        self._judged = judged

    @property
    def tries_again(self) -> bool:
        """Whether a snapshot may be kept while learning goes on; else memory has no room for it."""
        return self._config.overlap is not False

    def write(self, snapshot: Snapshot, give_way: Callable[[], None] = lambda: None) -> None:
        """Write a checkpoint; of the last snapshot also the plain model folder `final/`.

        OSError where the disk fails, FolderGoneError where the run folder is not in its place: then nothing is written.
        `give_way` is called before every block, and may raise.
        """
        self._check_folder()
        if self._is_news(snapshot):
            self._write_checkpoint(snapshot, give_way)
        if snapshot.final:
            self._check_folder()
            save_final_policy(
                self.run / "final",
                self._policy_config,
                snapshot.weights,
                self._source,
                adapter=self._adapter_files(snapshot.weights),
                before_taking_place=self._check_folder,
            )

    def _is_news(self, snapshot: Snapshot) -> bool:
        """Whether the newest checkpoint lacks any of it: what is whole is not written again for nothing."""
        newest = self.ledger.newest
        if newest is not None and not self._is_there(newest):
            self.ledger.newest = None
            self.ledger.taken_away = (
                f"{checkpoint_folder(self.run, newest)}: the newest checkpoint was removed under the run; until the "
                f"one of step {snapshot.version} was written, a kill would have cost all steps since those that are "
                "left"
            )
        return snapshot.version != self.ledger.newest or not gids_of(snapshot.unfinished) <= self.ledger.gids

    def _is_there(self, version: int) -> bool:
        """Whether the run folder has a finished checkpoint; also where nobody can tell."""
        try:
            return version in newer_versions(self.run, version - 1)
        except RunError:
            return True

    def _write_checkpoint(self, snapshot: Snapshot, give_way: Callable[[], None]) -> None:
        started_s = time.perf_counter()
        ledger, folder = self.ledger, checkpoint_folder(self.run, snapshot.version)
        adapter = self._adapter_files(snapshot.weights)
        checkpoint = Checkpoint(
            config=self._policy_config if adapter is None else None,
            weights=snapshot.weights,
            optimizer_state=snapshot.optimizer_state,
            behind=snapshot.behind,
            state=self._state(snapshot, folder),
            made=self._made(),
            reference=snapshot.reference,
            average=snapshot.average,
            unfinished=snapshot.unfinished,
            curriculum=snapshot.curriculum,
        )

        def before_block() -> None:
            self._check_folder()
            give_way()

        clear_leftovers(self.run)
        size = save_checkpoint(folder, checkpoint, source=self._source, adapter=adapter, before_block=before_block)
        seconds = time.perf_counter() - started_s
        self._check_folder()  # what lies there now may have checkpoints of its own, which are not ours to prune
        pruned = self._prune(snapshot.version)
        ledger.newest, ledger.gids = snapshot.version, gids_of(snapshot.unfinished)
        ledger.pruning_faults = pruned.faults
        ledger.untold = CheckpointWritten(
            version=snapshot.version, folder=str(folder), bytes=size, seconds=seconds, removed=pruned.removed
        )

    def _state(self, snapshot: Snapshot, folder: Path) -> RunState:
        """Where the same step was cut before and none was made since, the means of then are those of the step."""
        state = self._run_state(snapshot)
        if not state.metrics and snapshot.version == self.ledger.newest:
            try:
                return msgspec.structs.replace(state, metrics=read_state(folder).metrics)
            except (CheckpointError, RunError):  # it was removed, harmed, or cannot be read now
                pass
        return state

    def _prune(self, version: int) -> Pruned:
        self.ledger.abandoned.discard(version)
        told = self._judged()
        try:
            pruned = prune_checkpoints(
                self.run, self._config, abandoned=self.ledger.abandoned, judged=told.judged, pending=told.pending
            )
        except OSError as error:
            return Pruned(faults=(str(error),))
        self.ledger.abandoned -= set(pruned.removed)
        return pruned


def gids_of(unfinished: Unfinished) -> frozenset[int]:
    """Groups whose scores a checkpoint holds."""
    return frozenset(group.group.prompt.gid for group in (*unfinished.scored, *unfinished.collected))
