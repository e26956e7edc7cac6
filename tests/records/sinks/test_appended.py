from __future__ import annotations

from pathlib import Path

import pytest

from troupe.errors import FolderGoneError
from troupe.records.sinks.jsonl import AppendedFile


def test_records_are_there_after_a_flush_and_follow_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "records"
    path.write_bytes(b"old,")
    file = AppendedFile(path)
    file.add(b"one,")
    file.flush()  # not open: it waits
    file.settle()
    file.open()
    assert path.read_bytes() == b"old,"
    file.add(b"two,")
    file.flush()
    assert path.read_bytes() == b"old,one,two,"
    file.settle()
    assert file.is_open
    file.add(b"never")
    file.close()
    file.close()
    assert path.read_bytes() == b"old,one,two,"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    file = AppendedFile(tmp_path / "no" / "records")
    with pytest.raises(FileNotFoundError):
        file.open()
    assert not file.is_open


def opened(path: Path, losses: list[int]) -> AppendedFile:
    file = AppendedFile(path, lambda: losses.append(1))
    file.open()
    file.add(b"one,")
    file.flush()
    return file


def test_a_file_that_is_removed_or_exchanged_is_opened_again_and_told(tmp_path: Path) -> None:
    path, losses = tmp_path / "records", list[int]()
    file = opened(path, losses)
    path.unlink()
    file.add(b"two,")
    file.flush()
    assert (path.read_bytes(), losses) == (b"two,", [1])
    path.rename(tmp_path / "kept")
    path.write_bytes(b"other,")
    file.add(b"three,")
    file.flush()
    assert (path.read_bytes(), losses) == (b"other,three,", [1, 1])
    file.close()


def test_one_that_is_cut_goes_on_where_it_ends_now(tmp_path: Path) -> None:
    """Not after a hole of zeros."""
    path, losses = tmp_path / "records", list[int]()
    file = opened(path, losses)
    path.write_bytes(b"o")
    file.add(b"two,")
    file.flush()
    assert (path.read_bytes(), losses) == (b"otwo,", [1])
    file.close()


def test_it_goes_with_a_folder_that_is_moved(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    losses: list[int] = []
    file = opened(tmp_path / "run" / "records", losses)
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run").mkdir()
    file.add(b"two,")
    file.flush()
    file.settle()
    assert ((tmp_path / "moved" / "records").read_bytes(), losses) == (b"one,two,", [])
    (tmp_path / "moved" / "records").unlink()
    file.add(b"three,")
    file.flush()
    assert ((tmp_path / "moved" / "records").read_bytes(), losses) == (b"three,", [1])
    assert list((tmp_path / "run").iterdir()) == []
    file.close()


def test_a_folder_that_is_deleted_is_no_disk_that_may_come_back(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    file = opened(tmp_path / "run" / "records", [])
    (tmp_path / "run" / "records").unlink()
    (tmp_path / "run").rmdir()
    file.add(b"two,")
    with pytest.raises(FolderGoneError):
        file.flush()
    file.close()
