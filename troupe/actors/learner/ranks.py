"""The learner's other ranks: processes that learn every batch together with it, and the watch over them.

A rank that dies or falls silent ends all of them, and the run: what is waiting in a collective then never returns, so
that the process itself may have to be ended. Whoever resumes goes on from the newest checkpoint with the same bits.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import mlx.core as mx
import msgspec

from troupe.actors.generator.weights_files import WeightsFiles
from troupe.actors.learner.collective import Backend, MlxRanks, arrange
from troupe.actors.learner.rank_wire import (
    Beat,
    Begin,
    Done,
    FromRank,
    Join,
    Learn,
    RankSetup,
    Ready,
    Refused,
    decode_from_rank,
    pack_batch,
)
from troupe.actors.learner.train import BatchTrainer, LearnerState
from troupe.errors import RunError
from troupe.grpo import Batch
from troupe.messages import Incident, Span
from troupe.messages.members import MemberState, MemberStatus
from troupe.runtime.device import DeviceThread
from troupe.runtime.frames import encode
from troupe.runtime.outlets import finish
from troupe.runtime.process import ChildEnded, ChildProcess
from troupe.runtime.reporter import Reporter
from troupe.runtime.terminal import EXIT_FAULT, tell

_LOOK_S = 0.25
_GRACE_S = 10.0
"""That a collective may take to notice that the other ranks are gone."""
_LAST_WORDS_S = 2.0
_MODULE = "troupe.actors.learner.rank_process"


def end_at_once(message: str) -> None:
    """End this process, as nothing else can: its thread waits within the device's driver."""
    tell(f"error: {message}; the process ends here, resume the run", error=True)
    finish(_LAST_WORDS_S)
    os._exit(EXIT_FAULT)


class _Rank:
    """One child and what is known of it."""

    def __init__(self, rank: int, child: ChildProcess) -> None:
        self.rank, self.child = rank, child
        self.heard_s = time.perf_counter()
        self.version: int | None = None
        self.waits = False
        self.device = ""


class RankProcesses:
    """The ranks from 1 on, as children of the learner, which is rank 0."""

    def __init__(
        self,
        setup: RankSetup,
        environments: Sequence[Mapping[str, str]],
        *,
        backend: Backend,
        folder: Path,
        silent_s: float,
        trainer: BatchTrainer,
        report: Reporter | None = None,
        end: Callable[[str], None] = end_at_once,
    ) -> None:
        """`environments`: what is added to that of each child. `folder`: of the run. `silent_s`: how long a rank may
        be silent, or all may wait for each other. `end`: ends this process where it hangs."""
        self._setup, self._environments = setup, environments
        self._folder, self._silent_s, self._end = folder, silent_s, end
        self._report = Reporter("learner") if report is None else report
        self._meeting = arrange(backend, 1 + len(environments))
        self._here = MlxRanks(self._meeting, 0)
        self._ranks: list[_Rank] = []
        self._unsent: list[bytes] = []
        self._wake: Callable[[], Any] = lambda: None
        self._trainer = trainer
        self._closing = False

    async def start(self, state: LearnerState, device: DeviceThread) -> None:
        """Start the processes with this state, which may be used up afterwards, and meet them."""
        files = WeightsFiles(
            self._folder, at_once=3, reader="the learner's ranks", remedy="set schedule.learner_ranks to 1"
        )
        try:
            with self._report.span("start ranks"):
                paths = await device.run(self._write, files, state)
                for rank, environment in enumerate(self._environments, 1):
                    child = await ChildProcess.start(_MODULE, env=environment)
                    self._ranks.append(_Rank(rank, child))
                async with anyio.create_task_group() as starting:
                    for each in self._ranks:
                        starting.start_soon(self._begin, each, state.version, paths)
        finally:
            files.close()
        self._trainer.ranks, self._trainer.told = self._here, self._tell

    async def meet(self, device: DeviceThread) -> None:
        """Have all ranks join, while they are watched."""
        for each in self._ranks:
            await each.child.send(encode(Join()))
        await device.run(self._here.join)

    async def watch(self) -> None:
        """Pass on what is to be told, and see that all live, until cancelled. RunError where one does not."""
        self._wake_up = anyio.Event()
        loop_wake = self._threadsafe_wake()
        self._wake = loop_wake
        async with anyio.create_task_group() as tasks:
            for each in self._ranks:
                tasks.start_soon(self._listen, each)
            tasks.start_soon(self._send_on)
            tasks.start_soon(self._look)

    async def aclose(self) -> None:
        """End the children. Safe to call twice."""
        self._closing = True
        ranks, self._ranks = self._ranks, []
        for each in ranks:
            if self._here.broken is not None:
                each.child.kill()
        for each in ranks:
            await each.child.aclose()
            self._report.forget(each.child.pid)

    def statuses(self) -> tuple[MemberStatus, ...]:
        """What each of them is at."""
        now_s = time.perf_counter()
        return tuple(
            MemberStatus(
                name=f"rank {each.rank}",
                kind="rank",
                state=self._state_of(each),
                offers=("learn",),
                last_beat_s=now_s - each.heard_s,
                version=each.version,
                device=each.device,
            )
            for each in self._ranks
        )
