"""What the live page shows of a run, and no more of it than fits into a bounded place.

Everything that comes has a number, and whoever watches asks for what is newer than the newest that he has: so nothing
is kept for a watcher, and one who is slow misses what was pushed out meanwhile. Knows neither HTTP nor who watches.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import msgspec

from troupe.daemon.control.protocol import encode_line
from troupe.daemon.page.curves import Curves, figures, read_curves
from troupe.daemon.trainer.frames import Happened, Started, Stepped
from troupe.messages import Status
from troupe.records.layout import METRICS

_STEPS, _GROUPS, _INCIDENTS = 256, 16, 64


class Event(msgspec.Struct, frozen=True):
    """Something for those who watch."""

    number: int
    kind: str
    data: bytes
    """One line of JSON."""


class History:
    """The newest of everything."""

    def __init__(self, run: str, folder: str, *, clock: Callable[[], float] = time.time) -> None:
        self._about = {"run": run, "folder": folder}
        self._clock = clock
        self._curves = Curves()
        self._newest = 0
        self._status: Event | None = None
        self._end: Event | None = None
        self._steps: deque[Event] = deque(maxlen=_STEPS)
        self._groups: deque[Event] = deque(maxlen=_GROUPS)
        self._incidents: deque[Event] = deque(maxlen=_INCIDENTS)
        self._same: tuple[str, str, str] | None = None
        self._times = 0
        """Of the newest incident: what it is, and how often it happened on end."""
        self._steps_begin = 0
        """Steps up to this number are known as curves only."""
        self.change = anyio.Event()
        """Set when there is something new; then another one takes its place."""

    async def read(self, folder: Path) -> None:
        """Begin with the steps that the run in the folder has made already."""
        self._curves = await anyio.to_thread.run_sync(read_curves, folder / METRICS)

    def take(self, frame: Started | Stepped | Happened) -> None:
        """What a trainer tells."""
        match frame:
            case Started():
                self._curves.cut(frame.step)
                self._steps.clear()
                self._steps_begin = self._next()
            case Stepped():
                drawn = figures(frame.metrics)
                self._curves.add(frame.step, drawn)
                if len(self._steps) == _STEPS:
                    self._steps_begin = self._steps[0].number
                self._steps.append(self._event("step", {"step": frame.step, "figures": drawn}))
            case Happened():
                at = round(self._clock(), 1)
                for group in frame.groups:
                    self._groups.append(self._event("group", {"at": at, "group": group}))
                if frame.left_out:
                    text = f"{frame.left_out} further incidents are not shown"
                    self._incident(at, "daemon", "left_out", text)
                for incident, times in zip(frame.incidents, frame.times or (1,) * len(frame.incidents), strict=True):
                    self._incident(at, incident.actor, incident.kind, incident.message, times)
        self._changed()

    def failed(self, message: str) -> None:
        """The trainer's end, as its daemon has it."""
        self._incident(round(self._clock(), 1), "daemon", "trainer_failed", message)
        self._changed()

    def now(self, status: Status) -> None:
        """What the run is doing."""
        self._status = Event(self._next(), "status", encode_line(status).rstrip())
        self._changed()

    def end(self, message: str, *, well: bool) -> None:
        """Nothing will come any more."""
        self._end = self._event("end", {"message": message, "well": well})
        self._changed()

    @property
    def over(self) -> bool:
        """Whether the end was told."""
        return self._end is not None

    def since(self, number: int) -> tuple[list[Event], int]:
        """What is newer than `number`, in order, and the number to ask with next; 0: everything."""
        newest = self._newest
        events = [event for kept in (self._steps, self._groups, self._incidents) for event in kept]
        events += [event for event in (self._status, self._end) if event is not None]
        newer = sorted((event for event in events if event.number > number), key=lambda event: event.number)
        if number < self._steps_begin or not number:
            newer = [event for event in newer if event.kind != "step"]
            newer.insert(0, _packed(newest, "curves", self._curves.table()))
        if not number:
            newer.insert(0, _packed(newest, "about", self._about))
        return newer, newest

    def _incident(self, at: float, actor: str, kind: str, message: str, times: int = 1) -> None:
        """One that is the same as the newest takes its place: hundreds alike must not push out the others."""
        if self._same == (actor, kind, message):
            self._incidents.pop()
            times += self._times
        self._same, self._times = (actor, kind, message), times
        data: dict[str, Any] = {"at": at, "actor": actor, "kind": kind, "message": message}
        data |= {"times": times} if times > 1 else {}
        self._incidents.append(self._event("incident", data))

    def _event(self, kind: str, data: Any) -> Event:
        return _packed(self._next(), kind, data)

    def _next(self) -> int:
        self._newest += 1
        return self._newest

    def _changed(self) -> None:
        self.change.set()
        self.change = anyio.Event()


def _packed(number: int, kind: str, data: Any) -> Event:
    return Event(number, kind, msgspec.json.encode(data))
