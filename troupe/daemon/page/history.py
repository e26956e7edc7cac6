"""What the live page shows of a run, and no more of it than fits into a bounded place.

Everything that comes has a number, and whoever watches asks for what is newer than the newest that he has: so nothing
is kept for a watcher, and one who is slow misses what was pushed out meanwhile.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import msgspec

from troupe.daemon.control.protocol import encode_line
from troupe.daemon.trainer.frames import Happened, Started, Stepped
from troupe.messages import Evaluated, Status
from troupe.records.curves import Curves
from troupe.records.evaluations import read_evaluations
from troupe.records.figures import LIVE, function_of
from troupe.records.held_out import held_out_of, is_share
from troupe.records.layout import EVALUATIONS, METRICS
from troupe.records.sinks.jsonl import decode_step

_STEPS, _GROUPS, _INCIDENTS = 256, 16, 64
_ALIKE = 4
"""Incidents, the newest, of which one that happens again is counted and not told of once more."""
_MOST_FUNCTIONS = 8
"""Reward functions whose curves are kept."""
_MOST = 1e300


def figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Those of a step's metrics that are drawn; what is not finite is left out."""
    functions = [name for name in metrics if function_of(name) is not None][:_MOST_FUNCTIONS]
    drawn = [*(name for name in metrics if name in LIVE), *functions]
    return {name: _rounded(metrics[name]) for name in drawn if _is_finite(metrics[name])}


def read_curves(path: Path) -> Curves:
    """Those of a `metrics.jsonl`; what is no line of one is passed over, and so is a file that cannot be read."""
    curves = Curves()
    with suppress(OSError), path.open("rb") as lines:
        for line in lines:
            if (found := decode_step(line)) is not None and found[0] > 0:
                curves.add(found[0], figures(found[1]))
    return curves


def held_out(evaluations: Iterable[Evaluated]) -> list[dict[str, Any]]:
    """Of each set the figure that says most: its name, and versions, values and standard errors of the same length, of
    those versions that can be compared with the newest."""
    told = []
    for name, of_set in held_out_of(evaluations).items():
        figure = of_set.headline
        points = of_set.compared(figure)
        told.append(
            {
                "name": name,
                "figure": figure,
                "share": is_share(figure),
                "step": [point.version for point in points],
                "y": [_rounded(point.value) for point in points],
                "errors": [None if point.se is None else _rounded(point.se) for point in points],
            }
        )
    return told


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
        self._held_out: Event | None = None
        self._evaluated_ns = 0
        """When the file of evaluations was written that was read last."""
        self._end: Event | None = None
        self._steps: deque[Event] = deque(maxlen=_STEPS)
        self._groups: deque[Event] = deque(maxlen=_GROUPS)
        self._incidents: deque[Event] = deque(maxlen=_INCIDENTS)
        self._alike: dict[tuple[str, str, str], tuple[Event, int]] = {}
        """Of the newest few incidents: what each is → its event, and how often it happened since."""
        self._steps_begin = 0
        """Steps up to this number are known as curves only."""
        self.change = anyio.Event()
        """Set when there is something new; then another one takes its place."""

    async def read(self, folder: Path) -> None:
        """Begin with the steps that the run in the folder has made already."""
        self._curves = await anyio.to_thread.run_sync(read_curves, folder / METRICS)

    async def look(self, folder: Path) -> None:
        """Read the evaluations of the run in the folder, where there are new ones."""
        try:
            written_ns = (folder / EVALUATIONS).stat().st_mtime_ns
        except OSError:
            return
        if written_ns == self._evaluated_ns:
            return
        self._evaluated_ns = written_ns
        told = held_out(await anyio.to_thread.run_sync(read_evaluations, folder))
        self._held_out = self._event("held_out", told)
        self._changed()

    def add(self, frame: Started | Stepped | Happened) -> None:
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
                    told = {**msgspec.structs.asdict(group), "gid": str(group.gid)}  # JavaScript rounds above 2^53
                    self._groups.append(self._event("group", {"at": at, "group": told}))
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
        events += [event for event in (self._held_out, self._status, self._end) if event is not None]
        newer = sorted((event for event in events if event.number > number), key=lambda event: event.number)
        if number < self._steps_begin or not number:
            newer = [event for event in newer if event.kind != "step"]
            newer.insert(0, _packed(newest, "curves", _table(self._curves)))
        if not number:
            newer.insert(0, _packed(newest, "about", self._about))
        return newer, newest

    def _incident(self, at: float, actor: str, kind: str, message: str, times: int = 1) -> None:
        """One that is the same as one of the newest few takes its place: hundreds alike, of which two actors may tell
        by turns, must not push out the others."""
        what = (actor, kind, message)
        before, count = self._alike.pop(what, (None, 0))
        if before is not None:
            self._incidents.remove(before)
        times += count
        data: dict[str, Any] = {"at": at, "actor": actor, "kind": kind, "message": message}
        data |= {"times": times} if times > 1 else {}
        event = self._event("incident", data)
        self._incidents.append(event)
        self._alike[what] = event, times
        if len(self._alike) > _ALIKE:
            del self._alike[next(iter(self._alike))]

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


def _table(curves: Curves) -> dict[str, list[Any]]:
    """Column → a value for each point, the steps under `step`; None where there is none."""
    means = {name: [None if y is None else _rounded(y) for y in curve.mean] for name, curve in curves.curves().items()}
    return {"step": list(curves.steps), **means}


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and -_MOST < value < _MOST
