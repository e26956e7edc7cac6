"""The timeline: spans written as trace events that Perfetto and chrome://tracing open, one track an actor.

Format: the JSON array form of the Trace Event Format; times in microseconds. The array is left open while the run
goes on, which the format allows, and every event is flushed whole, so that the file of a crashed run opens too.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import msgspec

from troupe.messages import Span

_PROCESS_ID = 1


class TraceWriter:
    """A sink that appends spans to a trace file. Tracks are numbered in order of first appearance."""

    name = "trace"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tracks: dict[str, int] = {}
        self._file: IO[bytes] | None = None

    def open(self) -> None:
        """Begin the file anew."""
        self._file = self._path.open("wb")
        self._file.write(b"[\n")
        self._event("M", 0, "process_name", before=b"", args={"name": "troupe"})

    def write(self, message: object) -> None:
        """Add a span to its actor's track; any other message is not for a timeline."""
        if not isinstance(message, Span):
            return
        if message.actor not in self._tracks:
            self._tracks[message.actor] = len(self._tracks) + 1
            self._event("M", self._tracks[message.actor], "thread_name", args={"name": message.actor})
        args = {key: value for key, value in (("step", message.step), ("gid", message.gid)) if value is not None}
        self._event(
            "X",
            self._tracks[message.actor],
            message.name,
            ts=message.start_s * 1e6,
            dur=(message.end_s - message.start_s) * 1e6,
            args=args,
        )

    def close(self) -> None:
        """End the array and close the file. Safe to call twice."""
        file, self._file = self._file, None
        if file is not None:
            with file:
                file.write(b"\n]\n")

    def _event(self, phase: str, track: int, name: str, *, before: bytes = b",\n", **fields: Any) -> None:
        if self._file is None:
            raise ValueError(f"the trace {self._path} is not open")
        event = {"ph": phase, "pid": _PROCESS_ID, "tid": track, "name": name, **fields}
        self._file.write(before + msgspec.json.encode(event))
        self._file.flush()
