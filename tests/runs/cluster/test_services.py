"""Rewards and environments of a real run on real workers: the weights of a run that has them here."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from tests.support.clusters import LEASE_S, Cluster, a_cluster, alone, check_same, until
from tests.support.kills import EVERY

pytestmark = [pytest.mark.alone, pytest.mark.slow]

REWARDS = {"rewards__run": ["worker"], "rewards__processes": 2, "cluster__local_parts": True}


def judge(cluster: Cluster, name: str) -> None:
    """A worker that scores joins."""
    cluster.join(name, "--offers", "rewards", "--reward", f"{cluster.config.parent / 'rewards.py'}:slow_digits")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as it goes without workers."""
    return alone(tmp_path_factory.mktemp("alone"), rewards__run=["process"])


def test_workers_that_score_and_are_killed(tmp_path: Path, whole: Path) -> None:
    dice = random.Random(3)
    with a_cluster(tmp_path, **REWARDS) as cluster:
        for name in ("worker", "other"):
            judge(cluster, name)
        for step in range(2, 20, 3):
            if not cluster.at_step(step):
                break
            name = dice.choice(("worker", "other"))
            time.sleep(dice.random() * 0.3)
            cluster.harm(name)
            judge(cluster, name)
        cluster.finish()
        check_same(cluster.out, whole)


def test_a_worker_that_stands_still_the_run_killed_and_the_server_killed(tmp_path: Path, whole: Path) -> None:
    with a_cluster(tmp_path, **REWARDS) as cluster:
        for name in ("worker", "other"):
            judge(cluster, name)
        assert cluster.at_step(2)
        cluster.harm("other", signal.SIGSTOP)
        assert cluster.at_step(4)
        time.sleep(2 * LEASE_S)
        cluster.harm("other", signal.SIGCONT)
        cluster.kill_run()
        until(lambda: cluster.server() is None, "the server ends with the run")
        cluster.start(resume=True)
        assert cluster.at_step(5 * EVERY)
        cluster.finish()
        check_same(cluster.out, whole)
