"""One sink at work in a thread of its own, so that a slow disk or a hanging one holds up nobody.

A sink that fails three times in a row on the same type of message, or that does not come back from a call in time, has
a fault. A durable sink whose disk fails has not: it is tried again, with growing pauses, until too much waits.
"""

import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import NamedTuple

from troupe.errors import FolderGoneError
from troupe.messages import GroupClosed, Incident, Span
from troupe.records.sinks.base import DurableSink, Sink
from troupe.runtime.backoff import backoff_s

_MAX_FAILURES = 3


class SinkLimits(NamedTuple):
    """How long a sink is waited for, and how much for it."""

    gather_s: float = 0.1
    """For how long spans are collected before a sink that waits is woken for them."""
    most_waiting: int = 8192
    """Messages before a sink that is behind is given no more spans. Others are few, and never left out; but a durable
    sink whose disk still fails by then is switched off."""
    first_pause_s: float = 0.1
    """Between the attempts of a durable sink; each pause is twice as long as the one before."""
    longest_pause_s: float = 5.0


LIMITS = SinkLimits()


class Write(NamedTuple):
    """A sink has written what there was."""

    sink: str
    lane: int
    """The sink's place among all."""
    start_s: float
    end_s: float


class _Mark(NamedTuple):
    """All that has to be settled for a version lies before this."""

    version: int


