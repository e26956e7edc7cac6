"""One writer a folder: a lock in the file `run.lock`, which says who holds it.

The lock is the system's (`flock`), so that it goes with the process that took it, however that ends, and a lock of a
dead owner is nobody's. Children do not inherit it. Where the file system knows no locks, what the file says of its
owner decides, as far as this machine can tell whether that one lives.
"""

import fcntl
import os
import platform
import subprocess
import time
import weakref
from contextlib import suppress
from pathlib import Path

import msgspec

LOCK = "run.lock"
_PATIENCE = 100
"""Lock files that may vanish while they are being taken, because their owners leave at the same moment."""


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds a lock, or held it until it died."""

    pid: int
    host: str
    started: float
    """Unix time at which the lock was taken."""
    process: str | None = None
    """What tells this process from a later one with its number; None where the system does not say."""
    file: int | None = None
    """The number that the file system gave the lock file: one that was copied with its folder has another."""

    @property
    def is_here(self) -> bool:
        """Whether the owner's machine is this one."""
        return self.host == platform.node()

    @property
    def is_alive(self) -> bool:
        """Whether the owner runs on this machine now; another program with its number is not the owner."""
        if not self.is_here or not _exists(self.pid) or _is_dead(self.pid):
            return False
        there = process_identity(self.pid)
        return self.process is None or there is None or there == self.process


class LockedError(Exception):
    """Another process holds the lock."""

    def __init__(self, owner: Owner | None) -> None:
        super().__init__(owner)
        self.owner = owner
        """None: it has not said yet who it is."""


class RunLock:
    """The lock on one folder. Not for use from several threads at once."""

    def __init__(self, folder: Path, name: str = LOCK) -> None:
        self._path = folder / name
        self._descriptor: int | None = None
        self._folder: int | None = None  # so that the lock goes with a folder that is moved
        _LOCKS.add(self)

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def take(self) -> None:
        """Take the lock, over from a dead owner too. LockedError where somebody else holds it; OSError where the file
        cannot be written."""
        self._folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for _ in range(_PATIENCE):
                descriptor = os.open(self._path.name, os.O_RDWR | os.O_CREAT, 0o644, dir_fd=self._folder)
                try:
                    if self._try(descriptor):
                        self._descriptor = descriptor
                        return
                except BaseException:
                    os.close(descriptor)
                    raise
                os.close(descriptor)
            raise LockedError(None)
        finally:
            if self._descriptor is None:
                self._forget()

    def release(self) -> None:
        """Let others in and remove the file. Safe to call twice."""
        if self._descriptor is None:
            return
        with suppress(OSError):  # somebody removed the folder; then there is nothing to let others into
            if self._is_in_place(self._descriptor):  # else it is the lock of who made the folder anew
                os.unlink(self._path.name, dir_fd=self._folder)
        with suppress(OSError):  # a child that was made by a bare fork may hold the file open still
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self._forget()

    def remove(self, name: str, inode: int) -> None:
        """Remove a file of the folder that is locked, wherever that was moved, if it is still the one with this number.
        Nothing happens where the lock is not held. OSError where it cannot be."""
        if self._folder is not None and os.stat(name, dir_fd=self._folder, follow_symlinks=False).st_ino == inode:
            os.unlink(name, dir_fd=self._folder)

    def _try(self, descriptor: int) -> bool:
        """Whether the lock is ours; False where the file is not the one in the folder any more."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(self._owner()) from None
        except OSError:
            return self._claim(descriptor)
        if not self._is_in_place(descriptor):
            return False
        _write(descriptor)
        return True

    def _claim(self, descriptor: int) -> bool:
        """Without locks: the file is ours if its owner is dead, and if nobody else claims it at the same moment."""
        owner = self._owner()
        if owner is not None and (owner.is_alive or not owner.is_here):
            raise LockedError(owner)
        _write(descriptor)
        claimed = self._owner()
        if claimed is not None and claimed.pid != os.getpid():
            raise LockedError(claimed)
        return self._is_in_place(descriptor)

    def _owner(self) -> Owner | None:
        return read_owner(self._path.parent, self._path.name)

    def _is_in_place(self, descriptor: int) -> bool:
        try:
            there = os.stat(self._path.name, dir_fd=self._folder)
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(descriptor))

    def _forget(self) -> None:
        for descriptor in (self._descriptor, self._folder):
            if descriptor is not None:
                os.close(descriptor)
        self._descriptor = self._folder = None


def read_owner(folder: Path, name: str = LOCK) -> Owner | None:
    """Who holds the lock on a folder, or held it when it died; None where nobody does, or has not said so yet."""
    try:
        with (folder / name).open("rb") as file:
            owner = msgspec.json.decode(file.read(), type=Owner)
            is_copy = owner.file not in (None, os.fstat(file.fileno()).st_ino)
    except (OSError, msgspec.MsgspecError):
        return None
    return None if is_copy else owner


def process_identity(pid: int) -> str | None:
    """What no other process ever has: when it began. None where there is no such process, or nobody tells."""
    stat = Path(f"/proc/{pid}/stat")
    with suppress(OSError, IndexError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        # the name, which comes second, may hold blanks and brackets; field 22 is the start in ticks since boot
        ticks = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
        return f"{boot} {ticks}"
    with suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(
            ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, timeout=10, check=True
        )
        return told.stdout.strip() or None
    return None


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _is_dead(pid: int) -> bool:
    """Whether a process that is there has ended, and nobody has asked how: it holds no lock and does nothing more."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
    except OSError:
        if Path("/proc/self/stat").exists():
            return False
        try:
            state = subprocess.run(
                ["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True, timeout=10
            ).stdout
        except (OSError, subprocess.SubprocessError):
            return False
    return state.strip()[:1] in ("Z", "X")


def _write(descriptor: int) -> None:
    me = Owner(
        pid=os.getpid(),
        host=platform.node(),
        started=time.time(),
        process=process_identity(os.getpid()),
        file=os.fstat(descriptor).st_ino,
    )
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, msgspec.json.encode(me) + b"\n", 0)
    os.fsync(descriptor)


_LOCKS: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _forget_in_child() -> None:
    for lock in _LOCKS:
        lock._forget()


os.register_at_fork(after_in_child=_forget_in_child)
