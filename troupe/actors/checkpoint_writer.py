"""CheckpointWriter: what of a snapshot goes where on the disk, and which older checkpoints go for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

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
from troupe.errors import CheckpointError, RunError
from troupe.messages import CheckpointWritten, Snapshot, Unfinished
from troupe.policy import Companions, Qwen3Config


class CheckpointWriter:
    """Writes snapshots of one run, in the thread that calls it, and notes in the ledger what came of it."""

    def __init__(
        self,
        run: Path,
        config: CheckpointConfig,
        policy_config: Qwen3Config,
        source: Path | Companions | None,
        *,
        run_state: Callable[[Snapshot], RunState],
        made: Callable[[], Made] = Made,
        check_folder: Callable[[], None] = lambda: None,
        ledger: CheckpointLedger | None = None,
    ) -> None:
        """`check_folder`: raises FolderGoneError where the run folder is not in its place any more."""
        self.ledger = CheckpointLedger() if ledger is None else ledger
        self.run = run
        self._config = config
        self._policy_config = policy_config
        self._source = source
        self._run_state = run_state
        self._made = made
        self._check_folder = check_folder

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
        checkpoint = Checkpoint(
            config=self._policy_config,
            weights=snapshot.weights,
            optimizer_state=snapshot.optimizer_state,
            behind=snapshot.behind,
            state=self._state(snapshot, folder),
            made=self._made(),
            reference=snapshot.reference,
            unfinished=snapshot.unfinished,
        )

        def before_block() -> None:
            self._check_folder()
            give_way()

        clear_leftovers(self.run)
        size = save_checkpoint(folder, checkpoint, source=self._source, before_block=before_block)
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
        try:
            pruned = prune_checkpoints(self.run, self._config, abandoned=self.ledger.abandoned)
        except OSError as error:
            return Pruned(faults=(str(error),))
        self.ledger.abandoned -= set(pruned.removed)
        return pruned


def gids_of(unfinished: Unfinished) -> frozenset[int]:
    """Groups whose scores a checkpoint holds."""
    return frozenset(group.group.prompt.gid for group in (*unfinished.scored, *unfinished.collected))
