"""`troupe inspect --rows`: what became of each row of the dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from tests.support.stored import closed, update
from troupe.cli.main import main
from troupe.messages import GroupClosed
from troupe.records.layout import STORE
from troupe.records.sinks.sqlite import SqliteSink


def of_row(step: int, place: int, row: int, *scores: float | None) -> GroupClosed:
    """Rewards are twice the scores."""
    message = closed(step, place, scores)
    assert message.scored is not None
    prompt = msgspec.structs.replace(message.scored.group.prompt, row=row, prompt=f"What is\n{row}?")
    group = msgspec.structs.replace(message.scored.group, prompt=prompt)
    return msgspec.structs.replace(message, scored=msgspec.structs.replace(message.scored, group=group))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sink = SqliteSink(tmp_path / STORE, program="0.9")
    sink.open()
    steps: list[list[tuple[int, tuple[float | None, ...]]]] = [
        [(4, (0.0, 0.0)), (9, (0.5, 0.5))],
        [(4, (0.0, 0.25)), (7, (0.25, 0.0))],
        [(4, (0.25, 0.5)), (7, (None, None))],
    ]
    for step, groups in enumerate(steps, 1):
        for place, (row, scores) in enumerate(groups):
            sink.write(of_row(step, place, row, *scores))
        sink.write(update(step))
    sink.flush()
    sink.close()
    return tmp_path


def run(folder: Path, *options: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["inspect", str(folder), "--rows", *options])
    assert result.exit_code == code, result.output
    return result.output


def objects(folder: Path, *options: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(folder, *options, "--json").splitlines()]


def test_every_row_has_its_groups_its_rates_and_its_pool(folder: Path) -> None:
    fourth = objects(folder, "--sort", "row")[0]
    assert fourth["prompt"] == "What is\n4?"
    assert {name: fourth[name] for name in ("row", "groups", "first_step", "newest_step", "pool")} == {
        "row": 4, "groups": 3, "first_step": 1, "newest_step": 3, "pool": "normal",
    }  # fmt: skip
    rates = (fourth["first_pass_rate"], fourth["pass_rate"], fourth["newest_pass_rate"])
    assert rates == pytest.approx((0.0, 1.0 / 3, 0.75))
    assert (fourth["reward"], fourth["without_signal"]) == pytest.approx((1.0 / 3, 1 / 3))
    assert [(found["row"], found["pool"]) for found in objects(folder)] == [(7, "normal"), (4, "normal"), (9, "easy")]
    assert objects(folder, "--sort", "row")[1]["newest_pass_rate"] == 0.25, "of a group that has scores"


def test_the_runs_own_settings_say_what_passes(folder: Path) -> None:
    (folder / "run.toml").write_text(
        "[curriculum]\nenabled = true\npasses_from = 1.0\nretire_at = 0.9\nretire_after = 1\n"
    )
    pools = {found["row"]: (found["pass_rate"], found["pool"]) for found in objects(folder)}
    assert pools == {4: (pytest.approx(1 / 6), "hard"), 7: (0.0, "hard"), 9: (1.0, "retired")}
    by_score = {found["row"]: found["pool"] for found in objects(folder, "--reward", "r")}
    assert by_score == {4: "hard", 7: "hard", 9: "hard"}, "scores are half of the rewards"


def test_a_person_sees_a_line_a_row_and_how_many_are_left(folder: Path) -> None:
    shown = run(folder, "--limit", "2", "--sort", "groups")
    assert shown.splitlines()[0] == "3 rows were seen: 1 easy, 2 normal"
    assert "What is 4?" in shown
    assert "1 more" in shown
    assert "\n  9" not in shown


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--rows", "--best", "2"], "--rows: of the other options"),
        (["--rows", "--reward", "none"], "has no such reward"),
        (["--limit", "2"], "--limit: this goes with --rows"),
        (["--sort", "row"], "--sort: this goes with --rows"),
    ],
)
def test_options_that_do_not_go_together_are_refused(folder: Path, options: list[str], says: str) -> None:
    result = CliRunner().invoke(main, ["inspect", str(folder), *options])
    assert (result.exit_code, says in result.output) == (2, True), result.output
