"""The lock on a folder: who holds it, and whose it is when its holder is gone."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import msgspec
import pytest

import troupe
from troupe.runtime.lock import LOCK, LockedError, Owner, RunLock, process_identity, read_owner

HOLD = """
import sys
from pathlib import Path
from troupe.runtime.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.take()
print("held", flush=True)
sys.stdin.readline()
lock.release()
"""


@contextmanager
def holder(folder: Path, program: str = HOLD) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock on a folder until a line comes on its standard input."""
    environment = {**os.environ, "PYTHONPATH": str(Path(troupe.__file__).parents[1])}
    command = [sys.executable, "-c", program, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert line_of(process.stdout) == "held"
            yield process
        finally:
            process.kill()


def line_of(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline().strip()


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_lock_says_who_holds_it_and_goes_with_its_holder(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.take()
    owner = read_owner(tmp_path)
    assert owner is not None
    assert (owner.pid, owner.host, owner.is_alive) == (os.getpid(), platform.node(), True)
    assert (lock.is_held, RunLock(tmp_path).is_held) == (True, False)
    with pytest.raises(LockedError) as refused:
        RunLock(tmp_path).take()
    assert refused.value.owner == owner
    lock.release()
    lock.release()
    assert names_in(tmp_path) == set()
    assert read_owner(tmp_path) is None
    other = RunLock(tmp_path)
    other.take()
    other.release()


def test_a_copy_of_a_folder_at_work_has_no_owner(tmp_path: Path) -> None:
    lock = RunLock(make(tmp_path / "run"))
    lock.take()
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "run", copy)
    assert read_owner(copy) is None
    other = RunLock(copy)
    other.take()
    owner = read_owner(copy)
    assert owner is not None
    assert owner.is_alive
    other.release()
    lock.release()


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_file_that_a_dead_owner_left_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_bytes(msgspec.json.encode(Owner(pid=1, host=platform.node(), started=0.0)) + b" " * 500)
    lock = RunLock(tmp_path)
    lock.take()
    owner = read_owner(tmp_path)
    assert owner is not None
    assert owner.pid == os.getpid()
    lock.release()


def test_a_lock_whose_owner_leaves_while_another_tries_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one opened the file before the first removed it, so that it would lock a file nobody else sees."""
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.take()
    flock = fcntl.flock

    def leave_first(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        first.release()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", leave_first)
    second.take()
    with pytest.raises(LockedError):
        RunLock(tmp_path).take()
    second.release()
    assert names_in(tmp_path) == set()


def test_of_many_who_try_at_once_one_gets_the_lock(tmp_path: Path) -> None:
    together = threading.Barrier(16)
    locks = [RunLock(tmp_path) for _ in range(16)]
    refused: list[RunLock] = []

    def grab(lock: RunLock) -> None:
        together.wait()
        try:
            lock.take()
        except LockedError:
            refused.append(lock)

    threads = [threading.Thread(target=grab, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (sum(lock.is_held for lock in locks), len(refused)) == (1, 15)
    for lock in locks:
        lock.release()


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["regular", "SIGKILL"])
def test_another_process_holds_the_lock_as_long_as_it_lives(tmp_path: Path, ending: str) -> None:
    with holder(tmp_path) as process:
        with pytest.raises(LockedError) as refused:
            RunLock(tmp_path).take()
        owner = refused.value.owner
        assert owner is not None
        assert (owner.pid, owner.is_alive) == (process.pid, True)
        if ending == "SIGKILL":
            process.kill()
        else:
            process.communicate("\n")
        process.wait()
    assert (tmp_path / LOCK).exists() == (ending == "SIGKILL")
    assert not owner.is_alive
    lock = RunLock(tmp_path)
    lock.take()
    lock.release()


CHILDREN = """
import os, subprocess, sys
from pathlib import Path
from troupe.runtime.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.take()
forked = os.fork()
if not forked:
    sys.stdin.read()
    os._exit(0)
spawned = subprocess.Popen(["sleep", "600"])
print("held", flush=True)
print(forked, spawned.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_children_of_a_dead_owner_do_not_hold_its_lock(tmp_path: Path) -> None:
    """One made by a bare fork, which has all that its parent had open, and one that runs another program."""
    with holder(tmp_path, CHILDREN) as process:
        children = [int(pid) for pid in line_of(process.stdout).split()]
        try:
            process.kill()
            process.wait()
            for pid in children:
                os.kill(pid, 0)
            lock, until_s = RunLock(tmp_path), time.monotonic() + 30.0
            while not lock.is_held:
                try:
                    lock.take()
                except LockedError:  # a child on a busy machine lets go when its turn comes
                    assert time.monotonic() < until_s
                    time.sleep(0.05)
            lock.release()
        finally:
            for pid in children:
                os.kill(pid, signal.SIGKILL)


def test_a_fork_of_the_owner_does_not_take_the_lock_with_it(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.take()
    child = os.fork()
    if not child:
        os._exit(int(lock.is_held))
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(LockedError):  # that the child closed its copy did not let go of ours
        RunLock(tmp_path).take()
    lock.release()


def test_the_lock_of_who_made_the_folder_anew_stays(tmp_path: Path) -> None:
    """A folder that is removed under a run, and used for another one, is that one's alone."""
    old, new = RunLock(tmp_path), RunLock(tmp_path)
    old.take()
    (tmp_path / LOCK).unlink()
    new.take()
    old.release()
    with pytest.raises(LockedError):
        RunLock(tmp_path).take()
    new.release()
    assert not (tmp_path / LOCK).exists()


def test_what_a_lock_removes_lies_in_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lock = RunLock(tmp_path / "run")
    lock.take()
    file = tmp_path / "run" / "file"
    file.touch()
    inode = file.stat().st_ino
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run").mkdir()
    file.touch()
    lock.remove("file", inode)
    lock.remove("run.lock", inode)  # another one
    assert file.exists()
    assert names_in(tmp_path / "moved") == {LOCK}
    lock.release()
    lock.remove("file", inode)
    assert file.exists()


# Where the file system knows no locks


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


def leave_file(folder: Path, **fields: Any) -> Owner:
    owner = msgspec.convert({"pid": os.getpid(), "host": platform.node(), "started": 0.0} | fields, Owner)
    (folder / LOCK).write_bytes(msgspec.json.encode(owner))
    return owner


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_living_owner_decides(tmp_path: Path) -> None:
    parent = os.getppid()
    owner = leave_file(tmp_path, pid=parent, process=process_identity(parent))
    with pytest.raises(LockedError) as refused:
        RunLock(tmp_path).take()
    assert refused.value.owner == owner
    assert read_owner(tmp_path) == owner


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize(
    "left",
    [
        pytest.param({"pid": 2**22 + 1}, id="dead"),
        pytest.param({"process": "another boot 1"}, id="its number is another program's by now"),
    ],
)
def test_without_locks_a_dead_owner_is_nobody(tmp_path: Path, left: dict[str, Any]) -> None:
    leave_file(tmp_path, **left)
    lock = RunLock(tmp_path)
    lock.take()
    owner = read_owner(tmp_path)
    assert owner is not None
    assert (owner.pid, owner.process) == (os.getpid(), process_identity(os.getpid()))
    lock.release()
    assert names_in(tmp_path) == set()


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_file_that_says_nothing_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("{half")
    lock = RunLock(tmp_path)
    lock.take()
    lock.release()


@pytest.mark.usefixtures("no_locks")
def test_without_locks_who_claims_last_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two find nobody there at the same moment."""
    pwrite = os.pwrite

    def then_another(descriptor: int, data: bytes, start: int) -> int:
        pwrite(descriptor, data, start)
        other = leave_file(tmp_path, pid=os.getppid())
        return len(msgspec.json.encode(other))

    monkeypatch.setattr(os, "pwrite", then_another)
    lock = RunLock(tmp_path)
    with pytest.raises(LockedError) as refused:
        lock.take()
    assert refused.value.owner is not None
    assert (refused.value.owner.pid, lock.is_held) == (os.getppid(), False)


def test_a_lock_file_that_vanishes_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = fcntl.flock

    def remove(descriptor: int, operation: int) -> None:
        (tmp_path / LOCK).unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove)
    with pytest.raises(LockedError) as refused:
        RunLock(tmp_path).take()
    assert refused.value.owner is None


def test_what_tells_processes_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    me = process_identity(os.getpid())
    assert me == process_identity(os.getpid())
    assert me != process_identity(1)
    read = Path.read_text

    def no_proc(path: Path, **settings: Any) -> str:
        if str(path).startswith("/proc"):
            raise FileNotFoundError(path)
        return read(path, **settings)

    class Told:
        stdout = " Mon Nov 23 06:00:00 2026\n"

    monkeypatch.setattr(Path, "read_text", no_proc)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: Told())
    assert process_identity(os.getpid()) == "Mon Nov 23 06:00:00 2026"

    def no_ps(*_: object, **__: object) -> None:
        raise FileNotFoundError("ps")

    monkeypatch.setattr(subprocess, "run", no_ps)
    assert process_identity(os.getpid()) is None
    unknown = Owner(pid=os.getpid(), host=platform.node(), started=0.0, process="what /proc told then")
    assert unknown.is_alive, "when in doubt"


def test_a_program_of_another_user_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_ours(pid: int, number: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "kill", not_ours)
    assert Owner(pid=1, host=platform.node(), started=0.0).is_alive
    assert not Owner(pid=1, host="elsewhere", started=0.0).is_alive
