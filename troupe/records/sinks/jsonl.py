"""metrics.jsonl, one JSON object a step, readable while the run goes on; and the file under it, of whole records."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

import msgspec

from troupe.errors import FolderGoneError
from troupe.messages import Incident, Update
from troupe.runtime.held_folder import leads_to

_MOST_STEPS = 2**53
"""Beyond it is no step, and no number that scripts can count to."""
_BLOCK_BYTES = 1 << 16


class AppendedFile:
    """Records wait in memory until `flush` has written all of them; a part of one is taken back.

    A file that was removed, or exchanged for another, is opened again by its name, in the folder that it was opened in
    first, wherever that was moved; `lost` is called then, and where somebody has cut the file.
    """

    def __init__(self, path: Path, lost: Callable[[], None] = lambda: None, kind: type[FileIO] = FileIO) -> None:
        self._path = path
        self._lost, self._kind = lost, kind
        self._folder: int | None = None
        self._file: FileIO | None = None
        self._unwritten = bytearray()
        self._good = 0
        """Bytes of the file that are whole records."""
        self._named = False
        """Whether the file's name is on the disk for sure."""

    @property
    def is_open(self) -> bool:
        """Whether records can be written."""
        return self._file is not None

    def open(self) -> None:
        """Open for appending. OSError where that fails now."""
        if self._folder is None:
            self._folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        self._file = self._kind(self._path.name, "ab", opener=self._opened)
        self._good = os.fstat(self._file.fileno()).st_size

    def add(self, record: bytes) -> None:
        """Take a record; it is written by the next `flush`."""
        self._unwritten += record

    def flush(self) -> None:
        """Write what waits. OSError where that fails now; then nothing is lost, and it can be tried again."""
        if self._file is None or not self._unwritten:
            return
        self._look_for_it(self._file)
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
        """Have all that was flushed on the disk, come what may. OSError where that fails now."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            if not self._named:
                if self._folder is not None:
                    os.fsync(self._folder)
                self._named = True

    def close(self) -> None:
        """Close the file, at the end of a record. Safe to call twice."""
        file, self._file = self._file, None
        folder, self._folder = self._folder, None
        if folder is not None:
            os.close(folder)
        if file is not None:
            try:
                file.truncate(self._good)
            finally:
                file.close()

    def _opened(self, name: str, flags: int) -> int:
        return os.open(name, flags, 0o666, dir_fd=self._folder)

    def _look_for_it(self, file: FileIO) -> None:
        """Go on in the file that the name leads to now. OSError where there is none and none can be made now,
        FolderGoneError where none ever can."""
        if not leads_to(self._path.name, file.fileno(), self._folder):
            try:
                self._file = self._kind(self._path.name, "ab", opener=self._opened)
            except FileNotFoundError:  # a folder that is there can have a new file
                raise FolderGoneError(f"{self._path.parent}: the folder was deleted under the run") from None
            file.close()
            self._named = False
        elif os.fstat(file.fileno()).st_size >= self._good:
            return
        assert self._file is not None
        self._good = os.fstat(self._file.fileno()).st_size
        self._lost()


class JsonlSink:
    """Appends one line for every Update: `step`, `version` and all metrics.

    Opened after a resume, it first cuts off the lines of steps past `first_step`, which will be made again, and a last
    line that a crash has cut. A line that a full disk has cut is taken back, and written again with the next `flush`.
    """

    name = "jsonl"
    takes: tuple[type, ...] = (Update,)

    def __init__(
        self,
        path: Path,
        *,
        first_step: int = 0,
        block_bytes: int = _BLOCK_BYTES,
        make_file: Callable[[Path, Callable[[], None]], AppendedFile] = AppendedFile,
    ) -> None:
        """`block_bytes`: read at once when the end of the file is looked at."""
        self.notes: deque[Incident] = deque()
        self.lacking: int | None = None
        """Steps up to the newest that was flushed of which the file has no line; None before it was opened."""
        self._path = path
        self._first_step, self._block_bytes = first_step, block_bytes
        self._opened = False
        self._file = make_file(path, self._begin_anew)
        self._newest = self._flushed = first_step

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
            self._file.add(msgspec.json.encode(line) + b"\n")

    def flush(self) -> None:
        if self._opened and not self._file.is_open:
            self._open_file()
        self._file.flush()
        self._flushed = self._newest

    def settle(self) -> None:
        self._file.settle()

    def close(self) -> None:
        self._opened = False
        self._file.close()

    def _open_file(self) -> None:
        if self._path.exists():
            _cut_after(self._path, self._first_step, self._block_bytes)
        self._file.open()
        self.lacking = self._first_step - len(steps_in(self._path, self._first_step))

    def _begin_anew(self) -> None:
        """Somebody has taken the file away, or lines of it."""
        try:
            there = len(steps_in(self._path, self._flushed))
        except OSError:  # the folder is not in its place either
            there = 0
        self.lacking = self._flushed - there
        message = (
            f"{self._path} was removed, exchanged or cut under the run; it is gone on with, and of the {self._flushed} "
            f"steps before {self.lacking} are not in it"
        )
        self.notes.append(Incident(actor="metrics", kind="file_lost", message=message))


def steps_in(path: Path, up_to: int) -> set[int]:
    """The steps, up to one, of which such a file has a line; none where there is no file. OSError where it cannot be
    read."""
    if not path.exists():
        return set()
    with path.open("rb") as file:
        return {told[0] for line in file if (told := decode_step(line)) is not None and 1 <= told[0] <= up_to}


def steps_between(path: Path, after: int, up_to: int) -> list[tuple[int, dict[str, float]]]:
    """Step and metrics of the lines of such a file with `after` < step ≤ `up_to`; none where there is no file.

    What JSON cannot say (NaN) is left out. Only as much of the file is read as it takes.
    """
    found: list[tuple[int, dict[str, float]]] = []
    if after >= up_to or not path.exists():
        return found
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for _, line in _lines_from_the_end(descriptor, os.fstat(descriptor).st_size):
            if (told := decode_step(line)) is None:
                continue
            step, metrics = told
            if step <= after:
                break
            if step <= up_to:
                found.append((step, {name: value for name, value in metrics.items() if value is not None}))
    finally:
        os.close(descriptor)
    return found[::-1]


def decode_step(line: bytes) -> tuple[int, dict[str, Any]] | None:
    """Step and metrics of a line, without what is no number; None of what is no line of such a file, as one that was
    cut."""
    try:
        metrics = _FIGURES.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    step = metrics.pop("step", None)
    metrics.pop("version", None)
    if type(step) not in (int, float) or not 0 <= step < _MOST_STEPS or step != int(step):
        return None
    return int(step), {name: value for name, value in metrics.items() if value is None or type(value) in (int, float)}


def _cut_after(path: Path, step: int, block_bytes: int) -> None:
    """Leave the lines up to the last one that is whole and of no step past `step`; that line gets its end."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        size = os.fstat(descriptor).st_size
        lines = _lines_from_the_end(descriptor, size, block_bytes)
        kept = ((end, line) for end, line in lines if (told := decode_step(line)) is not None and told[0] <= step)
        end, line = next(kept, (0, b""))
        if end == size and (not line or line.endswith(b"\n")):
            return
        os.ftruncate(descriptor, end)
        if end and not line.endswith(b"\n"):
            os.pwrite(descriptor, b"\n", end)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lines_from_the_end(descriptor: int, size: int, block_bytes: int = _BLOCK_BYTES) -> Iterator[tuple[int, bytes]]:
    """Every line with where it ends, the last one first; its own end is part of it."""
    start, rest = size, b""
    while start:
        block_start = max(0, start - block_bytes)
        rest = os.pread(descriptor, start - block_start, block_start) + rest
        start = block_start
        lines = rest.splitlines(keepends=True) if start == 0 else _whole_lines(rest)
        end = start + len(rest)
        for line in reversed(lines):
            yield end, line
            end -= len(line)
        rest = rest[: end - start]


def _whole_lines(data: bytes) -> list[bytes]:
    """The lines of `data` that begin in it for sure: all but the first."""
    _, newline, others = data.partition(b"\n")
    return others.splitlines(keepends=True) if newline else []


_FIGURES = msgspec.json.Decoder(dict[str, Any])
