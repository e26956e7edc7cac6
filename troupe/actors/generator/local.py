"""LocalProcesses: processes of the generator on this machine, which take parts from the crew one after another."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import anyio
import msgspec
from anyio.abc import TaskGroup, TaskStatus

from troupe.actors.generator.child import CHILD_FAULTS, MODULE, GeneratorChild, Listener
from troupe.actors.generator.crew import Crew
from troupe.actors.generator.parts import Part
from troupe.actors.generator.weights_files import WeightsFiles
from troupe.actors.generator.wire import Setup
from troupe.errors import RunError, TroupeError
from troupe.messages import Incident, MemberState, MemberStatus, Observation, RolloutGroup, Span, TurnTaken
from troupe.policy import Weights
from troupe.runtime.board import PolicyBoard
from troupe.runtime.device import DeviceThread
from troupe.runtime.reporter import Reporter
from troupe.runtime.roles import Restarts, decisive_fault

Start = Callable[[Setup, Listener], Awaitable[GeneratorChild]]
"""As `GeneratorChild.start`."""


class LocalProcesses:
    """One member a setup. A process that dies is followed by another, while the rest go on; its parts come to whoever
    is free. One that dies again and again with nothing done ends the run.

    Weights go by file. In the pinned schedule a process is told of the version of a part before it gets it; where
    another version is published meanwhile, of that, too. In the free one it is told of each version that is the newest,
    and gets prompts when it knows the newest of their time, so that it never completes them with an older one. A part
    of an evaluation comes with the file of its own version, for itself alone.
    """

    def __init__(
        self,
        setups: Sequence[Setup],
        *,
        board: PolicyBoard[Weights],
        files: WeightsFiles,
        device: DeviceThread,
        report: Reporter,
        envs: Sequence[Mapping[str, str]] = (),
        module: str = MODULE,
        hosts: Sequence[Start] = (),
        restarts: Restarts | None = None,
    ) -> None:
        """`device`: the thread that writes files. `envs`: what each process has in its environment besides, one a
        setup. `module`: what a process runs. `hosts`: who starts the first ones otherwise. `restarts`: of each process;
        those count between which nothing was done.
        """
        weights = _Weights(board, files, device, report)
        self._processes = [
            _Process(
                setup,
                hosts[number] if number < len(hosts) else partial(GeneratorChild.start, module=module, env=env),
                weights,
                report,
                restarts or Restarts(),
            )
            for number, (setup, env) in enumerate(zip(setups, envs or [{}] * len(setups), strict=True))
        ]

    async def run(self, crew: Crew) -> None:
        """Have all processes work until cancelled, or until they have ended well."""
        async with anyio.create_task_group() as tasks:
            for process in self._processes:
                tasks.start_soon(process.keep, crew)

    @property
    def needs(self) -> str:
        """Nothing: they come by themselves."""
        return ""

    @property
    def pids(self) -> list[int]:
        """Of the processes that are there."""
        return [process.pid for process in self._processes if process.pid is not None]

    def statuses(self) -> list[MemberStatus]:
        """One a process."""
        return [process.status() for process in self._processes]

    async def finish(self) -> None:
        """Wait until each process has told all and has ended."""
        async with anyio.create_task_group() as tasks:
            for process in self._processes:
                tasks.start_soon(process.finish)


class _Weights:
    """Files of weights, for processes that ask for them."""

    def __init__(
        self, board: PolicyBoard[Weights], files: WeightsFiles, device: DeviceThread, report: Reporter
    ) -> None:
        self.board = board
        self._files, self._device, self._report = files, device, report

    async def give(self, child: GeneratorChild, version: int) -> None:
        """Have a child read a version that the board has, and wait until it has."""
        if child.has(version):
            return await child.loaded(version)
        if child.holds_from is not None and version >= child.holds_from:
            await self.board.get(version)
            return await child.load(version, None)
        self._files.lend(version)
        try:
            path = await self._write(version, await self.board.get(version))
            await child.load(version, path)
        finally:
            self._files.give_back(version)

    async def give_rows(
        self, child: GeneratorChild, part: Part, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        """Have a child decode a part of an evaluation; back when that is done, and started when the child has it."""
        assert part.version is not None
        self._files.lend(part.version)
        try:
            await child.evaluate(part, await self._write(part.version, await self.board.get(part.version)))
            task_status.started()
            await child.until_done(part.name)
        finally:
            self._files.give_back(part.version)

    async def _write(self, version: int, weights: Weights) -> Path:
        self._files.keep(self.board.kept)
        with self._report.span("write weights"):
            return await self._device.run(self._files.write, version, weights)


class _Process:
    """One member: a process after another, all of one name. It hears what its child tells."""

    def __init__(
        self,
        setup: Setup,
        start: Start,
        weights: _Weights,
        report: Reporter,
        restarts: Restarts,
    ) -> None:
        self.name = setup.name
        self._setup, self._start, self._weights = setup, start, weights
        self._report, self._restarts = report, restarts
        self._most = _most_parts(setup)
        self._crew: Crew
        self._child: GeneratorChild | None = None
        self._state: MemberState = "starting"
        self._detail = ""
        self._deaths: list[float] = []  # since something was done last
        self._finishing = False
        self._alone = anyio.CancelScope()  # while there is no process
        self._over = anyio.Event()

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.pid

    def status(self) -> MemberStatus:
        """What it is at."""
        child = self._child
        if child is None:
            return MemberStatus(name=self.name, kind="process", state=self._state, detail=self._detail)
        return MemberStatus(
            name=self.name,
            kind="process",
            state="working" if child.parts else "idle",
            leases=tuple(child.parts),
            tokens_per_second=child.pace.per_second,
            version=child.newest if child.newest >= 0 else None,
        )

    async def keep(self, crew: Crew) -> None:
        """Work for the crew, with one process after another, until told to finish."""
        self._crew = crew
        while not self._finishing:
            try:
                await self._work()
            except Exception as error:
                fault = decisive_fault(error)
                if isinstance(fault, TroupeError) or not isinstance(fault, CHILD_FAULTS):
                    raise
                await self._wait(fault)
                del fault
        self._state = "ended"
        self._over.set()

    async def finish(self) -> None:
        """Wait until it has told all and has ended."""
        self._finishing = True
        self._alone.cancel()
        if self._child is not None:
            with suppress(*CHILD_FAULTS):
                await self._child.finish()
        await self._over.wait()

    async def observe(self, observation: Observation) -> None:
        if self._child is not None:
            with suppress(*CHILD_FAULTS):  # whoever gets the part will ask again
                await self._child.observe(observation)

    async def on_group(self, group: RolloutGroup) -> None:
        if await self._crew.completed(self, group) == "taken":
            self._deaths.clear()

    async def on_turn(self, taken: TurnTaken) -> None:
        await self._crew.turn_taken(self, taken)

    async def on_incident(self, incident: Incident) -> None:
        await self._report.incident(incident)

    def on_span(self, span: Span) -> None:
        actor = self._report.actor  # whoever does its work
        self._report.forward(msgspec.structs.replace(span, actor=actor, member="" if self.name == actor else self.name))

    def on_made(self, tokens: int) -> None:
        self._crew.progress(self, tokens)

    async def _work(self) -> None:
        """With one process, to its end. One that has told all ends well."""
        with anyio.CancelScope() as self._alone, self._report.span("start process"):
            child = await self._start(self._setup, self)
        if self._alone.cancelled_caught:
            return
        self._child = child
        try:
            async with anyio.create_task_group() as tasks:
                if self._setup.most_at_once is not None or self._weights.board.max_staleness:
                    tasks.start_soon(self._follow, child)
                tasks.start_soon(self._pull, child, tasks)
                await child.run()
                tasks.cancel_scope.cancel()
        finally:
            self._child = None
            with anyio.CancelScope(shield=True):
                await child.aclose()
            self._report.forget(child.pid)

    async def _pull(self, child: GeneratorChild, tasks: TaskGroup) -> None:
        while True:
            await child.room(self._most)
            taken = await self._crew.take(self, most=self._most - len(child.parts))
            for part in taken:
                if part.set is not None:
                    await tasks.start(self._weights.give_rows, child, part)
            parts = [part for part in taken if part.set is None]
            for version in sorted({part.version for part in parts if part.version is not None}):
                with self._report.span("wait for policy", kind="wait"):
                    await self._weights.give(child, version)
            if parts and self._setup.most_at_once is not None:
                with self._report.span("wait for policy", kind="wait"):
                    await child.loaded(self._weights.board.version)
            await child.decode(*parts)

    async def _follow(self, child: GeneratorChild) -> None:
        """Have it read each new version, the newest where several came at once."""
        version = -1
        while True:
            version, _ = await self._weights.board.newer_than(version)
            if self._finishing:
                return
            await self._weights.give(child, version)

    async def _wait(self, fault: Exception) -> None:
        """A process has failed: let go of its parts, and wait before the next one. RunError where there is none."""
        if self._finishing:
            return
        self._crew.lost(self, f"{type(fault).__name__}: {fault}")
        restarts = self._restarts
        now_s = restarts.clock()
        self._deaths.append(now_s)
        recent = sum(now_s - at_s <= restarts.window_s for at_s in self._deaths)
        what = f"{self.name} failed: {type(fault).__name__}: {fault}"
        if recent > restarts.limit or len(self._deaths) >= restarts.in_vain:
            raise RunError(
                f"{what}; it was restarted {len(self._deaths) - 1} times before with nothing done in between, which is "
                "the limit; mend the cause, then go on with --resume"
            ) from fault
        pause_s = restarts.pause_s(recent)
        message = f"{what}; a new process takes over in {pause_s:.2g} s; what it had in hand goes to whoever is free"
        await self._report.incident(Incident(actor=self._report.actor, kind="process_restarted", message=message))
        self._state, self._detail = "waiting", what
        with anyio.CancelScope() as self._alone:
            await restarts.sleep(pause_s)
        self._state, self._detail = "starting", ""


def _most_parts(setup: Setup) -> int:
    """That a process has in hand."""
    if setup.acts is not None:
        return setup.live if setup.acts.most_at_once is not None else setup.acts.sessions
    return setup.most_at_once or 1
