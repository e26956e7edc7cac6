"""Environments and tools in this process: async functions in tasks that can be left behind, others in daemon threads,
or, with `run = "loop"`, in place.

An environment's methods that are not async all run on one thread, its own. One that takes too long keeps that thread:
it is left behind with its instance.
"""

from __future__ import annotations

import inspect
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import anyio

from troupe.environments.convention import Content, EnvironmentSpec, World
from troupe.environments.live import Budget, Deed, Late, Live, Raised, Runner, awaited, given, is_async, read
from troupe.environments.settings import EnvironmentConfig
from troupe.rewards.faults import is_own_failure
from troupe.rewards.watching import Watch, begins, ends, tasks_of
from troupe.runtime.guarding import under_way
from troupe.runtime.isolation import THREADS, DaemonThreads, InPlace, end_tasks, in_own_task


class Hands:
    """Makes calls of code that nobody trusts."""

    def __init__(self, *, in_place: bool) -> None:
        """`in_place`: whether functions that are not async run in the event loop."""
        self._in_place = in_place
        self.watch = Watch()
        self.watch.remedy = '; it needs environment.run = "process"'

    async def make(
        self,
        label: str,
        call: Callable[[], Any],
        reading: Callable[[Any], Any],
        budget: Budget,
        threads: DaemonThreads = THREADS,
    ) -> Any:
        """What `reading` makes of what the call gives, on the thread of the call. Raised or Late."""
        with budget, anyio.move_on_after(budget.left_s) as scope:
            try:
                with self.watch.watching():
                    return await self._made(label, call, reading, threads)
            except BaseException as error:
                if not is_own_failure(error):
                    raise
                if not scope.cancel_called:
                    raise Raised.by(error) from error
        raise Late(budget.seconds)

    async def _made(
        self, label: str, call: Callable[[], Any], reading: Callable[[Any], Any], threads: DaemonThreads
    ) -> Any:
        code = getattr(getattr(call, "func", call), "__code__", None)
        result: Any = None
        if is_async(call):
            waiting = call
        elif self._in_place:
            with InPlace(), under_way(label, code):
                result = call()
                if not inspect.isawaitable(result):
                    return reading(result)
            waiting = partial(awaited, result)
        else:

            def read_there(result: Any) -> tuple[bool, Any]:
                return (True, result) if inspect.isawaitable(result) else (False, reading(result))

            has_begun, result = await threads.run(call, read_there, under_way(label, code))
            if not has_begun:
                return result
            waiting = partial(awaited, result)
        with under_way(label, code, in_turns=True):
            return reading(await in_own_task(waiting))


class LocalLive(Live):
    """An instance in this process, and the thread that its methods run on."""

    def __init__(self, spec: EnvironmentSpec, hands: Hands) -> None:
        super().__init__(spec)
        self._hands = hands
        self._threads = DaemonThreads(idle_s=threading.TIMEOUT_MAX)
        self._instance: Any = None

    @property
    def instance(self) -> Any:
        return self._instance

    async def begin(self, factory: Callable[[], Any], limit_s: float) -> None:
        """Make the instance."""
        self._instance = await self._hands.make(
            self.spec.label, factory, lambda made: made, Budget(limit_s), self._threads
        )

    def adopt(self, instance: Any) -> None:
        """Take one that is there."""
        self._instance = instance

    async def do(self, deed: Deed, budget: Budget) -> Any:
        try:
            call = deed.called(self._instance)
        except Exception as error:  # a property of the user's
            raise Raised.by(error) from error
        try:
            data = await self._hands.make(
                self.spec.label, call, partial(read, deed, self.spec.label), budget, self._threads
            )
        except BaseException as error:
            self.is_lost = self.is_lost or not isinstance(error, Raised)
            raise
        return given(deed, data)

    def end(self) -> None:
        """Let its thread end, unless something holds it."""
        self._threads.end_idle()


class LocalRunner(Runner):
    """Environments and tools in this process."""

    def __init__(self, world: World, config: EnvironmentConfig) -> None:
        self._world, self._config = world, config
        self._hands = Hands(in_place=config.run == "loop")
        self._idle: dict[str, list[LocalLive]] = defaultdict(list)
        self._probes = dict(world.probes) if config.run == "loop" else {}

    @property
    def needs_process(self) -> str | None:
        return self._hands.watch.found

    async def start(self) -> None:
        """From here on forks are refused: something may be computed beside the calls."""
        self._hands.watch.refuses_forks = True
        begins(self)

    async def stop(self) -> list[str]:
        """Close what is idle, and end the tasks that code has begun and not ended."""
        for lives in self._idle.values():
            while lives:
                await self.throw_away(lives.pop())
        left = await end_tasks(tasks_of(self._hands.watch))
        THREADS.end_idle()
        self._hands.watch.refuses_forks = False
        ends(self)
        return [f"left a task behind that ignores its cancellation: {what}" for what in left]

    async def take(self, spec: EnvironmentSpec, *, new: bool = False) -> LocalLive:
        if self._idle[spec.name] and not new:
            return self._idle[spec.name].pop()
        live = LocalLive(spec, self._hands)
        if spec.name in self._probes:
            live.adopt(self._probes.pop(spec.name))
        else:
            await live.begin(self._world.factories[spec.name], self._config.start_timeout_s)
        return live

    async def give_back(self, live: Live) -> None:
        assert isinstance(live, LocalLive)
        if live.is_lost or not getattr(live.instance, "reuse", True):
            await self.throw_away(live)
        else:
            self._idle[live.spec.name].append(live)

    async def throw_away(self, live: Live) -> None:
        assert isinstance(live, LocalLive)
        try:
            if live.spec.has_close and not live.is_lost:
                with suppress(Raised, Late):
                    await live.do(Deed(what="close"), Budget(self._config.turn_timeout_s))
        finally:
            live.is_lost = True
            live.end()

    async def call(self, name: str, arguments: Mapping[str, Any], budget: Budget) -> Content:
        function = self._world.function(name)
        assert function is not None, name
        deed = Deed(what="call", name=name, arguments=dict(arguments), is_method=False)
        data = await self._hands.make(name, deed.called(function), partial(read, deed, name), budget)
        return given(deed, data)  # type: ignore[no-any-return]


async def close_probes(world: World, config: EnvironmentConfig) -> None:
    """Close what was made to look at, where it is not to be used: its thread is not the one that it would be used on,
    or its process."""
    hands = Hands(in_place=False)
    for name, instance in world.probes.items():
        if world.environments[name].has_close:
            with suppress(Raised, Late):
                await hands.make(name, instance.close, lambda closed: closed, Budget(config.turn_timeout_s))
