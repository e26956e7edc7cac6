"""What a trace must be so that Perfetto draws it as it was meant: a strict reading of the Trace Event Format.

Times count in eighths of a microsecond, which is what the writer promises.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

COMMON = {"ph": str, "pid": int, "tid": int, "name": str}
FIELDS: dict[str, dict[str, Any]] = {
    "M": {"args": dict},
    "X": {"cat": str, "ts": (int, float), "dur": (int, float), "args": dict},
    "s": {"cat": str, "ts": (int, float), "id": int},
    "f": {"cat": str, "ts": (int, float), "id": int, "bp": str},
}


class Slice(NamedTuple):
    """A piece of work as it is drawn."""

    process: int
    track: int
    start: int
    end: int
    name: str
    args: dict[str, Any]


class Trace(NamedTuple):
    """What is to be seen."""

    tracks: dict[tuple[int, int], str]
    slices: list[Slice]
    arrows: list[tuple[str, Slice, Slice]]
    """(name, from, to)"""

    def track_of(self, piece: Slice) -> str:
        """The name of its track."""
        return self.tracks[piece.process, piece.track]


def read_trace(events: list[dict[str, Any]]) -> Trace:
    """Check every rule that we know of, and say what is drawn. AssertionError names what is broken."""
    processes: dict[int, str] = {}
    tracks: dict[tuple[int, int], str] = {}
    slices: list[Slice] = []
    starts: dict[int, dict[str, Any]] = {}
    ends: dict[int, dict[str, Any]] = {}
    numbers = []
    for event in events:
        kinds = {**COMMON, **FIELDS[event["ph"]]}
        assert event.keys() == kinds.keys(), event
        assert all(isinstance(event[key], kind) for key, kind in kinds.items()), event
        place = event["pid"], event["tid"]
        if event["ph"] == "M" and event["name"] == "process_name":
            assert event["pid"] not in processes, f"named twice: {event}"
            processes[event["pid"]] = event["args"]["name"]
        elif event["ph"] == "M" and event["name"] == "thread_name":
            assert place not in tracks, f"named twice: {event}"
            assert event["tid"] not in {tid for _, tid in tracks}, "Perfetto wants tids unique over all processes"
            tracks[place] = event["args"]["name"]
        elif event["ph"] == "M":
            assert event["name"] == "thread_sort_index"
            assert isinstance(event["args"]["sort_index"], int)
        else:
            assert place in tracks, f"no metadata before {event}"
            assert event["pid"] in processes, f"no metadata before {event}"
            assert event["name"], event
        if event["ph"] == "X":
            slices.append(_slice(event))
        elif event["ph"] == "s":
            assert event["id"] not in starts, f"two starts: {event}"
            starts[event["id"]] = event
            numbers.append(event["id"])
        elif event["ph"] == "f":
            assert event["id"] in starts, f"an end before its start: {event}"
            assert event["id"] not in ends, f"two ends: {event}"
            assert event["bp"] == "e", "else it would bind to the next slice"
            ends[event["id"]] = event
    assert numbers == sorted(numbers)
    assert starts.keys() == ends.keys(), "an arrow without an end"
    _check_nesting(slices)
    arrows = []
    for number, start in starts.items():
        end = ends[number]
        assert (start["name"], start["cat"]) == (end["name"], end["cat"]), "flows bind by category, name and id"
        assert start["ts"] <= end["ts"], f"an arrow against time: {start}, {end}"
        arrows.append((start["name"], _bound(start, slices), _bound(end, slices)))
    return Trace(tracks, slices, arrows)


def _eighths(value: float) -> int:
    assert value * 8 == int(value * 8) >= 0, f"{value} is not in eighths of a microsecond"
    return int(value * 8)


def _slice(event: dict[str, Any]) -> Slice:
    assert event["dur"] > 0, f"nothing binds to a slice without length: {event}"
    assert event["cat"] in ("work", "wait"), event
    start = _eighths(event["ts"])
    return Slice(event["pid"], event["tid"], start, start + _eighths(event["dur"]), event["name"], event["args"])


def _check_nesting(slices: list[Slice]) -> None:
    """On a track slices are one after the other or one within the other; a part never starts with its whole, as its
    event comes first in the file."""
    by_track = defaultdict(list)
    for piece in slices:
        by_track[piece.process, piece.track].append(piece)
    for pieces in by_track.values():
        stack: list[Slice] = []
        for piece in sorted(pieces, key=lambda piece: (piece.start, -piece.end)):
            while stack and stack[-1].end <= piece.start:
                stack.pop()
            if stack:
                assert piece.end <= stack[-1].end, f"{piece} overlaps {stack[-1]}"
                assert piece.start > stack[-1].start, f"{piece} starts with {stack[-1]}"
            stack.append(piece)


def _bound(event: dict[str, Any], slices: list[Slice]) -> Slice:
    """The innermost slice around an event."""
    ts = _eighths(event["ts"])
    around = [s for s in slices if (s.process, s.track) == (event["pid"], event["tid"]) and s.start <= ts < s.end]
    assert around, f"bound to nothing: {event}"
    return max(around, key=lambda piece: piece.start)
