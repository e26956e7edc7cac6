"""The command `troupe runs`."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from tests.records.report.folders import finish, make_run
from troupe.cli.main import main
from troupe.cli.runs import show_runs
from troupe.records.compare.listing import ListedRun


def run(*arguments: object, code: int = 0, columns: int | None = None) -> str:
    env = {"COLUMNS": None if columns is None else str(columns)}
    result = CliRunner().invoke(main, ["runs", *map(str, arguments)], env=env)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_run(tmp_path / "kind", 3)
    make_run(tmp_path / "sums \x1b[2J", 6)
    finish(tmp_path / "kind", 3, 3, accuracy_before=0.2, accuracy_after=0.9)
    return tmp_path


def test_a_table_of_them(folder: Path) -> None:
    title, sums, kind = run(folder).splitlines()
    assert title.split() == ["run", "state", "steps", "reward", "trend", "held-out", "when", "took", "model", "seed"]
    assert sums.startswith("sums \\x1b[2J  crashed    6/12  0.1 → 0.6  ▁▁▂▂▄▄▅▅▇▇██")
    assert kind.startswith("kind")
    assert "20.0 % → 90.0 %" in kind


def test_orders(folder: Path) -> None:
    for order, first in (("name", "kind"), ("reward", "sums"), ("held-out", "kind"), ("steps", "sums")):
        assert run(folder, "--sort", order).splitlines()[1].startswith(first)


def test_json_is_an_object_a_run(folder: Path) -> None:
    told = [msgspec.json.decode(line, type=ListedRun) for line in run(folder, "--json", "--sort", "name").splitlines()]
    assert [(one.name, one.step, one.held_out) for one in told] == [
        ("kind", 3, (0.2, 0.9)),
        ("sums \x1b[2J", 6, (None, None)),
    ]


@pytest.mark.parametrize("columns", [30, 40, 60, 80, 160])
def test_no_line_is_longer_than_the_screen(folder: Path, columns: int) -> None:
    lines = run(folder, columns=columns).splitlines()
    assert max(map(len, lines)) <= max(columns, 36)
    assert lines[0].split()[:2] == ["run", "state"]
    assert ("reward" in lines[0]) == (columns >= 40)
    assert ("model" in lines[0]) == (columns == 160)


def test_what_cannot_be_read_is_a_line(folder: Path) -> None:
    (folder / "kind" / "run.toml").write_text("=", encoding="utf-8")
    *_, note = run(folder).splitlines()
    assert note.startswith("kind: ")
    assert "not valid TOML" in note
    gone = ListedRun(name="gone", folder="/gone", state=None, note="/gone: there is no such folder")
    assert show_runs([gone], 80, 0.0)[1] == "gone  damaged: /gone: there is no such folder"


def test_no_runs(tmp_path: Path) -> None:
    assert "there is no run in this folder" in run(tmp_path)
    assert "no such folder" in run(tmp_path / "nowhere", code=2)


def test_hundreds_are_quick(tmp_path: Path) -> None:
    make_run(tmp_path / "run-0", 3)
    for number in range(1, 100):
        (tmp_path / f"run-{number}").mkdir()
        for file in ("run.toml", "run.sqlite", "metrics.jsonl"):
            (tmp_path / f"run-{number}" / file).hardlink_to(tmp_path / "run-0" / file)
    began = time.process_time()
    assert len(run(tmp_path).splitlines()) == 101
    assert time.process_time() - began < 1.0, "500 in 2 s, with room for a slow machine"
