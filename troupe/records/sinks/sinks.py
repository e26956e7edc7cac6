"""The sinks of a run: opened once, written to, settled, and switched off where they fail; the others go on.

`Sinks` outlives the actor that feeds it: a successor goes on with the same open sinks.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import anyio

from troupe.messages import Incident
from troupe.records.sinks.base import DurableSink, Sink
from troupe.records.sinks.thread import LIMITS, SinkLimits, SinkThread, Write

_AT_ONCE_S = 0.2
"""An ordinary disk has everything written by then: the event loop need not turn to something else meanwhile."""


class Sinks:
    """All sinks of a run. Opened once, closed at its end; in between messages go to those that take them.

    `timeout_s`: for one call of a sink, and for all that is left at the end.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        *,
        timeout_s: float = 30.0,
        clock: Callable[[], float] = time.perf_counter,
        limits: SinkLimits = LIMITS,
        before_opening: Callable[[], None] = lambda: None,
        thread: Callable[..., SinkThread] = SinkThread,
    ) -> None:
        """`before_opening` is called in each sink's thread before it is opened; where it raises, the sink is switched
        off. `thread`: makes that thread."""
        self.switched_off: dict[str, str] = {}
        """Sink → why."""
        self._sinks = tuple(sinks)
        self._before_opening = before_opening
        self._make_thread = thread
        self._timeout_s, self._clock, self._limits = timeout_s, clock, limits
        self._threads: list[SinkThread] = []
        self._opened = False
        self._lacking: dict[str, int] = {}
        self._dropped = 0
        self._writes: deque[Write] = deque(maxlen=1024)
        self._listeners: list[Callable[[], object]] = []

    def open(self) -> None:
        """Begin to open the sinks; where that was done before, nothing happens."""
        if not self._opened:
            self._opened = True
            self._threads = [
                self._make_thread(
                    sink,
                    lane,
                    self._writes.append,
                    self._clock,
                    self._limits,
                    self._tell_listeners,
                    self._before_opening,
                )
                for lane, sink in enumerate(self._sinks)
            ]

    def write(self, message: object) -> None:
        """Give a message to the sinks that take it; never waits."""
        for thread in self._threads:
            if isinstance(message, thread.takes):
                thread.put(message)

    def do_take(self, kind: type) -> bool:
        """Whether any of them takes messages of a type."""
        return any(issubclass(kind, sink.takes) for sink in self._sinks)

    def settle(self, version: int) -> None:
        """Ask the durable sinks to have on the disk what they were given so far; never waits."""
        for thread in self._threads:
            thread.settle(version)

    async def settled(self, version: int) -> bool:
        """Wait until every durable sink has settled `version`, which somebody has it asked for meanwhile.

        A sink that is switched off, or cannot write at the moment, holds up nobody. False where another one has not
        come to it within `timeout_s`.
        """
        return await self._until(lambda: self._has_settled(version))

    async def written(self) -> bool:
        """Wait until every durable sink has what it was given so far where a crash of this process leaves it; otherwise
        as `settled`."""
        given = {thread: thread.given for thread in self._threads if thread.durable}

        def have_written() -> bool:
            return all(thread.written >= count or self._is_away(thread) for thread, count in given.items())

        return await self._until(have_written)

    async def _until(self, holds: Callable[[], bool]) -> bool:
        loop = asyncio.get_running_loop()
        with anyio.move_on_after(self._timeout_s):
            while not holds():
                change = asyncio.Event()
                listener = partial(loop.call_soon_threadsafe, change.set)
                self._listeners.append(listener)
                try:
                    if not holds():
                        await change.wait()
                finally:
                    self._listeners.remove(listener)
            return True
        return holds()

    def lacking(self) -> dict[str, int]:
        """Durable sink → how many of the steps before the newest its file lacks, also after the end; none of one that
        was switched off."""
        if self._threads:
            counts = {thread.name: thread.lacking for thread in self._threads}
            self._lacking = {name: count for name, count in counts.items() if count is not None}
        return dict(self._lacking)

    def news(self) -> list[Incident]:
        """What has become of sinks since the last call; those that have failed or hang are switched off."""
        incidents = []
        for thread in tuple(self._threads):
            incidents += [thread.notes.popleft() for _ in range(len(thread.notes))]
            if (fault := thread.fault(self._timeout_s)) is not None:
                incidents.append(self._switch_off(thread, fault))
        return incidents

    def writes(self) -> list[Write]:
        """What was written since the last call."""
        return [self._writes.popleft() for _ in range(len(self._writes))]

    @property
    def dropped(self) -> int:
        """Spans that were kept from sinks because too much waited there."""
        return self._dropped + sum(thread.dropped for thread in self._threads)

    async def close(self) -> tuple[Incident, ...]:
        """Have everything written and the sinks closed; those that take too long are given up. Safe to call twice."""
        for thread in self._threads:
            thread.finish()
        for thread in self._threads:
            with suppress(TimeoutError):
                thread.ended.result(_AT_ONCE_S)
        if left := [asyncio.wrap_future(thread.ended) for thread in self._threads if not thread.ended.done()]:
            await asyncio.wait(left, timeout=self._timeout_s)
        incidents = self.news()
        for thread in tuple(self._threads):
            if not thread.ended.done():
                late = f"{thread.waiting} messages were not written within {self._timeout_s:g} s of the run's end"
                why = "" if thread.trouble is None else f"{thread.trouble}; "
                incidents.append(self._switch_off(thread, f"{why}{late} (metrics.sink_timeout_s)"))
        self.lacking()
        self._threads, self._opened = [], True
        self._tell_listeners()
        return tuple(incidents)

    def _has_settled(self, version: int) -> bool:
        if not self._opened:
            return not any(isinstance(sink, DurableSink) for sink in self._sinks)
        return all(thread.settled >= version or self._is_away(thread) for thread in self._threads if thread.durable)

    def _is_away(self, thread: SinkThread) -> bool:
        """Whether it holds up nobody."""
        return thread not in self._threads or thread.trouble is not None or thread.fault(self._timeout_s) is not None

    def _tell_listeners(self) -> None:
        for listener in tuple(self._listeners):
            with suppress(RuntimeError):  # the loop is closed, and who listened is gone
                listener()

    def _switch_off(self, thread: SinkThread, why: str) -> Incident:
        self._threads.remove(thread)
        self._tell_listeners()
        self._dropped += thread.dropped
        thread.finish(abandon=True)
        self.switched_off[thread.name] = why
        return Incident(actor="metrics", kind="sink_failed", message=f"the sink {thread.name} is switched off: {why}")
