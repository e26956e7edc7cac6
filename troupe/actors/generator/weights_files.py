"""Weights for other processes of the run: one safetensors file a policy version, in memory where there is room.

A file appears whole (it is written under another name first) and goes when its version can be asked for no more and
nobody is still reading it.

What is mapped and what is copied: writing copies the arrays into the file, whose pages in /dev/shm are memory
themselves; `mx.load` maps nothing, it reads the file once into arrays of the process that loads. So a version is held
once by the learner, once by the file, and once by each process that has loaded it.
"""

from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path

from troupe.actors.generator.locked_folder import SHARED_MEMORY, LockedFolder, free_bytes, roomy_folder
from troupe.errors import RunError
from troupe.policy import Weights
from troupe.policy.safetensors import safetensors_bytes, safetensors_chunks
from troupe.runtime.files import drafted


class WeightsFiles:
    """The files of one run. `write` may be called in any one thread; the rest belongs to the event loop."""

    def __init__(
        self,
        run: Path,
        *,
        at_once: int,
        shared_memory: Path = SHARED_MEMORY,
        reader: str = "the generator's process",
        remedy: str = "set schedule.generator to thread",
    ) -> None:
        """`run`: the run folder, where the files lie if memory has no room for them. `at_once`: how many files there
        may be at the same time. `reader`, and what to do where there is no room for it: for errors."""
        self._reader, self._remedy = reader, remedy
        self.free: Callable[[Path], int] = free_bytes
        """Bytes that are free at a place."""
        self._places = (shared_memory, run)
        self._at_once = at_once
        self._folder: LockedFolder | None = None
        self._lent: Counter[int] = Counter()
        self._kept: frozenset[int] = frozenset()
        self._written: set[int] = set()

    def write(self, version: int, weights: Weights) -> Path:
        """The file of a version; written unless it is there. RunError where the disk has no room."""
        needed = safetensors_bytes(weights)
        if self._folder is None:
            self._folder = self._opened(self._at_once * needed)
        path = self._path(version)
        if version in self._written:
            return path
        try:
            self._check_room(needed)
            with drafted(path) as draft, draft.open("wb") as file:
                file.writelines(safetensors_chunks(weights))
        except (OSError, RuntimeError) as error:
            raise RunError(
                f"{path}: the weights for {self._reader} could not be written: {error}; make room, or {self._remedy}"
            ) from None
        self._written.add(version)
        return path

    def lend(self, version: int) -> None:
        """Somebody is going to read the file: it stays until it is given back."""
        self._lent[version] += 1

    def give_back(self, version: int) -> None:
        """One who was lent the file has read it, or never will."""
        self._lent[version] -= 1
        self._tidy()

    def keep(self, versions: Collection[int]) -> None:
        """Only these versions may still be asked for."""
        self._kept = frozenset(versions)
        self._tidy()

    def close(self) -> None:
        """Remove all that is left. Safe to call twice."""
        folder, self._folder = self._folder, None
        if folder is not None:
            folder.close()
        self._written.clear()

    def _tidy(self) -> None:
        # a copy: the thread that writes may add to it at any moment
        for version in [v for v in tuple(self._written) if v not in self._kept and not self._lent[v]]:
            self._path(version).unlink(missing_ok=True)
            self._written.remove(version)
            del self._lent[version]

    def _path(self, version: int) -> Path:
        assert self._folder is not None
        return self._folder.path / f"{version:08d}.safetensors"

    def _check_room(self, needed: int) -> None:
        assert self._folder is not None
        if (free := self.free(self._folder.path)) < needed:
            raise OSError(f"{needed / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free")

    def _opened(self, needed: int) -> LockedFolder:
        try:
            return roomy_folder(self._places, needed, self.free)
        except OSError as error:
            raise RunError(f"weights for {self._reader}: {error}; make room, or {self._remedy}") from None
