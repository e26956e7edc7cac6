"""The learner's other ranks: processes that learn every batch together with it, and the watch over them.

A rank that dies or falls silent ends all of them, and the run: what is waiting in a collective then never returns, so
that the process itself may have to be ended. Whoever resumes goes on from the newest checkpoint with the same bits.
"""

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import anyio
import msgspec
from anyio.abc import TaskGroup

from troupe.actors.generator.child import GeneratorChild, Listener
from troupe.actors.generator.hosted import GeneratorHost, HostedChild, Line
from troupe.actors.generator.weights_files import WeightsFiles
from troupe.actors.generator.wire import Setup
from troupe.actors.learner.collective import Backend, Meeting, MlxRanks, arrange
from troupe.actors.learner.rank_wire import (
    Beat,
    Begin,
    Done,
    Join,
    Learn,
    OfGenerator,
    RankSetup,
    Ready,
    Refused,
    ToGenerator,
    decode_from_rank,
    pack_batch,
)
from troupe.actors.learner.train import BatchTrainer, LearnerState
from troupe.errors import RunError
from troupe.grpo import Batch
from troupe.messages import Incident, MemberState, MemberStatus, Span
from troupe.runtime.device import DeviceThread
from troupe.runtime.frames import FrameError, encode
from troupe.runtime.outlets import finish
from troupe.runtime.process import ChildEnded, ChildProcess
from troupe.runtime.reporter import Reporter
from troupe.runtime.terminal import EXIT_FAULT, tell

GONE = (ChildEnded, anyio.BrokenResourceError, FrameError)
"""What a child that is gone, or out of its mind, looks like."""
GRACE_S = 10.0
"""That a collective may take to notice that the other ranks are gone."""
RANK_MODULE = "troupe.actors.learner.rank_process"
_LOOK_S = 0.25
_SESSIONS = count(1)
_LAST_WORDS_S = 2.0


def end_at_once(message: str) -> None:
    """End this process, as nothing else can: its thread waits within the device's driver."""
    tell(f"error: {message}; the process ends here, resume the run", error=True)
    finish(_LAST_WORDS_S)
    os._exit(EXIT_FAULT)


