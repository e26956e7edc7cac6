"""A file that grows by whole records only, whatever a disk does meanwhile. Knows nothing of what the records say."""

from __future__ import annotations

import os
from contextlib import suppress
from io import FileIO
from pathlib import Path


class AppendedFile:
    """Records wait in memory until `flush` has written all of them; a part of one is taken back."""

    def __init__(self, path: Path) -> None:
        self._path = path
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
        self._file = FileIO(self._path, "ab")
        self._good = os.fstat(self._file.fileno()).st_size

    def add(self, record: bytes) -> None:
        """Take a record; it is written by the next `flush`."""
        self._unwritten += record

    def flush(self) -> None:
        """Write what waits. OSError where that fails now; then nothing is lost, and it can be tried again."""
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
        """Have all that was flushed on the disk, come what may. OSError where that fails now."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            if not self._named:
                _sync_folder(self._path.parent)
                self._named = True

    def close(self) -> None:
        """Close the file, at the end of a record. Safe to call twice."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.truncate(self._good)
            finally:
                file.close()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
