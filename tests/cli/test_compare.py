"""The commands that set runs beside each other: `troupe compare`, and `troupe report` of several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.records.compare.runs import evaluated, make_run
from tests.records.report.pages import Page
from troupe.cli.main import main

PROMPTS = [f"{number}+1=" for number in range(8)]


def run(*arguments: object, code: int = 0, columns: int | None = None) -> str:
    env = {"COLUMNS": None if columns is None else str(columns)}
    result = CliRunner().invoke(main, [*map(str, arguments)], env=env)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two seeds, and a run with another rate that is better on held-out rows."""
    for name, seed, rate, score in (("a/seed-1", 1, 0.1, 0.0), ("a/seed-2", 2, 0.1, 0.0), ("fast", 1, 0.5, 1.0)):
        asked = [evaluated(version, dict.fromkeys(PROMPTS, (score * version / 4,))) for version in (0, 4)]
        rewards = [0.1, 0.2, 0.3, rate + seed / 100]
        make_run(tmp_path / name, rewards, settings={"seed": seed, "learner": {"lr": rate}}, evaluations=asked)
    return tmp_path


def test_what_differs_and_what_came_of_it(folder: Path) -> None:
    told = run("compare", folder).splitlines()
    assert told[0].split()[:3] == ["run", "state", "steps"]
    assert [line.split()[0] for line in told[1:5]] == ["seed-1", "seed-2", "seed-*", "fast"]
    assert "0.115 (0.11–0.12)" in told[3]
    settings = told[told.index("Settings that differ") + 1 :]
    assert [line.split() for line in settings[:3]] == [
        ["seed-*", "fast"],
        ["seed", "1,", "2", "1"],
        ["learner.lr", "0.1", "0.5"],
    ]
    fast = told[-1]
    assert fast.split()[0] == "fast"
    assert "+1.000" in fast
    assert "more than noise: p = 0.0078, exact sign test over 8 rows; 8 rows better, 0 worse, 0 equal" in fast


def test_the_same_as_json(folder: Path) -> None:
    told = json.loads(run("compare", folder / "fast", folder / "a" / "seed-1", "--json", "--reach", "0.25"))
    assert told["settings"] == {"learner.lr": [0.5, 0.1]}
    assert [one["name"] for one in told["groups"]] == ["fast", "seed-1"]
    assert told["level"]["reward"] == 0.25
    fast, seed = told["runs"]
    assert (fast["reward"]["reached_step"], seed["reward"]["reached_step"]) == (3, 3)
    assert seed["against_first"]["sums"]["difference"] == -1.0
    assert not fast["against_first"]


def test_narrow_screens(folder: Path) -> None:
    lines = run("compare", folder, columns=20).splitlines()
    assert lines[0].split() == ["run", "last"]
    assert "learner.lr" in lines
    assert "  0.5: fast" in lines


def test_several_runs_are_one_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert run("report", "a", "fast") == "compare.html\n"
    page = Page((folder / "compare.html").read_text())
    assert page.data["runs"] == ["seed-1", "seed-2", "fast"]
    assert page.data["bands"] == ["seed-*"]
    assert "learner.lr" in page.visible
    assert "more than noise" in page.visible
    assert {one["source"] for one in page.data["prompts"]} == {"sums", "training"}
    assert run("report", "a/seed-1", "fast", "-o", "two.html") == "two.html\n"
    assert run("report", "fast") == "fast/report.html\n"


def test_what_is_refused(folder: Path) -> None:
    fast = folder / "fast"
    assert "give two runs or more" in run("compare", fast, code=2)
    assert "named twice" in run("compare", fast, folder / "a" / ".." / "fast", code=2)
    assert "no such folder" in run("compare", fast, folder / "nowhere", code=2)
    assert "--png" in run("report", fast, folder / "a", "--png", "-o", folder / "x.html", code=2)
    assert "ends in .html" in run("report", fast, folder / "a", "-o", folder / "x.toml", code=2)
    assert not (folder / "x.html").exists()


def test_one_that_is_damaged_is_a_note(folder: Path) -> None:
    (folder / "fast" / "run.sqlite").write_bytes(b"no store" * 100)
    assert "fast: " in run("compare", folder)
    run("report", folder, "-o", folder / "x.html")
    assert "run.sqlite" in Page((folder / "x.html").read_text()).visible
