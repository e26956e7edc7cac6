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

    def __init__(self, path: Path, *, first_step: int = 0) -> None:
        self._path = path
        self._first_step = first_step
        self._file: IO[bytes] | None = None

    def open(self) -> None:
        """Open for appending, keeping the steps up to `first_step`."""
        kept = b"".join(self._lines_kept()) if self._path.exists() else b""
        self._file = self._path.open("wb")
        self._file.write(kept)
        self._file.flush()

    def write(self, message: object) -> None:
        """Write an Update as one line."""
        if isinstance(message, Update) and self._file is not None:
            line = {"step": message.step, "version": message.version, **message.metrics}
            self._file.write(msgspec.json.encode(line) + b"\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _lines_kept(self) -> list[bytes]:
        kept = []
        for line in self._path.read_bytes().splitlines(keepends=True):
            try:
                step = msgspec.json.decode(line)["step"]
            except (msgspec.DecodeError, KeyError, TypeError):
                continue
            if step <= self._first_step:
                kept.append(line)
        return kept
