"""Judge: the run's own decoding, in a process that is there while it is needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable

import anyio

from troupe.actors.generator.audits import Judge
from troupe.actors.generator.child import CHILD_FAULTS, GeneratorChild, Listener
from troupe.actors.generator.kin import probe_answer
from troupe.actors.generator.parts import Part
from troupe.actors.generator.weights_files import WeightsFiles
from troupe.actors.generator.wire import Setup
from troupe.messages import Incident, RolloutGroup, Span, TurnTaken
from troupe.policy import Weights
from troupe.runtime.board import PolicyBoard
from troupe.runtime.device import DeviceThread
from troupe.runtime.roles import decisive_fault

_IDLE_S = 60.0
"""After which the process ends."""
_TRIES = 3


class _Job:
    """One part to be decoded."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.groups: list[RolloutGroup] = []
        self.tries = 0
        self.fault: Exception | None = None
        self.ended = anyio.Event()

    def end(self, fault: Exception | None = None) -> None:
        self.fault = fault
        self.ended.set()


class RunJudge(Judge):
    """Decodes parts one by one; `run` must be running. It is a listener of its own process."""

    def __init__(
        self,
        setup: Setup,
        *,
        board: PolicyBoard[Weights],
        files: WeightsFiles,
        device: DeviceThread,
        start: Callable[[Setup, Listener], Awaitable[GeneratorChild]] = GeneratorChild.start,
    ) -> None:
        """`device`: the thread that writes files."""
        self._setup, self._board, self._files, self._device, self._start = setup, board, files, device, start
        self._jobs: deque[_Job] = deque()
        self._came = anyio.Event()
        self._child: GeneratorChild | None = None

    async def decode(self, part: Part) -> list[RolloutGroup]:
        """All groups of a part, with the version that it names. LookupError where that is gone; one of CHILD_FAULTS
        where its process fails again and again."""
        job = _Job(part)
        self._jobs.append(job)
        self._came.set()
        await job.ended.wait()
        if job.fault is not None:
            raise job.fault
        return job.groups

    async def run(self) -> None:
        """Have what is asked for decoded, until cancelled. TroupeError where no process could do it."""
        while True:
            await self._asked()
            try:
                await self._serve()
            except Exception as error:
                fault = decisive_fault(error)
                if not isinstance(fault, CHILD_FAULTS):
                    raise
                job = self._jobs[0] if self._jobs else None
                if job is not None:
                    job.tries += 1
                    if job.tries >= _TRIES:
                        self._jobs.popleft().end(fault)
                await anyio.sleep(1.0)

    async def on_group(self, group: RolloutGroup) -> None:
        job = self._jobs[0]
        job.groups.append(group)
        if len(job.groups) == len(job.part.prompts):
            self._jobs.popleft().end()

    async def on_turn(self, taken: TurnTaken) -> None:
        assert self._child is not None
        await self._child.observe(probe_answer(taken))

    async def on_incident(self, incident: Incident) -> None: ...

    def on_span(self, span: Span) -> None: ...

    def on_made(self, tokens: int) -> None: ...

    async def _asked(self) -> None:
        while not self._jobs:
            self._came = anyio.Event()
            await self._came.wait()

    async def _serve(self) -> None:
        """With one process, until it has had nothing to do for a while."""
        child = self._child = await self._start(self._setup, self)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(child.run)
                while True:
                    with anyio.move_on_after(_IDLE_S) as idle:
                        await self._asked()
                    if idle.cancelled_caught:
                        break
                    await self._give(child, self._jobs[0])
                tasks.cancel_scope.cancel()
        finally:
            self._child = None
            with anyio.CancelScope(shield=True):
                await child.aclose()

    async def _give(self, child: GeneratorChild, job: _Job) -> None:
        version = job.part.version
        weights = None if version is None else self._board.kept.get(version)
        if version is None or weights is None:
            self._jobs.popleft().end(LookupError(f"version {version} is gone"))
            return
        job.groups.clear()
        self._files.lend(version)
        try:
            self._files.keep(self._board.kept)
            path = await self._device.run(self._files.write, version, weights)
            del weights
            if job.part.set is None:
                await child.load(version, path)
                await child.decode(job.part)
            else:
                await child.evaluate(job.part, path)
                await job.ended.wait()
        finally:
            self._files.give_back(version)
        await job.ended.wait()
