"""Files of weights: whole or absent, gone when nobody needs them, never left behind."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from tests.support.fakes import same_bits
from troupe.actors.generator import weights_files
from troupe.actors.generator.locked_folder import free_bytes, remove_leftovers
from troupe.actors.generator.weights_files import WeightsFiles
from troupe.errors import RunError

WEIGHTS = {"a": mx.array([[1.0, -2.5], [3.0, 1e-30]]), "b": mx.array([1, 2, 3]).astype(mx.bfloat16)}


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    folder = tmp_path / "memory"
    folder.mkdir()
    return folder


@pytest.fixture
def files(tmp_path: Path, memory: Path) -> WeightsFiles:
    (tmp_path / "run").mkdir()
    return WeightsFiles(tmp_path / "run", at_once=2, shared_memory=memory)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.safetensors"))


def test_a_file_holds_the_same_bits(files: WeightsFiles, memory: Path) -> None:
    path = files.write(3, WEIGHTS)
    loaded = mx.load(str(path))
    assert isinstance(loaded, dict)
    assert same_bits(loaded, WEIGHTS)
    assert path.is_relative_to(memory)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    files.close()
    assert list(memory.iterdir()) == []
    files.close()


def test_a_version_is_written_once(files: WeightsFiles) -> None:
    path = files.write(0, WEIGHTS)
    before = path.stat()
    assert files.write(0, WEIGHTS) == path
    assert path.stat() == before
    files.close()


def test_a_file_goes_when_it_is_not_kept_and_nobody_reads_it(files: WeightsFiles, memory: Path) -> None:
    files.keep([0, 1])
    for version in (0, 1):
        files.lend(version)
        files.lend(version)
        files.write(version, WEIGHTS)
    files.keep([1, 2])
    assert names(memory) == ["00000000.safetensors", "00000001.safetensors"], "two still read the first"
    files.give_back(0)
    files.give_back(1)
    assert names(memory) == ["00000000.safetensors", "00000001.safetensors"]
    files.give_back(0)
    assert names(memory) == ["00000001.safetensors"]
    files.give_back(1)
    assert names(memory) == ["00000001.safetensors"], "it may be asked for again"
    files.keep([])
    assert names(memory) == []
    files.close()


def test_the_run_folder_serves_where_memory_has_no_room(files: WeightsFiles, tmp_path: Path, memory: Path) -> None:
    files.free = lambda place: 100 if place == memory else 10**12
    assert files.write(0, WEIGHTS).is_relative_to(tmp_path / "run")
    assert list(memory.iterdir()) == []
    files.close()
    assert list((tmp_path / "run").iterdir()) == []


def test_no_room_anywhere_is_told_before_anything_is_written(files: WeightsFiles, tmp_path: Path) -> None:
    files.free = lambda place: 100
    with pytest.raises(RunError, match=r"8\.2e-07 GB are needed, but .*memory has 1e-07 GB .*schedule\.generator"):
        files.write(0, WEIGHTS)
    assert names(tmp_path) == []


def test_room_that_is_gone_later_is_told_and_leaves_no_half_file(
    monkeypatch: pytest.MonkeyPatch, files: WeightsFiles, tmp_path: Path
) -> None:
    files.write(0, WEIGHTS)
    files.free = lambda place: 100
    with pytest.raises(RunError, match=r"00000001\.safetensors: .* could not be written: 4\.1e-07 GB are needed"):
        files.write(1, WEIGHTS)
    files.free = free_bytes

    faults: list[Exception] = [OSError(errno.ENOSPC, "No space left"), RuntimeError("the card is gone")]

    def break_off(weights: object) -> Iterator[bytes]:
        yield b"half"
        raise faults.pop(0)

    monkeypatch.setattr(weights_files, "safetensors_chunks", break_off)
    for reason in ("No space left", "the card is gone"):
        with pytest.raises(RunError, match=reason):
            files.write(1, WEIGHTS)
    assert names(tmp_path) == ["00000000.safetensors"]
    files.close()


LEAVE = """
import os, signal, sys
from pathlib import Path
import troupe
import mlx.core as mx
from troupe.actors.generator.weights_files import WeightsFiles
files = WeightsFiles(Path(sys.argv[1]), at_once=1, shared_memory=Path(sys.argv[2]))
print(files.write(0, {"a": mx.array([1.0])}), flush=True)
if sys.argv[3] == "die":
    os.kill(os.getpid(), signal.SIGKILL)
sys.stdin.read()
"""


def test_leftovers_of_the_dead_are_removed_and_nothing_of_the_living(tmp_path: Path, memory: Path) -> None:
    command = [sys.executable, "-c", LEAVE, str(tmp_path), str(memory)]
    subprocess.run([*command, "die"], stdout=subprocess.DEVNULL, check=False, timeout=120)
    (dead,) = memory.iterdir()
    (tmp_path / "troupe-weights-there").mkdir()
    other = memory / "something else"
    other.mkdir()
    with subprocess.Popen([*command, "live"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as living:
        assert living.stdout is not None
        path = Path(living.stdout.readline().strip())
        remove_leftovers(memory, tmp_path)
        assert path.is_file()
        assert not dead.exists()
        assert not (tmp_path / "troupe-weights-there").exists()
        assert other.exists()
        living.kill()
    remove_leftovers(memory, tmp_path)
    assert list(memory.iterdir()) == [other]


def test_places_that_are_not_there_hold_no_leftovers(tmp_path: Path) -> None:
    remove_leftovers(tmp_path / "no memory", tmp_path / "no run")


def test_a_folder_that_was_taken_for_a_leftover_is_made_anew(
    monkeypatch: pytest.MonkeyPatch, files: WeightsFiles, memory: Path
) -> None:
    real, opened = os.open, []

    def open_late(path: Path, flags: int) -> int:
        number = real(path, flags)
        opened.append(path)
        if len(opened) == 1:
            path.rmdir()  # by a run that starts at the same moment
        return number

    monkeypatch.setattr(os, "open", open_late)
    assert files.write(0, WEIGHTS).is_file()
    assert len(opened) == 2
    files.close()


def test_a_folder_that_another_run_is_about_to_remove_is_left_to_it(
    monkeypatch: pytest.MonkeyPatch, files: WeightsFiles, memory: Path
) -> None:
    real, others = fcntl.flock, list[int]()

    def lock_late(descriptor: int, how: int) -> None:
        if not others:
            (folder,) = memory.iterdir()
            others.append(os.open(folder, os.O_RDONLY))
            real(others[0], fcntl.LOCK_EX)  # by a run that starts at the same moment, and has not removed it yet
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    path = files.write(0, WEIGHTS)
    monkeypatch.undo()
    (taken,) = (folder for folder in memory.iterdir() if folder != path.parent)
    assert list(taken.iterdir()) == []
    os.close(others[0])
    remove_leftovers(memory)
    assert list(memory.iterdir()) == [path.parent], "what is in use is locked"
    files.close()


def test_a_file_system_without_locks_serves(monkeypatch: pytest.MonkeyPatch, files: WeightsFiles, memory: Path) -> None:
    def no_locks(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert files.write(0, WEIGHTS).is_file()
    files.close()
