"""A folder that is moved, deleted or exchanged under who writes in it."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from troupe.errors import FolderGoneError
from troupe.runtime.held_folder import HeldFolder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "above" / "run").mkdir(parents=True)
    return tmp_path / "above" / "run"


def test_a_folder_in_its_place(place: Path) -> None:
    held = HeldFolder(place)
    held.check()
    (place / "file").touch()
    assert held.gone() is None
    assert held.where() == place
    assert held.identity == (place.stat().st_dev, place.stat().st_ino)
    held.close()
    held.close()
    place.joinpath("file").unlink()
    place.rmdir()
    held.check()  # nobody holds it any more
    assert held.where() is None


def test_one_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        HeldFolder(tmp_path / "no")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        HeldFolder(tmp_path / "file")


@pytest.mark.parametrize("is_made_anew", [False, True])
def test_moved(tmp_path: Path, place: Path, is_made_anew: bool) -> None:
    held = HeldFolder(place)
    place.rename(tmp_path / "new place")
    if is_made_anew:
        place.mkdir()
    with pytest.raises(FolderGoneError) as gone:
        held.check()
    told = str(gone.value)
    assert told.startswith(f"{place}: the run folder was taken away")
    assert ("another folder lies there" in told) is is_made_anew
    assert f"troupe train -o '{tmp_path / 'new place'}' --resume" in told
    assert held.where() == tmp_path / "new place"


def test_the_folder_above_moved(tmp_path: Path, place: Path) -> None:
    held = HeldFolder(place)
    (tmp_path / "above").rename(tmp_path / "beside")
    with pytest.raises(FolderGoneError, match=f"now {tmp_path / 'beside' / 'run'}"):
        held.check()
    (tmp_path / "above").touch()  # a file in the way, not a folder
    with pytest.raises(FolderGoneError, match="no folder lies there"):
        held.check()
    (tmp_path / "above").unlink()
    (tmp_path / "beside").rename(tmp_path / "above")
    held.check()


@pytest.mark.parametrize("is_made_anew", [False, True])
def test_deleted(place: Path, is_made_anew: bool) -> None:
    held = HeldFolder(place)
    shutil.rmtree(place)
    if is_made_anew:
        place.mkdir()
    with pytest.raises(FolderGoneError, match=r"probably deleted.*Put it back from a copy"):
        held.check()
    assert held.where() is None


def test_a_link_that_leads_elsewhere(tmp_path: Path, place: Path) -> None:
    (tmp_path / "other").mkdir()
    link = tmp_path / "link"
    link.symlink_to(place)
    held = HeldFolder(link)
    held.check()
    link.unlink()
    link.symlink_to(tmp_path / "other")
    with pytest.raises(FolderGoneError, match=f"another folder lies there, and the run's own is now {place}"):
        held.check()


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES, errno.ETIMEDOUT])
def test_a_file_system_that_does_not_answer_is_no_sign(
    place: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    held = HeldFolder(place)

    def fails(path: Path, **_: Any) -> os.stat_result:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", fails)
        held.check()


def test_it_takes_two_looks(place: Path) -> None:
    """A name may be away for a moment, as on a network file system while somebody replaces a link."""
    held = HeldFolder(place, sleep=lambda _: place.with_name("away").rename(place))
    place.rename(place.with_name("away"))
    held.check()


def test_one_that_is_closed_while_another_thread_looks(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, stat = HeldFolder(place), Path.stat

    def closes_first(self: Path, **settings: Any) -> os.stat_result:
        held.close()
        return stat(self, **settings)

    monkeypatch.setattr(Path, "stat", closes_first)
    held.check()
