"""Where a run's control socket is, who may come in, and that there is but one: files `control.*` in the run folder.

`control.sock` is the socket. Where its path would be longer than the system allows, or the file system has no sockets,
the socket is in a private folder among the temporary files; `control.path` says where, and of which folder it is, so
that a copy of the folder is not taken for the run. `control.lock` is held by who owns the socket.
"""

import os
import shlex
import shutil
import socket
import struct
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import msgspec

from troupe.errors import OutputError
from troupe.records.layout import CONTROL_LOCK, CONTROL_POINTER, CONTROL_SOCKET, PAGE, is_passing
from troupe.runtime.guardian import SILENT
from troupe.runtime.lock import LockedError, RunLock

MAX_PATH_BYTES = 107 if sys.platform == "linux" else 103
"""Longest path of a socket, in bytes."""
_BACKLOG = 64
_PRIVATE = "troupe-control-"
_LOCAL_PEERCRED, _LOCAL_PEERPID, _SOL_LOCAL = 1, 2, 0  # of macOS


class Peer(msgspec.Struct, frozen=True):
    """Who is at the other end of a socket; None where the system does not tell."""

    uid: int | None = None
    pid: int | None = None

    @property
    def may_enter(self) -> bool:
        """Only the user whose run it is, and root."""
        return self.uid in (None, 0, os.geteuid())

    def __str__(self) -> str:
        return f"user {'?' if self.uid is None else self.uid} (pid {'?' if self.pid is None else self.pid})"


def peer_of(connection: socket.socket) -> Peer:
    """Who has connected, as the system says."""
    try:
        if hasattr(socket, "SO_PEERCRED"):
            pid, uid, _ = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            return Peer(uid, pid)
        _, uid = struct.unpack("II", connection.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, 76)[:8])
        (pid,) = struct.unpack("i", connection.getsockopt(_SOL_LOCAL, _LOCAL_PEERPID, 4))
    except (OSError, struct.error):
        return Peer()
    return Peer(uid, pid)


