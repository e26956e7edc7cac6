"""Names of run folders: those that are none are bad input."""

from __future__ import annotations

from pathlib import Path

import pytest

from troupe.errors import OutputError
from troupe.run.folder_names import run_folder_named


def test_names_become_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert run_folder_named("runs/ü 'x'\n%n") == tmp_path / "runs" / "ü 'x'\n%n"
    assert run_folder_named("~/run") == Path("/home/me/run")
    assert run_folder_named(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("a" * 300, "File name too long"),
        ("~nobody-is-called-so/run", "home directory"),
        ("run-\udcff", "surrogates not allowed"),
        ("run\0", "null byte"),
        ("", "is empty"),
    ],
)
def test_what_no_folder_can_be_called(name: str, problem: str) -> None:
    with pytest.raises(OutputError, match=problem):
        run_folder_named(name)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="this is a file"):
        run_folder_named(str(tmp_path / "file"))
    assert run_folder_named(str(tmp_path / "file" / "below")) == tmp_path / "file" / "below", "for mkdir to refuse"
