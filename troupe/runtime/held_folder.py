"""A folder that is held by its descriptor, so that whoever writes in it by its name can see whether the name still
leads there."""

import fcntl
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path

from troupe.errors import FolderGoneError

_F_GETPATH = 50  # of macOS
_LONGEST_PATH = 1024
_PAUSE_S = 0.05
"""Between the two looks that it takes to say that a folder is gone."""


def leads_to(name: Path | str, file: int | os.stat_result, folder: int | None = None) -> bool:
    """Whether a name, in a folder that is open, leads to a file that is open, or was found before. True, too, where the
    system does not tell: an error of a file system that does not answer is no sign that the name leads elsewhere."""
    try:
        found = os.stat(name, dir_fd=folder)
        return os.path.samestat(found, os.fstat(file) if isinstance(file, int) else file)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


class HeldFolder:
    """`check` may be called in any thread; the rest belongs to whoever holds it."""

    def __init__(self, path: Path, sleep: Callable[[float], object] = time.sleep) -> None:
        """OSError where there is no such folder."""
        self.path = path
        self._sleep = sleep
        self._descriptor: int | None = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    @property
    def identity(self) -> tuple[int, int]:
        """What no other folder of this machine has at the same time: device and inode. It is not closed yet."""
        assert self._descriptor is not None
        found = os.fstat(self._descriptor)
        return found.st_dev, found.st_ino

    def check(self) -> None:
        """FolderGoneError where the name has come to lead elsewhere, or nowhere: seen twice."""
        if (error := self.gone()) is not None:
            raise error

    def gone(self) -> FolderGoneError | None:
        """What `check` would raise."""
        if self._is_there():
            return None
        self._sleep(_PAUSE_S)
        return None if self._is_there() else FolderGoneError(self._message())

    def where(self) -> Path | None:
        """The path under which the folder can be found now; None where it was deleted, or nobody tells."""
        if (descriptor := self._descriptor) is None:
            return None
        try:
            path = Path(_path_of(descriptor))
            return path if os.path.samestat(path.stat(), os.fstat(descriptor)) else None
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        """Let go; afterwards it counts as being there. Safe to call twice."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _is_there(self) -> bool:
        descriptor = self._descriptor  # read once: another thread may close it meanwhile
        return descriptor is None or leads_to(self.path, descriptor)

    def _message(self) -> str:
        now = self.where()
        there = "another folder lies there" if self.path.is_dir() else "no folder lies there any more"
        if now is None:
            return (
                f"{self.path}: the run folder was taken away from under the run: {there}, and where it is now cannot "
                "be told, so it was probably deleted; nothing is written in its place. Put it back from a copy and go "
                "on with --resume, or begin anew"
            )
        return (
            f"{self.path}: the run folder was taken away from under the run: {there}, and the run's own is now {now}; "
            f"nothing is written in its place. Go on with it: troupe train -o {shlex.quote(str(now))} --resume"
        )


def _path_of(descriptor: int) -> str:
    if hasattr(fcntl, "F_GETPATH") or not Path("/proc/self/fd").is_dir():
        found = fcntl.fcntl(descriptor, getattr(fcntl, "F_GETPATH", _F_GETPATH), bytes(_LONGEST_PATH))
        return os.fsdecode(found.split(b"\0", 1)[0])
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())
