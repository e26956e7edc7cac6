"""Reporter: an actor's way to tell what it does: incidents, and spans of work and of waiting.

Spans are cheap and never wait: they go into a channel that drops the oldest. Spans that overlap get different
*lanes*, so that a timeline never draws one inside another that has nothing to do with it: spans of one task nest and
share a lane, those of tasks at the same time do not.
"""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from types import TracebackType
from typing import Any

import anyio
import msgspec

from troupe.messages import Incident, Span, SpanKind
from troupe.runtime.mailbox import Channel

_SILENT: AbstractContextManager[Any] = nullcontext()


class Reporter:
    """An actor's way to tell what it does: incidents, which are never lost, and spans, which may be.

    Both channels are optional, so that an actor can be run alone in a test or a script. Spans are opened and
    recorded on the event loop. `process`: pid of a child process, which tells of spans when they begin too, so that the
    run knows what is done there.
    """

    def __init__(
        self,
        actor: str,
        incidents: Channel[Incident] | None = None,
        spans: Channel[Span] | None = None,
        *,
        process: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.actor = actor
        self.process = process
        self.clock = clock
        self._incidents = incidents
        self._spans = spans
        self._open: dict[asyncio.Task[Any] | None, list[_Timed]] = {}
        self._lanes: list[float] = []  # since when each lane is free; ∞ while a span is open in it
        self._elsewhere: dict[tuple[str, int | None, int, str, float], Span] = {}  # what other processes are at

    async def incident(self, incident: Incident) -> None:
        """Report a fault that does not stop the run; waits for room."""
        if self._incidents is not None:
            await self._incidents.send(incident)

    def incident_nowait(self, incident: Incident) -> None:
        """Report a fault from where nobody may wait; one more than the channel holds is not told."""
        if self._incidents is not None:
            with suppress(anyio.WouldBlock, anyio.ClosedResourceError):
                self._incidents.send_nowait(incident)

    def span(
        self,
        name: str,
        *,
        step: int | None = None,
        gid: int | None = None,
        gids: Sequence[int] = (),
        kind: SpanKind = "work",
        part: str = "",
    ) -> AbstractContextManager[Any]:
        """Time the body as one span of work, or of waiting named for what is waited for, on the actor's track."""
        if self._spans is None:
            return _SILENT
        return _Timed(self, name, step, gid, gids, kind, part)

    def record(
        self,
        name: str,
        start_s: float,
        end_s: float,
        *,
        step: int | None = None,
        gid: int | None = None,
        gids: Sequence[int] = (),
        kind: SpanKind = "work",
    ) -> None:
        """Tell of work that was timed elsewhere, such as in a device thread (`time.perf_counter`)."""
        if self._spans is None:
            return
        inside = self._open.get(asyncio.current_task())
        if inside and inside[-1].last_s <= start_s:
            lane, inside[-1].last_s = inside[-1].lane, end_s
        else:
            lane = self._free_lane(start_s)
            self._lanes[lane] = end_s
        timed = _Timed(self, name, step, gid, gids, kind)
        timed.start_s, timed.lane = start_s, lane
        self._tell(timed.until(end_s))

    def mark(self, name: str, *, step: int | None = None, gid: int | None = None, gids: Sequence[int] = ()) -> None:
        """Tell of a moment: a span without length."""
        now_s = self.clock()
        self.record(name, now_s, now_s, step=step, gid=gid, gids=gids)

    def forward(self, span: Span) -> None:
        """Pass on what another process tells of, its times already by the clock of this one."""
        key = span.member, span.process, span.lane, span.name, span.start_s
        if span.end_s == math.inf:
            self._elsewhere[key] = span
        else:
            # and the spans within it, whose own ends were dropped on the way
            for inner in [k for k in self._elsewhere if k[:3] == key[:3] and k[4] >= span.start_s]:
                del self._elsewhere[inner]
            self._tell(span)

    def forget(self, process: int) -> None:
        """A child process has ended, whatever it was at."""
        self._elsewhere = {key: span for key, span in self._elsewhere.items() if span.process != process}

    def forget_member(self, member: str) -> None:
        """A member is gone, whatever it was at."""
        self._elsewhere = {key: span for key, span in self._elsewhere.items() if span.member != member}

    @property
    def doing(self) -> list[Span]:
        """What has begun and not ended, as far as it has come; outer spans before those inside."""
        now_s = self.clock()
        here = [timed.until(now_s) for stack in self._open.values() for timed in stack]
        return here + [msgspec.structs.replace(span, end_s=now_s) for span in self._elsewhere.values()]

    def close(self) -> None:
        """Close both channels."""
        for channel in (self._incidents, self._spans):
            if channel is not None:
                channel.close()

    def _free_lane(self, start_s: float) -> int:
        """The first lane that has been free since `start_s`."""
        for lane, free_s in enumerate(self._lanes):
            if free_s <= start_s:
                return lane
        self._lanes.append(-math.inf)
        return len(self._lanes) - 1

    def _tell(self, span: Span) -> None:
        if self._spans is not None and not self._spans.closed:
            self._spans.send_nowait(span)


class _Timed:
    """One open span of a reporter."""

    __slots__ = ("_report", "_stack", "_task", "_told", "lane", "last_s", "start_s")

    def __init__(
        self,
        report: Reporter,
        name: str,
        step: int | None,
        gid: int | None,
        gids: Sequence[int],
        kind: SpanKind,
        part: str = "",
    ) -> None:
        self._report = report
        self._told = name, step, gid, gids, kind, part

    def __enter__(self) -> None:
        report = self._report
        self._task = asyncio.current_task()
        self.start_s = self.last_s = start_s = report.clock()
        stack = report._open.get(self._task)
        if stack is None:
            self.lane = lane = report._free_lane(start_s)
            report._lanes[lane] = math.inf
            self._stack = report._open[self._task] = [self]
        else:
            self.lane = stack[-1].lane
            self._stack = stack
            stack.append(self)
        if report.process is not None:
            report._tell(self.until(math.inf))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        report, stack = self._report, self._stack
        end_s = report.clock()
        stack.remove(self)
        if stack:
            stack[-1].last_s = end_s
        else:
            del report._open[self._task]
            report._lanes[self.lane] = end_s
        report._tell(self.until(end_s))

    def until(self, end_s: float) -> Span:
        """The span as it would be if it ended then."""
        name, step, gid, gids, kind, part = self._told
        return Span(
            actor=self._report.actor,
            name=name,
            start_s=self.start_s,
            end_s=end_s,
            kind=kind,
            step=step,
            gid=gid,
            gids=tuple(gids),
            lane=self.lane,
            process=self._report.process,
            part=part,
        )
