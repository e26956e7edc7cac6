"""Rewards and environments of a real run on real workers: the weights of a run that has them here."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.clusters import LEASE_S, Cluster, a_cluster, alone, check_each_once, final_hash, until
from tests.support.kills import read_store
from tests.support.runs import lines, timeless

pytestmark = [pytest.mark.alone, pytest.mark.slow]

STEPS = 60
ALL: dict[str, Any] = {"learner__max_steps": STEPS, "rewards__processes": 2}
SERVED: dict[str, Any] = {**ALL, "rewards__run": ["worker"], "cluster__local_parts": True}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as it goes without workers."""
    return alone(tmp_path_factory.mktemp("alone"), rewards__run=["process"], **ALL)


def judge(cluster: Cluster, name: str) -> None:
    """A worker that scores joins."""
    cluster.join(name, "--offers", "rewards", "--reward", f"{cluster.config.parent / 'rewards.py'}:slow_digits")


def at_work(cluster: Cluster) -> str:
    """Wait until a worker has processes → its name."""
    names = list(cluster.workers)
    until(lambda: any(map(cluster.at_work, names)) or not cluster.goes_on, "a worker at work")
    return next(name for name in names if cluster.at_work(name))


def check(out: Path, whole: Path) -> None:
    """The same weights, figures, scores and ends of groups, each once."""
    assert final_hash(out) == final_hash(whole)
    assert [timeless(line) for line in lines(out)] == [timeless(line) for line in lines(whole)]
    assert read_store(out) == read_store(whole)
    check_each_once(out, STEPS)


@pytest.mark.soak
def test_workers_that_score_and_are_killed(tmp_path: Path, whole: Path) -> None:
    dice, killed = random.Random(3), 0
    with a_cluster(tmp_path, **SERVED) as cluster:
        for name in ("worker", "other"):
            judge(cluster, name)
        while cluster.goes_on and killed < 4:
            for name in dice.sample(("worker", "other"), 2):
                if cluster.at_work(name):
                    time.sleep(dice.random() * 0.5)
                    cluster.harm(name)
                    killed += 1
                    judge(cluster, name)
            time.sleep(0.05)
        cluster.finish()
        check(cluster.out, whole)
    assert killed >= 3


@pytest.mark.soak
def test_a_worker_that_stands_still_and_a_run_that_is_killed(tmp_path: Path, whole: Path) -> None:
    with a_cluster(tmp_path, **SERVED) as cluster:
        for name in ("worker", "other"):
            judge(cluster, name)
        name = at_work(cluster)
        cluster.harm(name, signal.SIGSTOP)
        time.sleep(LEASE_S + 1)
        cluster.harm(name, signal.SIGCONT)
        at_work(cluster)
        cluster.kill_run()
        until(lambda: cluster.server() is None, "the server ends with the run")
        cluster.start(resume=True)
        cluster.finish()
        check(cluster.out, whole)


@pytest.mark.soak
def test_without_a_worker_the_run_waits_and_goes_on_when_one_comes(tmp_path: Path, whole: Path) -> None:
    with a_cluster(tmp_path, **SERVED) as cluster:
        judge(cluster, "worker")
        cluster.harm(at_work(cluster))

        def says_that_it_waits() -> bool:
            status = cluster.status()
            return status is not None and any(
                "no worker that is here offers" in why for why in status.rewards_down.values()
            )

        until(says_that_it_waits, "the run says that it waits")
        steps = cluster.steps
        time.sleep(2.0)
        assert cluster.steps <= steps + 1
        judge(cluster, "worker")
        cluster.finish()
        check(cluster.out, whole)
