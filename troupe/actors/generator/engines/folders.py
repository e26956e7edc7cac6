"""Weights for external engines: a folder a policy version, in memory where there is room.

A folder stays while it is the newest or somebody has it on loan. All lie in one folder that is locked by the run that
made it, as `weights_files.py` has it: what a killed run leaves, the next start of any run removes.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from troupe.actors.generator.weights_files import SHARED_MEMORY, free_bytes, locked_folder, remove_leftovers
from troupe.errors import RunError
from troupe.policy import Weights

_AT_ONCE = 3
"""Folders that there may be at the same time: the newest, the one before it, which is still in use, and the next."""


class EngineFolders:
    """The folders of one run. `write` may be called in any one thread; the rest belongs to the event loop."""

    def __init__(
        self,
        run: Path,
        save: Callable[[Path, Weights], None],
        *,
        place: Path | None = None,
        size_of: Callable[[Weights], int],
        shared_memory: Path = SHARED_MEMORY,
    ) -> None:
        """`save` writes weights as a folder that engines read, `size_of` bytes. `place`: where; None: in memory, or in
        the run folder."""
        self._places: Sequence[Path] = (shared_memory, run) if place is None else (place,)
        self._is_shared = place is not None
        self._save = save
        self._size_of = size_of
        self._folder: Path | None = None
        self._lock: int | None = None
        self._lent: Counter[int] = Counter()
        self._written: set[int] = set()

    def write(self, version: int, weights: Weights) -> Path:
        """The folder of a version; written unless it is there. RunError where it cannot be written."""
        try:
            if self._folder is None:
                self._open(_AT_ONCE * self._size_of(weights))
            path = self._path(version)
            if version not in self._written:
                shutil.rmtree(path, ignore_errors=True)
                self._save(path, weights)
                self._written.add(version)
        except (OSError, RuntimeError) as error:
            raise RunError(
                f"the weights for engines could not be written: {error}; make room, or name another place with "
                "schedule.engines.weights_folder"
            ) from None
        return path

    def lend(self, version: int) -> None:
        """An engine is going to use it: it stays until it is given back."""
        self._lent[version] += 1

    def give_back(self, version: int) -> None:
        """An engine needs it no more."""
        self._lent[version] -= 1
        newest = max(self._written, default=-1)
        for old in [v for v in tuple(self._written) if v < newest and self._lent[v] <= 0]:
            shutil.rmtree(self._path(old), ignore_errors=True)
            self._written.remove(old)
            del self._lent[old]

    def close(self) -> None:
        """Remove all that is left. Safe to call twice; `write` begins anew."""
        folder, self._folder = self._folder, None
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        self._written.clear()
        self._lent.clear()

    def _path(self, version: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{version:08d}"

    def _open(self, needed: int) -> None:
        tried = []
        for place in self._places:
            if not (place.is_dir() and os.access(place, os.W_OK)):
                tried.append(f"{place} is no folder that can be written")
                continue
            if self._is_shared:
                remove_leftovers(place, place)
            if (free := free_bytes(place)) >= needed:
                self._folder, self._lock = locked_folder(place)
                if self._is_shared:
                    self._folder.chmod(0o755)  # engines there may run as somebody else
                return
            tried.append(f"{place} has {free / 1e9:.3g} GB free")
        raise OSError(f"{needed / 1e9:.3g} GB are needed, but {' and '.join(tried)}")
