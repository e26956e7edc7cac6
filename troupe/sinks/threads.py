"""Sinks at work, each in a thread of its own, so that a slow disk or a hanging one holds up nobody.

A sink that fails three times in a row on the same type of message, or that does not come back from a call in time, is
switched off; the others go on. `Sinks` outlives the actor that feeds it: a successor goes on with the same open sinks.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import NamedTuple

from troupe.messages import GroupClosed, Incident, Span
from troupe.sinks.base import Sink

_MAX_FAILURES = 3
_MOST_WAITING = 8192
"""Messages before a sink that is behind is given no more spans. Others are few, and never left out."""
_GATHER_S = 0.1
"""For how long spans are collected before a sink that waits is woken for them."""
_AT_ONCE_S = 0.2
"""An ordinary disk has everything written by then: the event loop need not turn to something else meanwhile."""


class Write(NamedTuple):
    """A sink has written what there was."""

    sink: str
    lane: int
    """The sink's place among all."""
    start_s: float
    end_s: float


class SinkThread:
    """One sink and its thread. `put`, `fault` and `finish` are called from the event loop's thread and never wait."""

    def __init__(
        self, sink: Sink, lane: int, told: Callable[[Write], None], clock: Callable[[], float], gather_s: float
    ) -> None:
        self.name, self.takes = sink.name, sink.takes
        self.ended: Future[None] = Future()
        self.dropped = 0
        self._sink, self._lane, self._told, self._clock, self._gather_s = sink, lane, told, clock, gather_s
        self._change = threading.Condition()
        self._waiting: deque[object] = deque()
        self._urgent = self._finishing = self._abandoned = False
        self._busy_since_s: float | None = None
        self._failures: Counter[type | str] = Counter()
        self._fault: str | None = None
        self._start()

    def put(self, message: object) -> None:
        """Have a message written. A span is left out, and counted, when too much waits."""
        with self._change:
            if isinstance(message, Span) and len(self._waiting) >= _MOST_WAITING:
                self.dropped += 1
                return
            self._waiting.append(message)
            if not isinstance(message, Span | GroupClosed):
                self._urgent = True
                self._change.notify()
            elif len(self._waiting) == 1:
                self._change.notify()

    def fault(self, timeout_s: float) -> str | None:
        """Why the sink is to be switched off, if it is."""
        since_s = self._busy_since_s
        if self._fault is None and since_s is not None and (busy_s := self._clock() - since_s) > timeout_s:
            return f"it has not come back for {busy_s:.3g} s (metrics.sink_timeout_s is {timeout_s:g})"
        return self._fault

    @property
    def waiting(self) -> int:
        """Messages not yet begun with."""
        return len(self._waiting)

    def finish(self, *, abandon: bool = False) -> None:
        """Let the thread end when everything is written, or when the call in hand is over."""
        with self._change:
            self._finishing, self._abandoned = True, self._abandoned or abandon
            self._change.notify()

    def _start(self) -> None:
        threading.Thread(target=self._run, name=f"troupe-sink-{self.name}", daemon=True).start()

    def _run(self) -> None:
        try:
            self._open()
            while self._fault is None and (batch := self._next_batch()):
                self._write(batch)
        finally:
            self._close()

    def _open(self) -> None:
        self._call(self._sink.open, "open", limit=1)

    def _close(self) -> None:
        if self._fault is None:
            self._call(self._sink.close, "close", limit=1)
        else:
            with suppress(Exception):
                self._sink.close()
        self.ended.set_result(None)

    def _next_batch(self) -> Sequence[object] | None:
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._finishing)
            self._change.wait_for(lambda: self._urgent or self._finishing, self._gather_s)
            batch, self._waiting, self._urgent = self._waiting, deque(), False
            return None if self._abandoned else batch

    def _write(self, batch: Sequence[object]) -> None:
        start_s = self._clock()
        own = True
        for message in batch:
            own = own and isinstance(message, Span) and message.actor == "metrics"
            self._call(lambda: self._sink.write(message), type(message))  # noqa: B023 - called at once
            if self._fault is not None or self._abandoned:
                return
        self._call(self._sink.flush, "flush")
        if not own:  # otherwise telling of a write would make one more, for ever
            self._told(Write(self.name, self._lane, start_s, self._clock()))

    def _call(self, function: Callable[[], None], kind: type | str, limit: int = _MAX_FAILURES) -> None:
        """Do it, within the time that `fault` watches."""
        self._busy_since_s = self._clock()
        try:
            function()
        except Exception as error:
            self._failures[kind] += 1
            if self._failures[kind] >= limit:
                self._fault = f"{type(error).__name__}: {error}"
        else:
            self._failures[kind] = 0  # of this type only: a sink may leave most alone, which tells nothing
        finally:
            self._busy_since_s = None


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
        gather_s: float = _GATHER_S,
    ) -> None:
        self.switched_off: dict[str, str] = {}
        """Sink → why."""
        self._sinks = tuple(sinks)
        self._timeout_s, self._clock, self._gather_s = timeout_s, clock, gather_s
        self._threads: list[SinkThread] = []
        self._opened = False
        self._dropped = 0
        self._writes: deque[Write] = deque(maxlen=1024)

    def open(self) -> None:
        """Begin to open the sinks; where that was done before, nothing happens."""
        if not self._opened:
            self._opened = True
            self._threads = [
                SinkThread(sink, lane, self._writes.append, self._clock, self._gather_s)
                for lane, sink in enumerate(self._sinks)
            ]

    def write(self, message: object) -> None:
        """Give a message to the sinks that take it; never waits."""
        for thread in self._threads:
            if isinstance(message, thread.takes):
                thread.put(message)

    def failed(self) -> list[Incident]:
        """Switch off the sinks that have failed or hang since the last call, and tell of each."""
        faults = [(thread, fault) for thread in self._threads if (fault := thread.fault(self._timeout_s)) is not None]
        return [self._switch_off(thread, fault) for thread, fault in faults]

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
        incidents = self.failed()
        for thread in tuple(self._threads):
            if not thread.ended.done():
                late = f"{thread.waiting} messages were not written within {self._timeout_s:g} s of the run's end"
                incidents.append(self._switch_off(thread, f"{late} (metrics.sink_timeout_s)"))
        self._threads, self._opened = [], True
        return tuple(incidents)

    def _switch_off(self, thread: SinkThread, why: str) -> Incident:
        self._threads.remove(thread)
        self._dropped += thread.dropped
        thread.finish(abandon=True)
        self.switched_off[thread.name] = why
        return Incident(actor="metrics", kind="sink_failed", message=f"the sink {thread.name} is switched off: {why}")