class _Rank:
    """One child and what is known of it."""

    def __init__(self, rank: int, child: ChildProcess) -> None:
        self.name, self.child = f"rank {rank}", child
        self.heard_s = time.perf_counter()
        self.silent_s = 0.0
        """That this process has looked in vain for a sign of it, which does not count while it was away itself."""
        self.version: int | None = None
        self.waits = False
        self.device = ""
        self.lines: dict[int, Line] = {}
        """Of generators there, by session."""


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
        host: GeneratorHost | None = None,
        report: Reporter | None = None,
        end: Callable[[str], None] = end_at_once,
        grace_s: float = GRACE_S,
        module: str = RANK_MODULE,
        here: Callable[[Meeting, int], MlxRanks] = MlxRanks,
    ) -> None:
        """`environments`: what is added to that of each child. `folder`: of the run. `silent_s`: how long a rank may
        be silent, or all may wait for each other. `host`: of the generator beside rank 0, where one may be. `end`: ends
        this process where it hangs for `grace_s` after the others are gone. `module`: what a child runs. `here`: makes
        what this process is among the ranks."""
        self._setup, self._environments, self._module = setup, environments, module
        self._folder, self._silent_s, self._end, self._grace_s = folder, silent_s, end, grace_s
        self._report = Reporter("learner") if report is None else report
        self._meeting = arrange(backend, 1 + len(environments))
        self._here = here(self._meeting, 0)
        self._ranks: list[_Rank] = []
        self._unsent: list[bytes] = []
        self._something = anyio.Event()
        self._is_learning = self._is_closing = False
        self._met, self._host = anyio.Event(), host
        self._hosted: list[HostedChild] = []
        self._watching: TaskGroup
        self._first = 0
        self._loop: asyncio.AbstractEventLoop
        trainer.ranks, trainer.told = self._here, self._tell

    async def start(self, state: LearnerState, device: DeviceThread) -> None:
        """Start the processes with this state. RunError where one cannot."""
        self._loop, self._first = asyncio.get_running_loop(), state.version
        remedy = "set schedule.learner_ranks to 1"
        files = WeightsFiles(self._folder, at_once=3, reader="the learner's ranks", remedy=remedy)
        try:
            with self._report.span("start ranks"):
                for rank, environment in enumerate(self._environments, 1):
                    self._ranks.append(_Rank(rank, await ChildProcess.start(self._module, env=environment)))
                paths = await device.run(_write, files, state)
                async with anyio.create_task_group() as starting:
                    for rank, each in enumerate(self._ranks, 1):
                        frame = encode(Begin(rank=rank, meeting=self._meeting, setup=self._setup, **paths))
                        starting.start_soon(self._begin, each, frame)
        finally:
            files.close()

    async def _begin(self, each: _Rank, frame: bytes) -> None:
        try:
            await each.child.send(frame)
            message = decode_from_rank(await each.child.receive())
        except GONE as error:
            raise RunError(f"the learner's {each.name} could not be started: {error}") from None
        if isinstance(message, Refused):
            raise RunError(f"the learner's {each.name} could not be started: {message.message}")
        assert isinstance(message, Ready)
        each.device, each.heard_s = message.device, time.perf_counter()

    async def meet(self, device: DeviceThread) -> None:
        """Have all ranks come together, while they are watched."""
        with self._report.span("meet ranks"):
            for each in self._ranks:
                await each.child.send(encode(Join()))
            await device.run(self._here.join)
        self._met.set()

    async def watch(self) -> None:
        """Pass on what is to be told, and see that all are well, until cancelled. RunError where one is not."""
        async with anyio.create_task_group() as self._watching:
            for each in self._ranks:
                self._watching.start_soon(self._listen, each)
            self._watching.start_soon(self._send_on)
            self._watching.start_soon(self._look)
            if self._host is not None:
                self._watching.start_soon(self._host.run)

    async def until_alone(self) -> None:
        """Wait until there is no generator beside any of them: some decode what is evaluated last."""
        for each in self._hosted:
            await each.ended.wait()

    async def aclose(self) -> None:
        """End the children. Safe to call twice."""
        ranks, self._ranks, self._is_closing = self._ranks, [], True
        for each in ranks:
            if self._here.broken is not None:
                each.child.kill()
        for each in ranks:
            await each.child.aclose()
            self._report.forget(each.child.pid)

    async def generator(self, rank: int, setup: Setup, listener: Listener) -> GeneratorChild:
        """A generator beside a rank, as `GeneratorChild.start`, once all are there."""
        await self._met.wait()
        if rank == 0:
            assert self._host is not None
            child = HostedChild(self._host.open(), os.getpid())
            self._hosted.append(child)
            return await GeneratorChild.over(child, setup, listener, holds_from=0)
        ours, theirs = Line.pair()
        each, session = self._ranks[rank - 1], next(_SESSIONS)
        each.lines[session] = theirs
        self._watching.start_soon(self._bring, each, session, theirs)
        child = HostedChild(ours, each.child.pid)
        self._hosted.append(child)
        return await GeneratorChild.over(child, setup, listener, holds_from=self._first)

    async def _bring(self, each: _Rank, session: int, line: Line) -> None:
        """What is said to a generator, until nothing more is."""
        with suppress(anyio.BrokenResourceError):
            with suppress(anyio.EndOfStream):
                while True:
                    await each.child.send(encode(ToGenerator(session=session, frame=await line.receive())))
            await each.child.send(encode(ToGenerator(session=session, frame=None)))

    async def _take(self, each: _Rank, message: OfGenerator) -> None:
        line = each.lines.get(message.session)
        if line is None:
            return
        if message.frame is None:
            del each.lines[message.session]
            line.close(message.why)
            return
        with suppress(anyio.BrokenResourceError):
            await line.send(message.frame)

    def statuses(self) -> tuple[MemberStatus, ...]:
        """What each of them is at."""
        now_s = time.perf_counter()
        return tuple(
            MemberStatus(
                name=each.name,
                kind="rank",
                state=self._state_of(each),
                offers=("learn",),
                last_beat_s=now_s - each.heard_s,
                version=each.version,
                device=each.device,
            )
            for each in self._ranks
        )

    def _state_of(self, each: _Rank) -> MemberState:
        if self._here.broken is not None:
            return "lost"
        if each.version is None:
            return "starting"
        if each.silent_s > self._silent_s / 2:
            return "silent"
        return "waiting" if each.waits else "working" if self._is_learning else "idle"

    def _tell(self, version: int, batch: Batch | None, rates: Sequence[float]) -> None:
        """On the thread that learns: have the others learn the same."""
        packed = None if batch is None else pack_batch(batch)
        frame = encode(Learn(version=version, batch=packed, rates=tuple(rates)))
        self._loop.call_soon_threadsafe(self._queue, frame)

    def _queue(self, frame: bytes) -> None:
        self._is_learning = True
        self._unsent.append(frame)
        self._something.set()

    async def _send_on(self) -> None:
        while True:
            await self._something.wait()
            self._something = anyio.Event()
            frames, self._unsent = self._unsent, []
            for frame in frames:
                for each in self._ranks:
                    with suppress(anyio.BrokenResourceError):  # who listens tells of its end
                        await each.child.send(frame)

    async def _listen(self, each: _Rank) -> None:
        while True:
            try:
                message = decode_from_rank(await each.child.receive())
            except GONE as error:
                return self._break(each, str(error))
            each.heard_s, each.silent_s = time.perf_counter(), 0.0
            match message:
                case Beat(version=version, waits=waits):
                    each.version, each.waits = version, waits
                case Done(version=version, parts=parts):
                    each.version, each.waits, self._is_learning = version, False, False
                    self._show(each, version - 1, parts)
                case OfGenerator() as said:
                    await self._take(each, said)
                case Refused(message=why):
                    return self._break(each, why)

    def _show(self, each: _Rank, step: int, parts: Sequence[tuple[str, float, float]]) -> None:
        for name, start_s, end_s in parts:
            span = Span(actor="learner", name=name, start_s=start_s, end_s=end_s, step=step)
            span = msgspec.structs.replace(span, process=each.child.pid, member=each.name)
            self._report.forward(span)

    def _break(self, each: _Rank | None, why: str) -> None:
        """No rank can go on: all but this one are killed, after which what waits for them may return."""
        if self._here.broken is not None or self._is_closing:
            return
        who = "the learner's ranks" if each is None else f"the learner's {each.name}"
        message = f"{who}: {why}; the other ranks were ended, resume the run"
        self._here.break_up(message)
        self._report.incident_nowait(Incident(actor="learner", kind="rank_lost", message=message))
        for rank in self._ranks:
            rank.child.kill()

    async def _look(self) -> None:
        stuck_s = broken_s = 0.0
        while True:
            await anyio.sleep(_LOOK_S)
            if (broken := self._here.broken) is not None:
                if self._here.waiting_since_s is None:
                    raise RunError(broken)
                if (broken_s := broken_s + _LOOK_S) > self._grace_s:
                    self._end(broken)
                continue
            for each in self._ranks:
                each.silent_s += _LOOK_S
                if each.silent_s > self._silent_s:
                    self._break(each, f"not heard of for {self._silent_s:g} s")
            waits = self._here.waiting_since_s is not None and all(each.waits for each in self._ranks)
            stuck_s = stuck_s + _LOOK_S if waits else 0.0
            if stuck_s > self._silent_s:
                self._break(None, f"all of them have waited for each other for {self._silent_s:g} s")


def _write(files: WeightsFiles, state: LearnerState) -> dict[str, Any]:
    """What a rank begins with, each dict of arrays in a file."""
    is_fresh = float(state.optimizer_state["step"]) == 0.0
    return {
        "version": state.version,
        "weights": str(files.write(0, state.weights)),
        "optimizer_state": None if is_fresh else str(files.write(1, state.optimizer_state)),
        "reference": None if state.reference is None else str(files.write(2, state.reference)),
    }
