"""metrics.jsonl: one JSON object a step, readable while the run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import msgspec

from troupe.messages import Update


class JsonlSink:
    """Appends one line for every Update: `step`, `version` and all metrics. Each line is flushed when written.

    Opened after a resume, it first drops the lines of steps past `first_step`, which will be made again, and a last
    line that a crash has cut.
    """

    name = "jsonl"
    takes: tuple[type, ...] = (Update,)

    def __init__(self, path: Path, *, first_step: int = 0) -> None:
        self._path = path
        self._first_step = first_step
        self._file: IO[bytes] | None = None

    def open(self) -> None:
        """Open for appending, keeping the steps up to `first_step`. At every moment the file holds all of them."""
        if self._path.exists():
            draft = self._path.with_name(f".writing-{self._path.name}")
            draft.write_bytes(b"".join(self._lines_kept()))
            draft.replace(self._path)
        self._file = self._path.open("ab")

    def write(self, message: object) -> None:
        """Write an Update as one line."""
        if isinstance(message, Update) and self._file is not None:
            identity = {"step": message.step, "version": message.version}
            line = identity | message.metrics | identity  # first in the line, whatever a reward calls its metrics
            self._file.write(msgspec.json.encode(line) + b"\n")
            self._file.flush()

    def flush(self) -> None:
        """Every line is flushed when it is written."""

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _lines_kept(self) -> list[bytes]:
        kept = []
        for line in self._path.read_bytes().split(b"\n"):
            try:
                step = msgspec.json.decode(line, type=_Line).step
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue
            if step <= self._first_step:
                kept.append(line + b"\n")
        return kept


class _Line(msgspec.Struct):
    step: int
