"""Factories: what a run makes of threads, engines, files and sinks. Tests give others."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from troupe.actors.checkpoint_writer import CheckpointWriter
from troupe.actors.learner.train import BatchTrainer
from troupe.policy import RolloutEngine
from troupe.records.sinks.base import RunInfo, Sink
from troupe.records.sinks.make import make_sinks
from troupe.records.sinks.thread import SinkThread
from troupe.records.sinks.trace import TraceWriter
from troupe.run.config import config_table
from troupe.run.prepare import Prepared, prepare
from troupe.runtime.device import DeviceThread
from troupe.runtime.machine import VERSION, describe_machine
from troupe.runtime.mailbox import Mailbox


def sinks_of(prepared: Prepared) -> list[Sink]:
    """The sinks that the config names."""
    run = RunInfo(
        name=prepared.folder.name,
        folder=str(prepared.folder),
        total_steps=prepared.inputs.total_steps,
        first_step=prepared.start.first_step,
        program=VERSION,
        machine=describe_machine() if "sqlite" in prepared.config.metrics.sinks else "",
        config=config_table(prepared.config),
    )
    return make_sinks(prepared.config.metrics, run, {"trace": lambda: TraceWriter(prepared.folder / "trace.json")})


class Factories(msgspec.Struct, frozen=True, kw_only=True):
    """How the parts of a run are made that take time or room."""

    prepare: Callable[..., Prepared] = prepare
    device: Callable[[str], DeviceThread] = DeviceThread
    mailbox: Callable[[str], Mailbox] = Mailbox
    trainer: Callable[..., BatchTrainer] = BatchTrainer
    engine: Callable[..., RolloutEngine] = RolloutEngine
    writer: Callable[..., CheckpointWriter] = CheckpointWriter
    sinks: Callable[[Prepared], list[Sink]] = sinks_of
    sink_thread: Callable[..., SinkThread] = SinkThread
