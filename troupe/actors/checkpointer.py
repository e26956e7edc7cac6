"""Checkpointer: writes snapshots to the disk while the learner goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from troupe.checkpoint import (
    Checkpoint,
    RunState,
    checkpoint_folder,
    prune_checkpoints,
    publish_folder,
    save_checkpoint,
)
from troupe.errors import RunError
from troupe.messages import Incident, Snapshot
from troupe.policy import MAX_SHARD_BYTES, Qwen3Config, save_model_folder
from troupe.runtime import Actor, DeviceThread, Mailbox, Reporter


class Checkpointer(Actor):
    """Receives Snapshot. Every one is written; none is overwritten by the next.

    A snapshot holds immutable arrays by reference, so what is written never changes underneath. A disk that fails is
    an incident and the last whole checkpoint stays; only the final policy must be written, or the run has failed.
    """

    name = "checkpointer"

    def __init__(
        self,
        inbox: Mailbox,
        *,
        device: DeviceThread,
        run: Path,
        keep: int,
        policy_config: Qwen3Config,
        source: Path | None,
        run_state: Callable[[Snapshot], RunState],
        report: Reporter | None = None,
    ) -> None:
        super().__init__(inbox, report=report)
        self._run = run
        self._keep = keep
        self._policy_config = policy_config
        self._source = source
        self._run_state = run_state
        self._newest: int | None = None
        self._device = device

    async def handle(self, message: Snapshot) -> None:
        """Write a checkpoint; for the last one also the plain model folder `final/`."""
        with self.report.span("checkpoint", step=message.version):
            try:
                await self._device.run(self.write, message)
            except OSError as error:
                if message.final:
                    raise RunError(
                        f"{self._run}: the final policy could not be written: {error}; make room or mend the "
                        "permissions, then go on with --resume"
                    ) from error
                await self.report.incident(
                    Incident(
                        actor=self.name,
                        kind="checkpoint_failed",
                        message=f"the checkpoint of step {message.version} could not be written: {error}; "
                        "training goes on, and whole checkpoints from before stay",
                    )
                )

    def write(self, snapshot: Snapshot) -> None:
        """Write one snapshot, in the calling thread. OSError where the disk fails."""
        try:
            if snapshot.version != self._newest:  # what is whole on the disk is not put at risk by writing it again
                self._write_checkpoint(snapshot)
                self._newest = snapshot.version
            if snapshot.final:
                self._write_final(snapshot)
        except RuntimeError as error:  # as which MLX tells that a tensor file could not be written
            raise OSError(str(error)) from error

    def _write_checkpoint(self, snapshot: Snapshot) -> None:
        checkpoint = Checkpoint(
            config=self._policy_config,
            weights=snapshot.weights,
            optimizer_state=snapshot.optimizer_state,
            behind=snapshot.behind,
            state=self._run_state(snapshot),
            reference=snapshot.reference,
        )
        save_checkpoint(checkpoint_folder(self._run, snapshot.version), checkpoint, source=self._source)
        prune_checkpoints(self._run, self._keep)

    def _write_final(self, snapshot: Snapshot) -> None:
        temporary = self._run / ".writing-final"
        shutil.rmtree(temporary, ignore_errors=True)
        save_model_folder(temporary, self._policy_config, snapshot.weights, self._source, MAX_SHARD_BYTES)
        publish_folder(temporary, self._run / "final")
