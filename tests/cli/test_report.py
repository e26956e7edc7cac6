"""The command `troupe report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.records.report.folders import make_run
from tests.records.report.pages import Page
from troupe import __main__ as program
from troupe.cli.main import main
from troupe.cli.report import ask_status, report, write_page
from troupe.daemon.control.protocol import NobodyThereError
from troupe.errors import RunError
from troupe.messages import NOT_STARTED, Refused, Status


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["report", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def test_the_page_lies_in_the_run_folder(tmp_path: Path) -> None:
    make_run(tmp_path, 2)
    assert run(tmp_path) == f"{tmp_path / 'report.html'}\n"
    assert Page((tmp_path / "report.html").read_text()).data["axes"][0]["step"] == [1, 2]
    assert run(tmp_path) == f"{tmp_path / 'report.html'}\n"  # once more, over the old one
    assert not list(tmp_path.glob(".writing-*"))


def test_or_where_one_wants_it(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 2)
    before = {path.name for path in (tmp_path / "run").iterdir()}
    run(tmp_path / "run", "--out", tmp_path / "mine.html")
    assert (tmp_path / "mine.html").is_file()
    assert {path.name for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize("name", ["run.sqlite", "run.toml", "metrics.jsonl", "page"])
def test_no_file_of_the_run_is_overwritten(tmp_path: Path, name: str) -> None:
    make_run(tmp_path, 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "ends in .html" in run(tmp_path, "--out", tmp_path / name, code=2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_cannot_be_written_is_told_with_the_way_out(tmp_path: Path) -> None:
    make_run(tmp_path, 2)
    output = run(tmp_path, "--out", tmp_path / "nowhere" / "a.html", code=2)
    assert "cannot be written" in output
    assert "--out" in output
    (tmp_path / "folder.html").mkdir()
    run(tmp_path, "--out", tmp_path / "folder.html", code=2)
    assert not list(tmp_path.glob(".writing-*"))


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    assert "no run.toml" in run(tmp_path, code=2)
    assert "no such folder" in run(tmp_path / "nowhere", code=2)


def test_text_that_no_file_takes(tmp_path: Path) -> None:
    write_page(tmp_path / "a.html", "a\ud800b")
    assert (tmp_path / "a.html").read_bytes() == b"a?b"


def test_the_program_knows_it_without_mlx(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, 1)
    monkeypatch.setattr("sys.argv", ["troupe", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        program.main()
    assert not end.value.code
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert main.load_all()["report"] is report


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (NOT_STARTED, (NOT_STARTED, [])),
        (Refused(message="no"), (None, [])),
        (NobodyThereError("nobody"), (None, [])),
        (RunError("no answer within 5 s"), (None, ["no answer within 5 s"])),
    ],
)
def test_a_run_that_gives_no_answer_is_a_note(
    tmp_path: Path, reply: Any, expected: tuple[Status | None, list[str]]
) -> None:
    def ask(folder: Path, request: object, timeout_s: float) -> Any:
        if isinstance(reply, Exception):
            raise reply
        return reply

    assert ask_status(tmp_path, ask) == expected
