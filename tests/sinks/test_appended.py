from __future__ import annotations

from pathlib import Path

import pytest

from troupe.sinks.appended import AppendedFile


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