class SinkThread:
    """One sink and its thread. `put`, `fault` and `finish` are called from the event loop's thread and never wait."""

    def __init__(
        self,
        sink: Sink,
        lane: int,
        tell: Callable[[Write], None],
        clock: Callable[[], float],
        limits: SinkLimits = LIMITS,
        changed: Callable[[], None] = lambda: None,
        before_opening: Callable[[], None] = lambda: None,
    ) -> None:
        """`changed` is called, in the sink's thread, when `settled`, `written` or `trouble` may have changed.
        `before_opening` is called there, too; where it raises, the sink is not opened."""
        self.name, self.takes = sink.name, sink.takes
        self._durable = sink if isinstance(sink, DurableSink) else None
        self.ended: Future[None] = Future()
        self.dropped = 0
        self.notes: deque[Incident] = deque()
        """What is to be told of the sink."""
        self.settled = -math.inf
        """The version up to which everything is on the disk."""
        self.given = self.written = 0
        """Messages that were put, and those of them that are where a crash of the process leaves them."""
        self.trouble: str | None = None
        """Why a durable sink cannot write at the moment."""
        self._sink, self._lane, self._tell, self._clock, self._limits = sink, lane, tell, clock, limits
        self._changed = changed
        self._before_opening = before_opening
        self._change = threading.Condition()
        self._waiting: deque[object] = deque()
        self._begun = 0  # messages taken out of `_waiting`
        self._unflushed = self._attempts = 0
        self._asked = -math.inf  # the version up to which it was asked to settle
        self._urgent = self._finishing = self._abandoned = False
        self._busy_since_s: float | None = None
        self._failures: Counter[type | str] = Counter()
        self._fault: str | None = None
        self._start()

    def put(self, message: object) -> None:
        """Have a message written. A span is left out, and counted, when too much waits."""
        with self._change:
            if isinstance(message, Span) and len(self._waiting) >= self._limits.most_waiting:
                self.dropped += 1
                return
            self._waiting.append(message)
            self.given += 1
            if not isinstance(message, Span | GroupClosed):
                self._urgent = True
                self._change.notify()
            elif len(self._waiting) == 1:
                self._change.notify()

    @property
    def durable(self) -> bool:
        """Whether it waits for a disk that fails, and can settle."""
        return self._durable is not None

    def settle(self, version: int) -> None:
        """Have everything settled that was put before."""
        if self.durable:
            self.put(_Mark(version))

    def fault(self, timeout_s: float) -> str | None:
        """Why the sink is to be switched off, if it is."""
        since_s, trouble = self._busy_since_s, self.trouble
        if self._fault is None and since_s is not None and (busy_s := self._clock() - since_s) > timeout_s:
            return f"it has not come back for {busy_s:.3g} s (metrics.sink_timeout_s is {timeout_s:g})"
        if self._fault is None and trouble is not None and self.waiting > self._limits.most_waiting:
            return f"{trouble}; {self.waiting} messages wait, more than the {self._limits.most_waiting} that may"
        return self._fault

    @property
    def lacking(self) -> int | None:
        """How many of the steps before the newest a durable sink's file lacks; None where it does not count them."""
        return getattr(self._durable, "lacking", None)

    @property
    def waiting(self) -> int:
        """Messages not yet begun with, or not yet where they are safe from a crash."""
        return len(self._waiting) + self._unflushed

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
            while self._fault is None and (batch := self._next_batch()) is not None:
                self._write(batch)
        finally:
            self._close()

    def _open(self) -> None:
        if self._call(self._before_opening, "before opening", limit=1):
            self._call(self._sink.open, "open", limit=1)

    def _close(self) -> None:
        if self._fault is None:
            self._call(self._sink.close, "close", limit=1)
        else:
            with suppress(BaseException):
                self._sink.close()
        self.ended.set_result(None)
        self._changed()

    def _next_batch(self) -> Sequence[object] | None:
        """What has come, when it is time to write; None when that was all."""
        with self._change:
            if self.trouble is None:
                self._change.wait_for(lambda: self._waiting or self._finishing)
                self._change.wait_for(lambda: self._urgent or self._finishing, self._limits.gather_s)
            else:
                hurried, first_s = self._finishing, self._limits.first_pause_s
                pause_s = first_s if hurried else backoff_s(self._attempts, first_s, self._limits.longest_pause_s)
                self._change.wait_for(
                    lambda: self._abandoned or self._finishing is not hurried,
                    self._limits.first_pause_s if hurried else pause_s,
                )
            batch, self._waiting, self._urgent = self._waiting, deque(), False
            self._begun += len(batch)
            if self._finishing and self.durable:
                self._asked = math.inf
            all_done = self._finishing and not batch and (not self.durable or self.settled >= self._asked)
            return None if self._abandoned or all_done else batch

    def _write(self, batch: Sequence[object]) -> None:
        start_s = self._clock()
        own = True
        for message in batch:
            own = own and isinstance(message, Span) and message.actor == "metrics"
            if isinstance(message, _Mark):
                self._asked = max(self._asked, message.version)
                continue
            self._unflushed += 1
            self._call(lambda: self._sink.write(message), type(message))  # noqa: B023 - called at once
            if self._fault is not None or self._abandoned:
                return
        self._flush()
        if not own:  # otherwise telling of a write would make one more, for ever
            self._tell(Write(self.name, self._lane, start_s, self._clock()))

    def _flush(self) -> None:
        if not self._call(self._sink.flush, "flush"):
            return
        self._unflushed = 0
        self.written = self._begun
        settling = self._asked > self.settled
        if settling and self._durable is not None and not self._call(self._durable.settle, "settle"):
            return
        if self.trouble is not None:
            self.trouble, self._attempts = None, 0
            self._note("sink_back", f"the sink {self.name} writes again, and has lost nothing")
        if settling:
            self.settled = self._asked
        self._changed()

    def _call(self, function: Callable[[], None], kind: type | str, limit: int = _MAX_FAILURES) -> bool:
        """Do it, within the time that `fault` watches; whether it succeeded."""
        self._busy_since_s = self._clock()
        try:
            function()
        except BaseException as error:  # whatever a package raises, the thread must tell of it before it ends
            why = f"{type(error).__name__}: {error}"
            if self.durable and isinstance(error, OSError) and kind in ("open", "flush", "settle"):
                self._have_trouble(why)
                return False
            self._failures[kind] += 1
            if self._failures[kind] >= limit or isinstance(error, FolderGoneError):  # which no waiting mends
                self._fault = why
            return False
        else:
            self._failures[kind] = 0  # of this type only: a sink may leave most alone, which tells nothing
            return True
        finally:
            self._busy_since_s = None
            if self._durable is not None:
                while self._durable.notes:
                    self.notes.append(self._durable.notes.popleft())

    def _have_trouble(self, why: str) -> None:
        first, self.trouble = self.trouble is None, why
        self._attempts += 1
        if first:
            message = f"the sink {self.name} cannot write at the moment ({why}); it keeps what comes and tries again"
            self._note("sink_failing", message)
            self._changed()

    def _note(self, kind: str, message: str) -> None:
        self.notes.append(Incident(actor="metrics", kind=kind, message=message))
