"""Small whole runs in an environment: the same weights wherever it runs and however long it takes."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

import troupe
from tests.support.fakes import same_bits, tiny_config
from tests.support.games import acting, calls, write_player
from tests.support.runs import STORED, column, completions, lines, policy_of
from troupe.records.store.read import open_store
from troupe.run.evaluate import evaluate_folder
from troupe.run.result import RunResult

pytestmark = pytest.mark.no_cover


@pytest.fixture(scope="module")
def player(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_player(tmp_path_factory.mktemp("player"))


def play(model: Path, folder: Path, **settings: Any) -> RunResult:
    """4 steps × 2 prompts × 3 episodes."""
    config = tiny_config(model, folder, **STORED | acting(folder, **settings))
    return troupe.train(config, [said_length])


def said_length(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(ids) % 13 / 13 for ids in completion_ids]


@pytest.fixture(scope="module")
def plain(player: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return play(player, tmp_path_factory.mktemp("plain"))


def test_a_run_plays(plain: RunResult) -> None:
    assert plain.complete
    assert not plain.incidents
    done = completions(plain.folder)
    assert len(done) == 4 * 2 * 3
    for each in done:
        assert each.episode is not None
        turns = each.episode.turns
        assert 1 <= len(turns) <= 4
        assert each.episode.opening.messages[0]["content"].endswith(f"({each.columns['answer']})")  # type: ignore[index]
        assert each.episode.reward is not None
        for before, after in pairwise(turns):
            assert (before.stop, after.start) in each.episode.observed
    assert set(calls(Path(plain.folder).parent).values()) == {1}


@pytest.mark.slow
def test_it_learns_to_foresee_what_it_observes(player: Path, plain: RunResult, tmp_path: Path) -> None:
    run = play(player, tmp_path, learner__echo_alpha=1.0, learner__lr=5e-3, learner__lanes=2)
    nats = column(run.folder, "echo/loss")
    assert nats[-1] < nats[0] - 0.1
    assert "echo/loss" not in lines(plain.folder)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"environment__run": "loop"}, id="in the loop", marks=pytest.mark.slow),
        pytest.param({"environment__run": "process", "environment__processes": 2}, id="in processes"),
        pytest.param({"environment__concurrency": 1}, id="one after the other", marks=pytest.mark.slow),
        pytest.param(
            {"schedule__generator": "process", "schedule__generator_processes": 1}, id="generator in a process"
        ),
    ],
)
def test_wherever_it_runs_the_weights_are_the_same(
    player: Path, plain: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    monkeypatch.setenv("GAME_DELAY_S", "0.02")
    again = play(player, tmp_path, **settings)
    assert not again.incidents
    assert same_bits(policy_of(again.folder), policy_of(plain.folder))


@pytest.mark.slow
def test_a_step_behind_it_is_the_same_in_two_processes_as_in_two(player: Path, tmp_path: Path) -> None:
    settings = {
        "schedule__max_staleness": 1,
        "schedule__generator": "process",
        "schedule__generator_processes": 2,
    }
    one, other = (play(player, tmp_path / name, **settings) for name in ("one", "other"))
    assert one.complete
    assert not one.incidents
    assert same_bits(policy_of(one.folder), policy_of(other.folder))


def test_the_free_schedule_plays_too(player: Path, tmp_path: Path) -> None:
    run = play(player, tmp_path, schedule__mode="free", schedule__max_staleness=1)
    assert run.complete
    assert not run.incidents
    assert set(calls(tmp_path).values()) == {1}


FRAIL = """
from game import Game as Sound


class Game(Sound):
    def reset(self, answer, **columns):
        if answer == "1":
            raise RuntimeError("no board left")
        return super().reset(answer)

    def step(self, text):
        if len(text) % 4 == 3:
            raise RuntimeError("a move too many")
        return super().step(text)
"""


def test_an_episode_that_fails_is_missing_and_the_run_goes_on(player: Path, tmp_path: Path) -> None:
    settings = acting(tmp_path)
    (tmp_path / "frail.py").write_text(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n{FRAIL}")
    settings["environment__factory"] = f"{tmp_path / 'frail.py'}:Game"
    config = tiny_config(player, tmp_path, **STORED | settings, environment__breaker_failures=0)
    run = troupe.train(config, [said_length])
    assert run.complete
    assert set(run.incidents) == {"environment_error", "group_quarantined"}
    done = completions(run.folder)
    assert len(done) == 4 * 2 * 3
    failed = [each for each in done if each.episode is not None and each.episode.failed]
    assert {each.reward for each in failed} == {None}
    assert any("no board left" in each.episode.failed for each in failed if each.episode)
    assert any("a move too many" in each.episode.failed for each in failed if each.episode)
    assert any(each.reward is not None for each in done)


@pytest.mark.slow
def test_held_out_rows_are_played(player: Path, tmp_path: Path) -> None:
    config = tiny_config(player, tmp_path, **STORED | acting(tmp_path))
    data = msgspec.structs.replace(config.data, eval_path=config.data.path)
    config = msgspec.structs.replace(config, data=data, rewards=msgspec.structs.replace(config.rewards, functions=()))
    run = troupe.train(config)
    assert run.complete
    assert run.rewards_before.keys() == {"environment_reward"}
    assert run.rewards_before["environment_reward"] >= 1.0
    evaluating = partial(
        evaluate_folder,
        Path(run.folder) / "final",
        tmp_path / "prompts.json",
        data=config.data,
        environment=config.environment,
        max_completion_length=60,
    )
    again = anyio.run(evaluating)
    assert again.rewards == run.rewards_after
    with open_store(Path(run.folder)) as store:
        assert store.evaluated_rows(run.version, "held_out") == again.table
    sampled = anyio.run(partial(evaluating, num_samples=3, temperature=1.0))
    assert {len(row.samples) for row in sampled.table} == {3}
    assert not sampled.incidents
    assert len(set(sampled.completions)) > len(sampled.table)
