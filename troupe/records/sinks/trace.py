"""The timeline: spans written as trace events that Perfetto and chrome://tracing open.

Every actor has a track, and one more for each lane in which it did something at the same time; child processes and
members, such as workers on other machines, are processes of their own. Arrows follow a group: from each span of a gid
to the spans of that gid that came next, so that where several rewards score a group at once the arrows part and meet
again.

Format: the JSON array form of the Trace Event Format, times in microseconds. The array is left open while the run goes
on, which the format allows, and what is flushed are whole events, so that the file of a crashed run opens too. A file
that has become large gives way to a new one: a run of weeks neither fills the disk nor makes what no viewer can open.
"""

from io import FileIO
from pathlib import Path
from typing import Any

import msgspec

from troupe.messages import GroupClosed, Span

_MAIN_PROCESS = 1
_FIRST_MEMBER = 1 << 22  # above every pid: those of two machines may be equal
_PARTS = 8  # of a microsecond: eighths are exact in decimal and in binary, whatever a reader multiplies them with
_MAX_LANES = 1000  # of an actor, for the order of tracks
_MOST_BYTES = 256 * 2**20  # of a file: viewers hold all of it in memory, several times over


class _Args(msgspec.Struct, omit_defaults=True):
    step: int | None = None
    gid: int | None = None
    gids: tuple[int, ...] = ()
    part: str = ""


class _Slice(msgspec.Struct):
    """A complete event; a struct, because there are hundreds a step."""

    ph: str
    pid: int
    tid: int
    name: str
    cat: str
    ts: float
    dur: float
    args: _Args


class _Drawn(msgspec.Struct, frozen=True):
    """A span of a group, as drawn."""

    start_s: float
    end_s: float
    process: int
    track: int
    ts: float


class TraceWriter:
    """A sink that appends spans to a trace file. Tracks are numbered in order of first appearance.

    When the file has `most_bytes`, it is renamed from `NAME.json` to `NAME.before.json`, in place of the one that was
    there, and a new one is begun; so the newest part is always kept. No arrow leads from one file to the other.
    """

    name = "trace"
    takes: tuple[type, ...] = (Span, GroupClosed)

    def __init__(self, path: Path, *, most_bytes: int = _MOST_BYTES, most_groups: int = 1 << 16) -> None:
        """`most_groups`: alive at once; more have lost their end."""
        self._path, self._most_bytes, self._most_groups = path, most_bytes, most_groups
        self._before = path.with_name(f"{path.stem}.before{path.suffix}")
        self._written = 0
        self._processes: set[int] = set()
        self._actors: dict[str, int] = {}
        self._members: dict[str, int] = {}
        self._tracks: dict[tuple[int, str, int], int] = {}
        self._spans: dict[int, list[_Drawn]] = {}
        self._arrows = 0
        self._file: FileIO | None = None
        self._unwritten = bytearray()
        self._encode = msgspec.json.Encoder().encode

    def open(self) -> None:
        """Begin the file anew."""
        self._before.unlink(missing_ok=True)
        self._begin()
        self._put_out()

    def write(self, message: object) -> None:
        """Add a span to its track, with the arrows that end in it; a group that is closed has no more of them."""
        if isinstance(message, GroupClosed):
            self._spans.pop(message.gid, None)
        elif isinstance(message, Span):
            self._draw(message)

    def flush(self) -> None:
        """Put what was written where a crash of this process cannot lose it; what a full disk left out comes next."""
        self._put_out()
        if self._file is not None and self._written >= self._most_bytes:
            self._file.close()
            self._path.replace(self._before)
            self._begin()
            self._put_out()

    def close(self) -> None:
        if self._file is None:
            return
        try:
            self._unwritten += b"\n]\n"
            self._put_out()
        finally:
            self._file.close()
            self._file = None

    def _put_out(self) -> None:
        while self._file is not None and self._unwritten:
            written = self._file.write(self._unwritten)
            del self._unwritten[:written]
            self._written += written

    def _begin(self) -> None:
        self._file, self._written = FileIO(self._path, "wb"), 0
        self._processes, self._tracks, self._spans = set(), {}, {}
        self._unwritten = bytearray()
        self._name_process(_MAIN_PROCESS, "troupe")

    def _draw(self, span: Span) -> None:
        process = self._process_of(span)
        track = self._tracks.get((process, span.actor, span.lane)) or self._track(process, span)
        start, end = int(span.start_s * 1e6 * _PARTS), int(span.end_s * 1e6 * _PARTS)
        ts = start / _PARTS
        args = _Args(span.step, span.gid, span.gids, span.part)
        self._append(_Slice("X", process, track, span.name, span.kind, ts, max(end - start, 1) / _PARTS, args))
        for gid in span.gids if span.gid is None else (span.gid, *span.gids):
            self._follow(gid, _Drawn(span.start_s, span.end_s, process, track, ts))

    def _follow(self, gid: int, span: _Drawn) -> None:
        """Draw the arrows from the last spans of the group that had ended when this one began.

        Spans come in when they end, so all of them are here.
        """
        spans = self._spans.get(gid)
        if spans is None:
            self._spans[gid] = [span]
            if len(self._spans) > self._most_groups:
                del self._spans[next(iter(self._spans))]
            return
        if before := [past for past in spans if past.end_s <= span.start_s]:
            latest_start = max(past.start_s for past in before)
            for past in before:
                if past.end_s > latest_start or past.start_s == latest_start:
                    self._arrow(gid, past, span)
        spans.append(span)

    def _arrow(self, gid: int, past: _Drawn, span: _Drawn) -> None:
        self._arrows += 1
        name, number = f"group {gid}", self._arrows
        self._event("s", past.process, past.track, name, cat="group", ts=past.ts, id=number)
        self._event("f", span.process, span.track, name, cat="group", ts=span.ts, id=number, bp="e")

    def _process_of(self, span: Span) -> int:
        """Its number in the file: a member keeps its own, in whatever process and on whatever machine it is."""
        if span.member:
            return self._members.setdefault(span.member, _FIRST_MEMBER + len(self._members))
        return _MAIN_PROCESS if span.process is None else span.process

    def _track(self, process: int, span: Span) -> int:
        actor, lane = span.actor, span.lane
        if process not in self._processes:
            self._name_process(process, span.member or f"troupe {actor}")
        track = self._tracks[process, actor, lane] = len(self._tracks) + 1
        order = self._actors.setdefault(actor, len(self._actors)) * _MAX_LANES + min(lane, _MAX_LANES - 1)
        self._event("M", process, track, "thread_name", args={"name": actor if not lane else f"{actor} {lane + 1}"})
        self._event("M", process, track, "thread_sort_index", args={"sort_index": order})
        return track

    def _name_process(self, process: int, name: str) -> None:
        self._processes.add(process)
        self._event("M", process, 0, "process_name", args={"name": name})

    def _event(self, phase: str, process: int, track: int, name: str, **fields: Any) -> None:
        self._append({"ph": phase, "pid": process, "tid": track, "name": name, **fields})

    def _append(self, event: object) -> None:
        if self._file is None:
            raise ValueError(f"the trace {self._path} is not open")
        self._unwritten += b",\n" if self._written or self._unwritten else b"[\n"
        self._unwritten += self._encode(event)
