"""Environments and tools in processes that can be killed: for code that may hang, crash or eat a processor.

They are named, not sent: each process loads them by file or module. An episode stays in its process, which carries out
one order at a time; one that takes too long is ended by killing the process with its group. Other episodes in it find
it gone when they next ask, and are brought back elsewhere. Where there are environments and tools for all, the tools
have processes of their own, so that a tool that hangs costs no environment.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import anyio
import msgspec

from troupe.environments.convention import Content, EnvironmentSpec, World
from troupe.environments.live import Budget, Deed, Died, Gone, Late, Live, Raised, Runner, given
from troupe.environments.processes.naming import section_of
from troupe.environments.processes.wire import Broken, Do, Done, Leave, Load, Order, Take, Threw, decode_reply
from troupe.environments.settings import EnvironmentConfig
from troupe.errors import WorldError
from troupe.runtime.frames import FrameError, encode
from troupe.runtime.process import ChildProcess
from troupe.runtime.roles import together

_WORKER = "troupe.environments.processes.worker"
_ENVIRONMENT = {"PYTHONHASHSEED": "0"}
"""Sets of texts have one order, so that an answer does not depend on the process that gave it."""
_END_S = 5.0
"""That a process may take at the end to close its environments."""
_KILLED_BY = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
"""Signals that others send: a system without memory, an operator."""


class Worker:
    """One process with everything loaded."""

    def __init__(self, child: ChildProcess) -> None:
        self._child, self._turn = child, anyio.Lock()
        self._over = False
        self.episodes = 0
        """That have an instance in it."""
        self.waiting = 0
        """Orders that are being carried out or wait for it."""

    @classmethod
    async def start(cls, config: EnvironmentConfig) -> Worker:
        """Spawn it and wait until everything is loaded.

        Raises:
            WorldError: where it cannot be loaded, or not in time, or the process does not start or ends.
        """
        try:
            child = await ChildProcess.start(_WORKER, env=_ENVIRONMENT)
        except OSError as error:  # no memory, processes or files left: a machine's fault, which may pass
            raise WorldError(f"[environment]: a process could not be started: {error}") from error
        worker = cls(child)
        try:
            await worker.ask(Load(config), Budget(config.start_timeout_s))
        except Late:
            raise WorldError(
                f"[environment]: a process had not loaded it after {config.start_timeout_s:g} s; see what its files "
                "wait for, or raise environment.start_timeout_s"
            ) from None
        except (Died, Gone) as error:
            raise WorldError(f"[environment]: a process ended while it was loaded: {error}") from None
        except BaseException:
            await worker.kill()
            raise
        return worker

    @property
    def is_over(self) -> bool:
        """Whether nothing more can be asked of it."""
        return self._over or self._child.returncode is not None

    async def ask(self, order: Order, budget: Budget) -> bytes:
        """Have an order carried out, in its turn → what came of it. Raised, Late, Died or Gone where nothing does."""
        frame = _encoded(order)
        self.waiting += 1
        try:
            async with self._turn:
                reply = await self._answered(frame, budget)
        finally:
            self.waiting -= 1
        if isinstance(reply, Broken):
            await self.kill()
            raise WorldError(reply.message)
        if isinstance(reply, Threw):
            raise Raised(reply.text, reply.told, reply.passing)
        return reply.data

    async def _answered(self, frame: bytes, budget: Budget) -> Done | Threw | Broken:
        if self.is_over:
            raise Gone(self._child.how_it_ended())
        reply = None
        try:
            with budget, anyio.move_on_after(budget.left_s):
                reply = await self._reply(frame)
        finally:
            if reply is None:
                await self.kill()  # it is still busy, or dead
        if reply is None:
            raise Late(budget.seconds)
        return reply

    async def do(self, number: int | None, deed: Deed, budget: Budget) -> Any:
        """What comes of a deed. Raises as `ask`."""
        data = await self.ask(Do(number, deed), budget)
        try:
            return given(deed, data)
        except msgspec.MsgspecError as error:
            await self.kill()
            raise Died(f"its process did not answer as it should: {error}", True) from None

    async def _reply(self, frame: bytes) -> Done | Threw | Broken:
        try:
            await self._child.send(frame)
            return decode_reply(await self._child.receive())
        except (anyio.EndOfStream, anyio.BrokenResourceError) as error:
            code = self._child.returncode
            itself = code is not None and -code not in _KILLED_BY
            raise Died(str(error), itself) from None
        except FrameError as error:
            raise Died(f"its process did not answer as it should: {error}", True) from None

    async def kill(self) -> None:
        """Kill its process group and wait until it is gone."""
        self._over = True
        self._child.kill()
        await self._child.aclose(0.0)

    async def stop(self, grace_s: float) -> None:
        """Let it end, and kill it where it does not."""
        self._over = True
        await self._child.aclose(grace_s)


class Workers:
    """So many processes, each replaced when it is needed and gone."""

    def __init__(self, number: int, config: EnvironmentConfig) -> None:
        self._number, self._config = number, config
        self._all: list[Worker] = []
        self._starting = anyio.Lock()

    async def start(self) -> None:
        """Start all of them. WorldError where one cannot be started."""

        async def begin() -> None:
            self._all.append(await Worker.start(self._config))

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
                        self._all.append(await Worker.start(self._config))
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
            return await self.worker.do(self.number, deed, budget)
        except BaseException as error:
            self.is_lost = self.is_lost or not isinstance(error, Raised)
            raise


class ProcessRunner(Runner):
    """Environments and tools in `processes` workers, or where there are both, in so many for each."""

    def __init__(self, world: World, config: EnvironmentConfig) -> None:
        """WorldError where something cannot be loaded by name."""
        section = section_of(world, config)
        self._config = config
        self._environments = Workers(config.processes if world.factories else 0, section)
        self._tools = Workers(config.processes if world.tools else 0, section)
        self._numbers = itertools.count()
        self._calls = anyio.Semaphore(config.processes)

    async def start(self) -> None:
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


def _encoded(order: Order) -> bytes:
    try:
        return encode(order)
    except (TypeError, OverflowError, ValueError) as error:
        if isinstance(order, Do) and order.deed.what == "call":  # the policy's arguments
            raise Raised(f"the arguments cannot be sent to the tool: {error}", str(error)) from None
        raise WorldError(
            f'environment.run = "process" takes plain data only, but the columns of a row hold other things: {error}'
        ) from None
