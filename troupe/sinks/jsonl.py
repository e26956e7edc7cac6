"""metrics.jsonl: one JSON object a step, readable while the run goes on."""

from __future__ import annotations

import os
from collections import deque
from contextlib import suppress
from io import FileIO
from pathlib import Path

import msgspec

from troupe.messages import Incident, Update


class JsonlSink:
    """Appends one line for every Update: `step`, `version` and all metrics.

    Opened after a resume, it first drops the lines of steps past `first_step`, which will be made again, and a last
    line that a crash has cut. A line that a full disk has cut is taken back, and written again with the next `flush`.
    """

    name = "jsonl"
    takes: tuple[type, ...] = (Update,)

    def __init__(self, path: Path, *, first_step: int = 0) -> None:
        self.notes: deque[Incident] = deque()
        self._path = path
        self._first_step = first_step
        self._opened = False
        self._file: FileIO | None = None
        self._unwritten = bytearray()
        self._newest = first_step
        self._good = 0
        """Bytes of the file that are whole lines."""
        self._named = False
        """Whether the file's name is on the disk for sure."""

    def open(self) -> None:
        """Open for appending, keeping the steps up to `first_step`. At every moment the file holds all of them."""
        self._opened = True
        self._open_file()

    def write(self, message: object) -> None:
        """Take an Update, once; its line is written by the next `flush`."""
        if isinstance(message, Update) and message.step > self._newest:
            self._newest = message.step
            identity = {"step": message.step, "version": message.version}
            line = identity | message.metrics | identity  # first in the line, whatever a reward calls its metrics
            self._unwritten += msgspec.json.encode(line) + b"\n"

    def flush(self) -> None:
        """Write the lines. OSError where that fails now; then none is lost, and it can be tried again."""
        if self._file is None and self._opened:
            self._open_file()
        if self._file is None or not self._unwritten:
            return
        try:
            self._file.truncate(self._good)  # where that failed before
            left = memoryview(bytes(self._unwritten))
            while left:  # a full disk takes a part
                left = left[self._file.write(left) :]
        except OSError:
            with suppress(OSError):
                self._file.truncate(self._good)
            raise
        self._good += len(self._unwritten)
        self._unwritten.clear()

    def settle(self) -> None:
        """Have every line that was flushed on the disk, come what may. OSError where that fails now."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            if not self._named:
                _sync_folder(self._path.parent)
                self._named = True

    def close(self) -> None:
        """Close the file, at the end of a line. Safe to call twice."""
        self._opened = False
        file, self._file = self._file, None
        if file is not None:
            try:
                file.truncate(self._good)
            finally:
                file.close()

    def _open_file(self) -> None:
        if self._path.exists():
            draft = self._path.with_name(f".writing-{self._path.name}")
            with draft.open("wb") as kept:
                kept.write(b"".join(self._lines_kept()))
                kept.flush()
                os.fsync(kept.fileno())
            draft.replace(self._path)
        file = FileIO(self._path, "ab")
        self._file, self._good = file, os.fstat(file.fileno()).st_size

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


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Line(msgspec.Struct):
    step: int
