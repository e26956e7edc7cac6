"""The folder of a run: who may write there, and what a start that comes to nothing leaves behind."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
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
from troupe.errors import FolderGoneError, OutputError
from troupe.run.config import RunConfig, load_config
from troupe.run.factories import Factories
from troupe.run.folder import RunFolder, run_folder
from troupe.run.prepare import Prepared
from troupe.run.supervisor import train
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


def config_of(folder: Path | None, **top: Any) -> RunConfig:
    return load_config(None, [{"output": str(folder)} if folder else {}, top])


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


# The lock


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


# Where the file system knows no locks


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
    with pytest.raises(OutputError, match="another run is writing in this folder"):
        RunFolder.take(config_of(tmp_path), resume=False)


def test_the_commands_that_are_named_can_be_given_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "two words"
    first = RunFolder.take(config_of(folder), resume=False)
    with pytest.raises(OutputError, match=f"troupe status '{folder}'.*troupe stop '{folder}'"):
        RunFolder.take(config_of(folder), resume=False)
    first.leave()


@pytest.mark.usefixtures("no_locks")
def test_without_locks_another_machine_s_owner_is_believed(tmp_path: Path) -> None:
    leave_file(tmp_path, host="elsewhere", pid=77)
    with pytest.raises(OutputError) as refused:
        RunFolder.take(config_of(tmp_path), resume=False)
    assert "another run, process 77 on the machine elsewhere, is writing in this folder, or was killed" in str(
        refused.value
    )
    assert f"if it is dead, remove {tmp_path / LOCK}" in str(refused.value)


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


# The folder


def test_run_folders_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_of(None, data={"path": "sums.jsonl"})
    assert run_folder(config, resume=False) == tmp_path / "runs" / "sums-001"
    for name in ("sums-001", "sums-007", "sums-x", "sums-hard-012", "sums-12"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert run_folder(config, resume=False) == tmp_path / "runs" / "sums-008"
    assert run_folder(config_of(None), resume=False) == tmp_path / "runs" / "run-001"


def test_folders_that_may_be_used(tmp_path: Path) -> None:
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.mkdir()
    full.mkdir()
    (full / "run.toml").write_text("")
    for folder, resume in ((empty, False), (tmp_path / "new", False), (full, True)):
        assert run_folder(config_of(folder), resume=resume) == folder
    with pytest.raises(OutputError, match="is not empty"):
        run_folder(config_of(full), resume=False)
    (full / "run.toml").rename(full / "thesis.txt")
    with pytest.raises(OutputError, match="no run to go on with"):
        run_folder(config_of(full), resume=True)
    with pytest.raises(OutputError, match="this is a file"):
        run_folder(config_of(full / "thesis.txt"), resume=False)
    with pytest.raises(OutputError, match="nothing to resume"):
        run_folder(config_of(None), resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_what_others_need_of_a_folder_and_a_killed_start_left_there_is_no_run(tmp_path: Path, resume: bool) -> None:
    for name in (LOCK, "control.sock", "control.path", "page.url", "daemon.log", "daemon.log.3", ".writing-run.toml"):
        (tmp_path / name).write_text("")
    assert run_folder(config_of(tmp_path), resume=resume) == tmp_path
    place = RunFolder.take(config_of(tmp_path), resume=resume)
    place.remove_traces()
    place.leave()
    assert names_in(tmp_path) == {
        "control.sock",
        "control.path",
        "page.url",
        "daemon.log",
        "daemon.log.3",
        ".writing-run.toml",
    }


def test_a_folder_is_taken_made_ready_and_left(tmp_path: Path) -> None:
    config = config_of(tmp_path / "a" / "run", seed=5)
    place = RunFolder.take(config, resume=False)
    assert names_in(place.path) == {LOCK}
    place.begin(config)
    assert names_in(place.path) == {LOCK, "run.toml"}
    place.leave()
    assert names_in(place.path) == {"run.toml"}
    assert load_config(place.path / "run.toml") == config


def test_a_second_start_is_refused_with_the_first_one_s_process_and_touches_nothing(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run")
    place = RunFolder.take(config, resume=False)
    place.begin(config)
    before = {path: path.read_bytes() for path in place.path.iterdir()}
    with pytest.raises(OutputError) as refused:
        RunFolder.take(config_of(tmp_path / "run", seed=9), resume=True)
    assert str(refused.value) == (
        f"{tmp_path / 'run'}: another run, process {os.getpid()}, is writing in this folder; wait until it has ended "
        f"(troupe status {tmp_path / 'run'}), end it (troupe stop {tmp_path / 'run'}), or give another folder"
    )
    with pytest.raises(OutputError, match="is not empty"):
        RunFolder.take(config, resume=False)
    assert {path: path.read_bytes() for path in place.path.iterdir()} == before
    place.leave()
    RunFolder.take(config, resume=True).leave()


def test_a_second_start_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    def load(*_: object, **__: object) -> Prepared:
        raise AssertionError("something is loaded")

    factories = Factories(prepare=load)
    place = RunFolder.take(config_of(tmp_path), resume=False)
    with pytest.raises(OutputError, match="another run, process"):
        train(config_of(tmp_path), factories=factories)
    place.leave()
    with pytest.raises(AssertionError, match="something is loaded"):
        train(config_of(tmp_path), factories=factories)
    assert names_in(tmp_path) == set()


def test_a_lock_that_says_nothing_yet(tmp_path: Path) -> None:
    place = RunFolder.take(config_of(tmp_path), resume=False)
    (tmp_path / LOCK).write_text("")
    with pytest.raises(OutputError, match="another run is writing in this folder"):
        RunFolder.take(config_of(tmp_path), resume=False)
    place.leave()


@pytest.mark.parametrize("depth", ["new", "empty", "numbered"])
def test_a_start_that_comes_to_nothing_leaves_the_disk_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    folder = {"new": tmp_path / "deep" / "er" / "run", "empty": tmp_path / "empty", "numbered": None}[depth]
    place = RunFolder.take(config_of(folder), resume=False)
    place.begin(config_of(folder))
    (place.path / "checkpoints").mkdir()
    (place.path / "checkpoints" / "x").write_text("")
    place.remove_traces()
    with pytest.raises(OutputError, match="another run, process"):  # until it is left
        RunFolder.take(config_of(place.path), resume=False)
    place.leave()
    place.leave()
    place.remove_traces()
    assert names_in(tmp_path) == {"empty"}
    assert names_in(tmp_path / "empty") == set()


def test_an_earlier_start_of_the_run_is_no_trace(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("seed = 1\n")
    place = RunFolder.take(config_of(tmp_path), resume=True)
    place.remove_traces()
    place.leave()
    assert names_in(tmp_path) == {"run.toml"}


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="the output folder cannot be written"):
        RunFolder.take(config_of(tmp_path / "file" / "run"), resume=False)
    place = RunFolder.take(config_of(tmp_path / "run"), resume=False)

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("troupe.run.folder.write_config", no_room)
        with pytest.raises(OutputError, match="No space left"):
            place.begin(config_of(tmp_path / "run"))
    place.remove_traces()
    place.leave()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", no_room)
        with pytest.raises(OutputError, match="No space left"):
            RunFolder.take(config_of(tmp_path / "run"), resume=False)
    assert names_in(tmp_path) == {"file", "run"}, "the lock's own file, half made, is nobody's"
    RunFolder.take(config_of(tmp_path / "run"), resume=False).leave()


def test_a_killed_start_leaves_the_old_config_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = config_of(tmp_path, seed=1), config_of(tmp_path, seed=2)
    place = RunFolder.take(old, resume=False)
    place.begin(old)

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(Killed):
            place.begin(new)
    assert load_config(tmp_path / "run.toml") == old
    place.begin(new)
    assert load_config(tmp_path / "run.toml") == new
    assert names_in(tmp_path) == {LOCK, "run.toml"}
    place.leave()


def _start(folder: str, gate: Any, taken: Any) -> None:
    os.chdir(folder)
    gate.wait()
    place = RunFolder.take(config_of(None, data={"path": "sums.json"}), resume=False)
    taken.put(place.path.name)
    gate.wait()
    place.leave()


@pytest.mark.slow
def test_simultaneous_starts_get_folders_of_their_own(tmp_path: Path) -> None:
    starts = 6
    context = multiprocessing.get_context("spawn")
    gate, taken = context.Barrier(starts), context.Queue()
    processes = [context.Process(target=_start, args=(str(tmp_path), gate, taken)) for _ in range(starts)]
    for process in processes:
        process.start()
    names = sorted(taken.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(timeout=120)
    assert names == [f"sums-{number:03d}" for number in range(1, starts + 1)]
    assert names_in(tmp_path / "runs") == set(names)


def test_a_number_that_somebody_else_takes_at_the_same_moment_is_left_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mkdir = Path.mkdir

    def first_another(path: Path, **settings: Any) -> None:
        if path.name == "run-001":
            mkdir(path)
        mkdir(path, **settings)

    monkeypatch.setattr(Path, "mkdir", first_another)
    place = RunFolder.take(config_of(None), resume=False)
    assert place.path.name == "run-002"
    place.remove_traces()
    place.leave()
    assert names_in(tmp_path / "runs") == {"run-001"}


def test_a_folder_that_began_while_it_was_taken_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run began and ended between the look and the lock."""
    take = RunLock.take

    def late(lock: RunLock) -> None:
        (tmp_path / "run.toml").write_text("seed = 1\n")
        take(lock)

    monkeypatch.setattr(RunLock, "take", late)
    with pytest.raises(OutputError, match="is not empty"):
        RunFolder.take(config_of(tmp_path), resume=False)
    assert names_in(tmp_path) == {"run.toml"}


