"""LockedFolder: a folder for weights that others read, in memory where there is room.

It is locked by the process that made it. The system drops the lock of one that was killed, and the next start of any
run removes what that one left.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
"""Where files are memory, on Linux; on other systems there is no such folder."""
_PREFIX = "troupe-weights-"


class LockedFolder:
    """A new, empty folder, until it is closed."""

    def __init__(self, place: Path) -> None:
        """Made in `place`; OSError where it cannot be."""
        self.path, self._lock = _locked(place)

    def close(self) -> None:
        """Remove it and all that is in it. Once."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def free_bytes(place: Path) -> int:
    """That its file system has for us."""
    room = os.statvfs(place)
    return room.f_bavail * room.f_frsize


def roomy_folder(places: Sequence[Path], needed: int, free: Callable[[Path], int] = free_bytes) -> LockedFolder:
    """One in the first place with room for so many bytes. OSError that says what each place has."""
    tried = []
    for place in places:
        if not (place.is_dir() and os.access(place, os.W_OK)):
            tried.append(f"{place} is no folder that can be written")
        elif (there := free(place)) >= needed:
            return LockedFolder(place)
        else:
            tried.append(f"{place} has {there / 1e9:.3g} GB free")
    raise OSError(f"{needed / 1e9:.3g} GB are needed, but {' and '.join(tried)}")


def remove_leftovers(*places: Path) -> None:
    """Remove the folders that killed processes of this user left in these places."""
    for place in places:
        for folder in _folders(place):
            with suppress(OSError):  # somebody else's, or removed meanwhile
                lock = os.open(folder, os.O_RDONLY)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while its owner lives
                    shutil.rmtree(folder, ignore_errors=True)
                finally:
                    os.close(lock)


def _folders(place: Path) -> Iterator[Path]:
    with suppress(OSError):
        yield from place.glob(f"{_PREFIX}*")


def _locked(place: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        lock = os.open(folder, os.O_RDONLY)
        taken = False  # for a leftover, by a run that starts at this very moment and removes it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = True
        except OSError:  # a file system without locks: leftovers stay there
            pass
        if not taken and folder.exists():
            return folder, lock
        os.close(lock)