class Place:
    """The control files of one run folder, held by this process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock: RunLock | None = None
        self._private: Path | None = None
        self._socket: tuple[Path, int] | None = None

    def take(self) -> None:
        """Become the one who serves this folder, which has to be there.

        Raises OutputError where somebody else is; OSError where the folder cannot be written.
        """
        lock = RunLock(self._folder, CONTROL_LOCK)
        try:
            lock.take()
        except LockedError as error:
            who = "" if error.owner is None else f" (process {error.owner.pid})"
            raise OutputError(
                f"{self._folder}: a daemon or another trainer is there already{who}; "
                f"ask it what it does: troupe status {shlex.quote(str(self._folder))}"
            ) from None
        self._lock = lock
        self._clear_away()

    def listen(self) -> socket.socket:
        """A listening socket that nobody but this user can ever have connected to; take the place first.

        Raises OSError where the system has none to give.
        """
        path = self._folder / CONTROL_SOCKET
        try:
            return self._listen_at(path)
        except OSError:
            path.unlink(missing_ok=True)
        self._private = _private_folder()
        listener = self._listen_at(self._private / CONTROL_SOCKET)
        try:
            pointer = f"{self._private / CONTROL_SOCKET}\n{_identity(self._folder)}\n"
            (self._folder / CONTROL_POINTER).write_text(pointer, encoding="utf-8")
        except BaseException:
            listener.close()
            raise
        return listener

    def leave(self) -> None:
        """Remove what is ours and let others in. Safe to call twice."""
        if self._lock is None:
            return
        if self._socket is not None:
            path, inode = self._socket
            with suppress(OSError):
                if path.lstat().st_ino == inode:
                    path.unlink()
            with suppress(OSError):  # it has gone with a folder that was moved
                self._lock.remove(CONTROL_SOCKET, inode)
        if self._private is not None:
            shutil.rmtree(self._private, ignore_errors=True)
            with suppress(OSError):
                (self._folder / CONTROL_POINTER).unlink()
        self._lock.release()
        self._lock = self._private = self._socket = None

    def _clear_away(self) -> None:
        """Remove what an owner who was killed has left."""
        for left in [path for path in self._folder.iterdir() if is_passing(path.name)]:
            shutil.rmtree(left, ignore_errors=True)
        with suppress(OSError):
            path = _pointed_to(self._folder)
            private = None if path is None else path.parent
            if private and private.name.startswith(_PRIVATE) and private.lstat().st_uid == os.geteuid():
                shutil.rmtree(private, ignore_errors=True)
        for name in (CONTROL_POINTER, PAGE, SILENT):
            with suppress(OSError):
                (self._folder / name).unlink()

    def _listen_at(self, path: Path) -> socket.socket:
        """The socket is made where nobody else can go, and takes its place when its mode is set."""
        if len(os.fsencode(path)) > MAX_PATH_BYTES:
            raise OSError(f"{path}: too long for a socket")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made: Path | None = None
        try:
            listener.setblocking(False)
            made = Path(tempfile.mkdtemp(prefix=".c", dir=path.parent))  # 0700; no longer a path than the final one
            listener.bind(os.fspath(made / "s"))
            (made / "s").chmod(0o600)
            listener.listen(_BACKLOG)
            inode = (made / "s").lstat().st_ino
            (made / "s").replace(path)  # a socket that a killed run has left gives way
            self._socket = path, inode
        except BaseException:
            listener.close()
            raise
        finally:
            if made is not None:
                shutil.rmtree(made, ignore_errors=True)
        return listener


def refuse_where_served(folder: Path) -> None:
    """OutputError where a daemon or a trainer serves this folder, also while a daemon has no trainer and the run's own
    lock is free. To be asked before anything in the folder is changed."""
    if not (folder / CONTROL_LOCK).exists():
        return
    place = Place(folder)
    with suppress(OSError):  # where the folder cannot be written, others say so
        place.take()
    place.leave()


def find_socket(folder: Path) -> Path | None:
    """The control socket of a run folder; None where none is there. Somebody need not answer it."""
    if (folder / CONTROL_SOCKET).exists():
        return folder / CONTROL_SOCKET
    path = _pointed_to(folder)
    return path if path is not None and path.exists() else None


def connect(path: Path, timeout_s: float | None) -> socket.socket:
    """A connection to a control socket. OSError where nobody answers."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        connection.connect(os.fspath(path))
    except BaseException:
        connection.close()
        raise
    return connection


def write_address(folder: Path, address: str) -> None:
    """Have `page.url` say the address, to this user only."""
    path = folder / PAGE
    path.unlink(missing_ok=True)  # one that a killed daemon has left; its mode need not be ours
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(descriptor, f"{address}\n".encode())
    finally:
        os.close(descriptor)


def remove_address(folder: Path) -> None:
    """There is no page any more."""
    with suppress(OSError):
        (folder / PAGE).unlink()


def read_address(folder: Path) -> str | None:
    """The address of the page of the daemon in a folder, where there is one that this user may see."""
    try:
        return (folder / PAGE).read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _pointed_to(folder: Path) -> Path | None:
    """Where `control.path` says that the socket of this folder is; None where it says so of another one."""
    try:
        path, identity = (folder / CONTROL_POINTER).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return None
    return Path(path) if Path(path).is_absolute() and identity == _identity(folder) else None


def _identity(folder: Path) -> str:
    """What a copy of a folder does not have, and a folder that is moved keeps."""
    found = folder.stat()
    return f"{found.st_dev}:{found.st_ino}"


def _private_folder() -> Path:
    """A new folder that only this user can enter, whose path leaves room for a socket's name."""
    for where in (tempfile.gettempdir(), "/tmp"):
        with suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix=_PRIVATE, dir=where))
            if len(os.fsencode(folder / CONTROL_SOCKET)) <= MAX_PATH_BYTES:
                return folder
            folder.rmdir()
    raise OSError("there is no folder for temporary files whose path is short enough for a control socket")
