"""The game of several turns: its rules, its games, and a policy that learns to play it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.examples.running import EXAMPLES, imported, run_command
from troupe.environments.describing import describe

FOLDER = EXAMPLES / "higher_lower"
GAME: Any = imported("higher_lower/environment.py")


@pytest.fixture
def making(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield imported("higher_lower/make_policy.py")
    sys.modules.pop("tiny_policy", None)


def begun(low: int, high: int, secret: int) -> Any:
    game = GAME.HigherLower()
    game.reset(low=low, high=high, secret=secret, prompt=[])
    return game


def test_it_tells_what_is_left_and_is_worth_1_where_the_number_was_found() -> None:
    game = begun(11, 30, 17)
    assert [game.guess(20), game.guess(15), game.guess(40), game.guess(17)] == [
        "lower: 11 to 19",
        "higher: 16 to 19",
        "lower: 16 to 19",
        "right",
    ]
    assert game.get_reward() == 1.0
    with pytest.raises(RuntimeError, match="over"):
        game.guess(18)


def test_after_five_guesses_it_is_over() -> None:
    game = begun(1, 20, 6)
    for number in range(1, 6):
        assert game.guess(number) == f"higher: {number + 1} to 20"
    with pytest.raises(RuntimeError, match="over"):
        game.guess(6)
    assert game.get_reward() == 0.0


def test_who_halves_always_wins_and_the_teacher_answers_as_the_environment_does(making: Any) -> None:
    games, held_out = making.split_games()
    assert (len(games), len(held_out), len({*games, *held_out})) == (170, 50, 220)
    for each in [*games, *held_out]:
        played = list(making.play(each, is_careful=True))
        real = begun(each.low, each.high, each.secret)
        assert [real.guess(number) for number, _ in played] == [answer for _, answer in played]
        assert real.get_reward() == 1.0


def test_the_files_of_games_are_those_that_the_script_makes(making: Any) -> None:
    for name, games in zip(("games.jsonl", "held-out.jsonl"), making.split_games(), strict=True):
        assert (FOLDER / name).read_text(encoding="utf-8") == making.lines(games)


def test_its_method_is_the_tool() -> None:
    spec = describe(GAME.HigherLower())
    assert ([tool.name for tool in spec.tools], spec.has_reward) == (["guess"], True)


@pytest.mark.soak  # two minutes and a half: others show that such runs go on, and this one how well they learn
@pytest.mark.slow
def test_the_policy_learns_to_halve(tmp_path: Path) -> None:
    made = run_command(f"python examples/higher_lower/make_policy.py --out {tmp_path}", tmp_path)
    assert made.returncode == 0, made.stderr
    done = run_command(
        f"troupe train examples/higher_lower/run.toml -m {tmp_path / 'policy'} -o {tmp_path / 'run'}", tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (before,), (after,) = (summary[f"rewards_{when}"].values() for when in ("before", "after"))
    assert before < 0.4
    assert after >= 0.9
    assert not summary["incidents"]
