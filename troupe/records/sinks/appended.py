"""A file that grows by whole records only, whatever a disk does meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path

from troupe.errors import FolderGoneError


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
        if not self._is_in_place(file):
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

    def _is_in_place(self, file: FileIO) -> bool:
        """Whether the name in the folder is still that of the file; also where the system does not tell."""
        try:
            there = os.stat(self._path.name, dir_fd=self._folder)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return os.path.samestat(there, os.fstat(file.fileno()))
