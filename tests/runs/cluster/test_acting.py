"""A run that acts in environments on workers: the weights of one that has them in its own event loop, whatever becomes
of workers."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.clusters import Cluster, a_cluster, alone, final_hash
from tests.support.fakes import write_prompts
from tests.support.games import acting, write_player
from tests.support.runs import in_store, lines, timeless

pytestmark = [pytest.mark.alone, pytest.mark.slow]

STEPS = 24
REWARD = """
def shares(completion_ids, **_):
    return [sum(ids) % 13 / 13 for ids in completion_ids]
"""


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    """Of a run that plays the game."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "shares.py").write_text(REWARD)
    return {
        "model__path": str(write_player(folder / "player")),
        "data__path": str(write_prompts(folder / "prompts.json")),
        "generation__num_generations": 3,
        "rewards__functions": ["shares.py:shares"],
        "learner__lr": 1e-2,
        "learner__batch_size": 4,
        "learner__max_steps": STEPS,
        **acting(folder, **more),
    }


def play_for(cluster: Cluster, name: str) -> None:
    """A worker that has the environments joins."""
    game = cluster.config.parent / "game.py"
    cluster.join(name, "--offers", "environments", "--environment", f"{game}:Game")


def figures(out: Path) -> list[dict[str, Any]]:
    """Of every step, without what the clock says."""
    return [timeless({**line, "environments/wait_s": 0.0}) for line in lines(out)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as it goes without workers."""
    folder = tmp_path_factory.mktemp("alone")
    return alone(folder, **settings(folder, environment__run="loop"))


@pytest.mark.soak
def test_workers_with_environments_are_killed_amid_episodes(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GAME_DELAY_S", "0.1")
    dice, killed = random.Random(11), 0
    more = settings(tmp_path, environment__run="worker", environment__processes=3)
    with a_cluster(tmp_path, cluster__local_parts=True, **more) as cluster:
        for name in ("worker", "other"):
            play_for(cluster, name)
        while cluster.goes_on:
            for name in dice.sample(("worker", "other"), 2):
                if killed < 4 and cluster.at_work(name):
                    time.sleep(dice.random() * 0.6)
                    if cluster.goes_on:
                        cluster.harm(name)
                        killed += 1
                        play_for(cluster, name)
            time.sleep(0.1)
        cluster.finish()
        assert final_hash(cluster.out) == final_hash(whole)
        assert figures(cluster.out) == figures(whole)
        ends = [gid for (gid,) in in_store(cluster.out, "SELECT gid FROM groups")]
        assert len(ends) == len(set(ends)) == STEPS * 4
    assert killed >= 3