def test_a_folder_that_is_removed_while_it_is_taken_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = RunLock.take

    def after_removal(lock: RunLock) -> None:
        monkeypatch.setattr(RunLock, "take", take)
        (tmp_path / "run").rmdir()
        take(lock)

    monkeypatch.setattr(RunLock, "take", after_removal)
    place = RunFolder.take(config_of(tmp_path / "run"), resume=False)
    assert names_in(tmp_path / "run") == {LOCK}
    place.leave()


# A folder that is taken away


def test_the_lock_goes_with_a_folder_that_is_moved(tmp_path: Path) -> None:
    place = RunFolder.take(config_of(tmp_path / "run"), resume=False)
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(LockedError):
        RunLock(tmp_path / "moved").take()
    assert place.gone() is not None
    place.leave()
    assert names_in(tmp_path) == {"moved"}
    assert names_in(tmp_path / "moved") == set()
    assert place.gone() is None


def test_nothing_is_begun_where_another_folder_lies_now(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run")
    place = RunFolder.take(config, resume=False)
    (tmp_path / "run").rename(tmp_path / "moved")
    other = tmp_path / "run"
    other.mkdir()
    (other / "precious").touch()
    with pytest.raises(FolderGoneError):
        place.begin(config)
    place.remove_traces()
    place.leave()
    assert names_in(other) == {"precious"}
    assert names_in(tmp_path / "moved") == set()


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
