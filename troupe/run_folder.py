"""The folder that a run writes in: taken before it begins, kept from other runs, left as it was found where nothing
came of it. Knows nothing of what is written there but the config."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from troupe.config import RUN_TOML, RunConfig, write_config
from troupe.errors import OutputError
from troupe.weights_files import remove_leftovers


class RunFolder:
    """One run's hold on its folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found_empty = False
        self._new_folders: list[Path] = []
        self._lock: int | None = None

    def take(self, config: RunConfig) -> None:
        """Make the folder, keep other runs out, clear away what a killed run left, and store the config.

        Raises OutputError where the folder cannot be written or another run writes there.
        """
        try:
            self._new_folders = [path for path in (self.path, *self.path.parents) if not path.exists()]
            self._found_empty = not self.path.exists() or not any(self.path.iterdir())
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            remove_leftovers(self.path)
            write_config(config, self.path / RUN_TOML)
        except OSError as error:
            self.remove_traces()
            raise OutputError(f"{self.path}: the output folder cannot be written: {error}") from None

    def leave(self) -> None:
        """Let other runs in. Safe to call twice."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove_traces(self) -> None:
        """Leave the disk as it was found, unless there is an earlier start of the run in the folder."""
        if not self._found_empty:
            return
        for path in self.path.iterdir() if self.path.is_dir() else ():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        for folder in self._new_folders:
            try:
                folder.rmdir()
            except OSError:  # it was never made, or somebody else uses it by now
                return

    def _take_lock(self) -> None:
        """Keep a second run out of the folder while this one writes there; the system drops the lock of a dead one."""
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{self.path}: another run is writing in this folder; wait until it has ended, or give another folder"
            ) from None
        except OSError:  # a file system without locks: nobody can be kept out
            return
