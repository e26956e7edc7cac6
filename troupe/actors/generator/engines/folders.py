"""Weights for external engines: a folder a policy version, in memory where there is room.

A folder stays while it is the newest or somebody has it on loan. All lie in one `LockedFolder`.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from troupe.actors.generator.locked_folder import SHARED_MEMORY, LockedFolder, remove_leftovers, roomy_folder
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
        self._folder: LockedFolder | None = None
        self._lent: Counter[int] = Counter()
        self._written: set[int] = set()

    def write(self, version: int, weights: Weights) -> Path:
        """The folder of a version; written unless it is there. RunError where it cannot be written."""
        try:
            if self._folder is None:
                self._folder = self._opened(_AT_ONCE * self._size_of(weights))
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
            folder.close()
        self._written.clear()
        self._lent.clear()

    def _path(self, version: int) -> Path:
        assert self._folder is not None
        return self._folder.path / f"{version:08d}"

    def _opened(self, needed: int) -> LockedFolder:
        if self._is_shared:
            remove_leftovers(*self._places)
        folder = roomy_folder(self._places, needed)
        if self._is_shared:
            folder.path.chmod(0o755)  # engines there may run as somebody else
        return folder
