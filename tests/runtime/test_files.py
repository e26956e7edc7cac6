"""A `~` that stands for nobody's home is a name like any other, and no fault."""

from __future__ import annotations

import pwd
from pathlib import Path
from typing import NoReturn

import pytest
from click.testing import CliRunner

from troupe.cli.main import main
from troupe.dataset.gym import KeptRows
from troupe.runtime.files import drafted, expanded


def test_a_home_that_there_is_not_is_left_in_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/homes/me")
    assert expanded("~/a") == Path("/homes/me/a")
    assert expanded("~nobody-of-that-name/a") == Path("~nobody-of-that-name/a")
    assert expanded("a/~") == Path("a/~")


@pytest.mark.parametrize("flag", ["-m", "-d", "--reward"])
def test_it_is_bad_input_where_there_is_no_such_file(flag: str) -> None:
    name = "~nobody-of-that-name/a.json" if flag == "-d" else "~nobody-of-that-name/a.py:f"
    result = CliRunner().invoke(main, ["train", flag, name, "--dry-run"])
    assert result.exit_code == 2, result.output
    assert "~nobody-of-that-name" in result.stderr


def test_a_user_without_a_home_keeps_no_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nobody(uid: int) -> NoReturn:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.chdir(tmp_path)
    kept = KeptRows.of("reasoning_gym:chain_sum", None)
    kept.write([{"prompt": "1 + 1"}])
    assert kept.read() is None
    assert not list(tmp_path.iterdir())


def test_a_file_is_whole_or_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for durable, text in ((False, "1"), (True, "22")):
        with drafted(path, durable=durable) as draft:
            draft.write_text(text)
            assert draft.parent == tmp_path
            assert path.exists() is durable
        assert path.read_text() == text
    with pytest.raises(UnicodeEncodeError), drafted(path) as draft:
        draft.write_text("half \ud800", encoding="utf-8")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.json", "22")]
    with pytest.raises(FileNotFoundError), drafted(tmp_path / "none" / "a"):
        pass
