"""The folder of a run: who may write there, what a start that comes to nothing leaves behind, and whether somebody has
edited its run.toml since."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from troupe.errors import FolderGoneError, OutputError
from troupe.messages import Evaluated
from troupe.records.evaluations import read_evaluations, write_evaluations
from troupe.run.config import RunConfig, load_config, write_config
from troupe.run.folder import RunFolder, is_as_written, run_folder, seal
from troupe.run.ledgers import Factories
from troupe.run.prepare import Prepared
from troupe.run.supervisor import train
from troupe.runtime.lock import LOCK, LockedError, Owner, RunLock


def config_of(folder: Path | None, **top: Any) -> RunConfig:
    return load_config(None, [{"output": str(folder)} if folder else {}, top])


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


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


def test_evaluations_of_steps_that_are_made_again_are_not_taken_for_those_of_the_new_ones(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run")
    place = RunFolder.take(config, resume=False)
    told = [Evaluated(version=version, name="a", metrics={}, rows=()) for version in (0, 10, 20)]
    write_evaluations(place.path, told)
    place.begin(config, told[:2])
    assert [each.version for each in read_evaluations(place.path)] == [0, 10]
    place.leave()


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


def test_the_commands_that_are_named_can_be_given_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "two words"
    first = RunFolder.take(config_of(folder), resume=False)
    with pytest.raises(OutputError, match=f"troupe status '{folder}'.*troupe stop '{folder}'"):
        RunFolder.take(config_of(folder), resume=False)
    first.leave()


def test_without_locks_another_machine_s_owner_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / LOCK).write_bytes(msgspec.json.encode(Owner(pid=77, host="elsewhere", started=0.0)))
    with pytest.raises(OutputError) as refused:
        RunFolder.take(config_of(tmp_path), resume=False)
    assert "another run, process 77 on the machine elsewhere, is writing in this folder, or was killed" in str(
        refused.value
    )
    assert f"if it is dead, remove {tmp_path / LOCK}" in str(refused.value)


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


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    write_config(load_config(None, [{"output": "ünusual # name", "learner": {"lr": 1e-5}}]), path)
    seal(path)
    return path


def test_what_was_written_is_as_it_was_and_says_the_same(file: Path) -> None:
    assert is_as_written(file)
    assert load_config(file).learner.lr == 1e-5


@pytest.mark.parametrize(
    ("old", "new", "is_same"),
    [
        ("lr = 1e-05", "lr = 0.00001", True),
        ("seed = 0", "# a remark\nseed =   0", True),
        ("lr = 1e-05", "lr = 1e-3", False),
        ("seed = 0\n", "", False),
        ("seed = 0", "seed = 0\nnew = 1", False),
        ("seed = 0", "seed = '", False),
        ("sha256 ", "sha256 0", False),
    ],
)
def test_edits(file: Path, old: str, new: str, is_same: bool) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")
    assert is_as_written(file) is is_same


def test_without_a_sum_or_a_file(file: Path) -> None:
    file.write_text("\n".join(file.read_text(encoding="utf-8").splitlines()[:-1]), encoding="utf-8")
    assert not is_as_written(file)
    file.write_bytes(b"\xff")
    assert not is_as_written(file)
    file.unlink()
    assert not is_as_written(file)
