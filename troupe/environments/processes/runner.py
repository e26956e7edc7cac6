"""Environments and tools in processes that can be killed: for code that may hang, crash or eat a processor.

They are named, not sent: each process loads them by file or module. An episode stays in its process, which carries out
one order at a time; one that takes too long is ended by killing the process with its group. Other episodes in it find
it gone when they next ask, and are brought back elsewhere. Where there are environments and tools for all, the tools
have processes of their own, so that a tool that hangs costs no environment.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import anyio

from troupe.environments.convention import Content, EnvironmentSpec, World
from troupe.environments.live import Budget, Deed, Died, Gone, Late, Live, Raised, Runner
from troupe.environments.processes.asking import Worker
from troupe.environments.processes.distant import DistantWorker
from troupe.environments.processes.naming import section_of
from troupe.environments.processes.wire import Leave, Take
from troupe.environments.settings import EnvironmentConfig
from troupe.errors import WorldError
from troupe.runtime.elsewhere import Elsewhere
from troupe.runtime.roles import together

_END_S = 5.0
"""That a process may take at the end to close its environments."""


class Workers:
    """So many processes, each replaced when it is needed and gone."""

    def __init__(self, number: int, start: Callable[[], Awaitable[Worker]]) -> None:
        """`start` begins one. WorldError where it cannot."""
        self._number, self._start = number, start
        self._all: list[Worker] = []
        self._starting = anyio.Lock()

    async def start(self) -> None:
        """Start all of them. WorldError where one cannot be started."""

        async def begin() -> None:
            self._all.append(await self._start())

        await together([begin] * self._number)

    async def stop(self, grace_s: float) -> None:
        """End all of them."""
        ending, self._all = self._all, []
        await together([partial(worker.stop, grace_s) for worker in ending])

    async def pick(self) -> Worker:
        """The one with the fewest episodes and the least to do. Gone where none is there and none can be started."""
        while len(await self._there()) < self._number:
            async with self._starting:
                if len(await self._there()) < self._number:
                    try:
                        self._all.append(await self._start())
                    except WorldError as error:  # it was loaded before, so this may pass
                        raise Gone(str(error)) from None
        return min(self._all, key=lambda worker: (worker.episodes, worker.waiting))

    async def _there(self) -> list[Worker]:
        """Those that are not over; of the others nothing is left afterwards."""
        while over := [worker for worker in self._all if worker.is_over]:
            self._all = [worker for worker in self._all if worker not in over]
            for worker in over:
                await worker.kill()
        return self._all


class ProcessLive(Live):
    """An instance in a process, by number."""

    def __init__(self, spec: EnvironmentSpec, worker: Worker, number: int) -> None:
        super().__init__(spec)
        self.worker, self.number = worker, number
        worker.episodes += 1

    async def do(self, deed: Deed, budget: Budget) -> Any:
        try:
            return await self.worker.do(self.number, deed, budget, self.spec.label)
        except BaseException as error:
            self.is_lost = self.is_lost or not isinstance(error, Raised)
            raise


class ProcessRunner(Runner):
    """Environments and tools in `processes` workers, or where there are both, in so many for each. On other machines
    they are begun when they are first needed."""

    def __init__(
        self,
        world: World,
        config: EnvironmentConfig,
        elsewhere: Elsewhere | None = None,
        machines_changed: Callable[[str | None], None] = lambda why: None,
    ) -> None:
        """`elsewhere`: where the workers are, unless they are on this machine; `machines_changed` is called with why
        none is to be had, and with None when one is.

        Raises:
            WorldError: where something cannot be loaded by name.
        """
        section = section_of(world, config)
        self._config, self._elsewhere, self._machines_changed = config, elsewhere, machines_changed
        start: Callable[[], Awaitable[Worker]] = partial(Worker.start, section)
        if elsewhere is not None:
            start = partial(DistantWorker.open, elsewhere, section, self._waits)
        self._environments = Workers(config.processes if world.factories else 0, start)
        self._tools = Workers(config.processes if world.tools else 0, start)
        self._numbers = itertools.count()
        self._calls = anyio.Semaphore(config.processes)

    def _waits(self, why: str | None) -> None:
        was_awaited, self.awaited = self.awaited is not None, why
        if was_awaited != (why is not None):
            self._machines_changed(why)

    async def start(self) -> None:
        if self._elsewhere is None:  # elsewhere nobody need be there yet
            await together([self._environments.start, self._tools.start])

    async def stop(self) -> list[str]:
        grace_s = min(_END_S, self._config.turn_timeout_s)
        await together([partial(each.stop, grace_s) for each in (self._environments, self._tools)])
        return []

    async def take(self, spec: EnvironmentSpec, *, new: bool = False) -> Live:
        worker = await self._environments.pick()
        live = ProcessLive(spec, worker, next(self._numbers))
        try:
            await worker.ask(Take(live.number, spec.name, new), Budget(self._config.start_timeout_s))
        except BaseException:
            worker.episodes -= 1
            raise
        return live

    async def give_back(self, live: Live) -> None:
        await self._leave(live, again=not live.is_lost)

    async def throw_away(self, live: Live) -> None:
        await self._leave(live, again=False)

    async def _leave(self, live: Live, *, again: bool) -> None:
        assert isinstance(live, ProcessLive)
        was_lost, live.is_lost = live.is_lost, True
        live.worker.episodes -= 1
        if was_lost:
            return
        with suppress(Raised, Late, Died, Gone):
            await live.worker.ask(Leave(live.number, again), Budget(self._config.turn_timeout_s))

    async def call(self, name: str, arguments: Mapping[str, Any], budget: Budget) -> Content:
        deed = Deed(what="call", name=name, arguments=dict(arguments), is_method=False)
        async with self._calls:  # so that one of them has nothing to do
            worker = await self._tools.pick()
            return await worker.do(None, deed, budget)  # type: ignore[no-any-return]
