"""Files that are summed while they are written."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoint.checkpoints import disk_with_room
from troupe.checkpoint import files
from troupe.checkpoint.files import make_folders, sum_file, write_file


def test_what_goes_through_is_what_is_there(tmp_path: Path) -> None:
    calls: list[int] = []
    data = b"abc" + bytes(range(23))
    chunks: list[bytes | memoryview] = [b"", b"abc", memoryview(data)[3:]]
    entry = write_file(tmp_path / "f", chunks, lambda: calls.append(len(calls)), block_bytes=7)
    assert (tmp_path / "f").read_bytes() == data
    assert (entry.bytes, entry.sha256) == (26, hashlib.sha256(data).hexdigest())
    assert sum_file(tmp_path / "f") == entry
    assert calls == [0, 1, 2, 3], "asked before each block: 7, 7, 7 and 5 bytes"
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "f", [b"x"])


def test_a_disk_that_takes_little_at_a_time_gets_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, block: write(descriptor, block[:3]))
    write_file(tmp_path / "f", [bytes(range(10))])
    assert (tmp_path / "f").read_bytes() == bytes(range(10))


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system writes to the disk by way of its cache")
@pytest.mark.parametrize("can", [True, False])
def test_whole_blocks_go_past_the_cache_where_that_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can: bool
) -> None:
    write, writes = os.write, []

    def noted(descriptor: int, block: memoryview) -> int:
        past = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
        writes.append((len(block), past))
        if past and not can:
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(descriptor, block)

    monkeypatch.setattr(os, "write", noted)
    monkeypatch.setattr(fcntl, "fcntl", flags_of_a_file_system_that_can(fcntl.fcntl))
    data = bytes(range(256)) * 33
    entry = write_file(tmp_path / "f", [data[:5000], data[5000:]], block_bytes=4096)
    assert (tmp_path / "f").read_bytes() == data
    assert entry == sum_file(tmp_path / "f")
    whole = [(4096, True)] if can else [(4096, True), (4096, False)]
    assert writes == [*whole, *whole, (256, False)]


def flags_of_a_file_system_that_can(real: Callable[..., int]) -> Callable[..., int]:
    """O_DIRECT may be set on every file, whatever file system the tests run on."""
    direct: dict[int, bool] = {}

    def control(descriptor: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL:
            direct[descriptor] = bool(argument & os.O_DIRECT)
            return 0
        flags = real(descriptor, command, argument)
        return flags | (os.O_DIRECT if direct.get(descriptor) else 0) if command == fcntl.F_GETFL else flags

    return control


def test_a_disk_that_is_full_amid_a_block_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "write", disk_with_room(4096 + 512))
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "f", [bytes(3 * 4096)], block_bytes=4096)


def test_on_macos_the_cache_is_left_out_for_whole_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(fcntl, "F_NOCACHE", 48, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda descriptor, command, argument=0: asked.append((command, argument)))
    write_file(tmp_path / "f", [b"abcdefg"], block_bytes=4)
    assert asked == [(48, 1), (48, 0)]
    assert (tmp_path / "f").read_bytes() == b"abcdefg"


def test_new_folders_are_put_on_the_disk_with_the_one_above(tmp_path: Path) -> None:
    synced: list[Path] = []
    make_folders(tmp_path / "a" / "b", synced.append)
    assert synced == [tmp_path, tmp_path / "a", tmp_path.parent], "the name of a, of b, and of what a is in"
    make_folders(tmp_path / "a" / "b", synced.append)
    assert len(synced) == 3


def test_a_folder_above_that_is_closed_to_us_is_left_alone(tmp_path: Path) -> None:
    def sync(path: Path) -> None:
        if path == tmp_path.parent:
            raise PermissionError(13, "Permission denied")

    make_folders(tmp_path / "a", sync)
    assert (tmp_path / "a").is_dir()


@pytest.mark.parametrize("works", [True, False])
def test_where_the_system_can_flush_the_drive_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    done: list[str] = []

    def flush_drive(descriptor: int, command: int) -> None:
        done.append("drive")
        if not works:
            raise OSError(45, "Operation not supported")

    monkeypatch.setattr(files, "_go_past_the_cache", lambda *_: None)
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", flush_drive)
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append("file"))
    write_file(tmp_path / "f", [b"x"])
    assert done == (["drive"] if works else ["drive", "file"])
