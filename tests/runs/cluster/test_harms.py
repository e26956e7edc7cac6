"""One run, with none, one, two and three workers, and with everything done to them that happens to machines: equal
weights, every group once, nobody left."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.support.clusters import Cluster, a_cluster, alone, check_same, until
from tests.support.kills import EVERY, STEPS, P
from tests.support.runs import completions, in_store, lines
from troupe.messages import Pause, Resume

pytestmark = [
    pytest.mark.alone,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="what is left over is looked for in /proc"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as it goes without workers."""
    return alone(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize(
    "workers", [pytest.param(1, marks=pytest.mark.soak), 2, pytest.param(3, marks=pytest.mark.soak)]
)
def test_any_number_of_workers(tmp_path: Path, whole: Path, workers: int) -> None:
    with a_cluster(tmp_path) as cluster:
        names = ["worker", "second", "third"][:workers]
        cluster.gather(*names)
        cluster.finish()
        check_same(cluster.out, whole)
        decoded = cluster.parts_by_member()
        assert set(decoded) == set(names), decoded
        assert sum(decoded.values()) >= STEPS * 3  # spans of a worker's last second may be lost


@pytest.mark.soak
def test_workers_that_are_killed_again_and_again(tmp_path: Path, whole: Path) -> None:
    dice, killed, runs = random.Random(7), 0, 0
    while killed < 8:
        runs += 1
        with a_cluster(tmp_path / str(runs)) as cluster:
            names = ["worker", "other"]
            cluster.gather(*names)
            while cluster.goes_on and killed < 8:
                name = next(filter(cluster.at_work, dice.sample(names, 2)), None)
                if name is not None:
                    time.sleep(dice.random() * 0.3)
                    cluster.harm(name)
                    killed += 1
                    names[names.index(name)] = f"new-{killed}"  # its own name is another's until its lease has ended
                    cluster.join(f"new-{killed}")
            cluster.finish()
            check_same(cluster.out, whole)
    assert runs <= 16


def test_all_are_killed_and_another_joins(tmp_path: Path, whole: Path) -> None:
    with a_cluster(tmp_path) as cluster:
        cluster.gather("worker", "other")
        assert cluster.at_step(5)
        for name in ("worker", "other"):
            cluster.harm(name)
        until(lambda: "waiting for a worker" in _activity(cluster), "the run says that it waits")
        cluster.join("third")
        cluster.finish()
        check_same(cluster.out, whole)


def _activity(cluster: object) -> str:
    status = getattr(cluster, "status")()  # noqa: B009
    return "" if status is None or status.activity is None else status.activity.text


def test_the_server_is_killed(tmp_path: Path, whole: Path) -> None:
    with a_cluster(tmp_path) as cluster:
        cluster.gather("worker", "other")
        for step in (4, 10, 16):
            if cluster.at_step(step):
                before = cluster.server()
                assert before is not None
                os.kill(before, signal.SIGKILL)
                until(lambda before=before: cluster.server() not in (None, before), "another server")  # type: ignore[misc]
        cluster.finish()
        check_same(cluster.out, whole)


def test_the_run_is_killed_and_gone_on_with(tmp_path: Path, whole: Path) -> None:
    with a_cluster(tmp_path) as cluster:
        cluster.gather("worker", "other")
        for step in (2 * EVERY, 6 * EVERY):
            assert cluster.at_step(step)
            cluster.kill_run()
            until(lambda: cluster.server() is None, "the server ends with the run")
            cluster.start(resume=True)
        cluster.finish()
        check_same(cluster.out, whole)


def test_a_worker_that_stands_still_for_long(tmp_path: Path, whole: Path) -> None:
    with a_cluster(tmp_path) as cluster:
        cluster.gather("worker", "other")
        assert cluster.at_step(3)
        stop, go_on = (partial(cluster.harm_all, "other", what) for what in (signal.SIGSTOP, signal.SIGCONT))
        away(cluster, "other", stop, go_on, for_s=12.0)
        cluster.finish()
        check_same(cluster.out, whole)


def test_one_joins_late(tmp_path: Path, whole: Path) -> None:
    with a_cluster(tmp_path) as cluster:
        cluster.join("worker")
        assert cluster.at_step(STEPS // 2)
        cluster.join("late")
        cluster.finish()
        check_same(cluster.out, whole)


def test_a_cable_is_pulled(tmp_path: Path, whole: Path) -> None:
    with two_hosts() as (here, there, cable), a_cluster(tmp_path, host="10.77.3.1", inside=here) as cluster:
        cluster.join("worker", inside=there)
        cluster.join("other", inside=here)
        assert cluster.at_step(3)
        pull, plug = (partial(subprocess.run, [*here, "ip", "link", "set", cable, what]) for what in ("down", "up"))
        away(cluster, "worker", pull, plug, for_s=15.0)
        cluster.finish()
        check_same(cluster.out, whole)


def away(cluster: Cluster, name: str, begin: Callable[[], object], end: Callable[[], object], *, for_s: float) -> None:
    """Have a worker out of reach for a while: it is missed, and others go on with what it had. The run, which is short,
    waits before and after that."""
    begin()
    began_s = time.monotonic()
    cluster.asked(Pause())
    until(lambda: not cluster.is_ready(name), f"{name} is missed")
    cluster.asked(Resume())
    assert cluster.at_step(cluster.steps + 3)
    cluster.asked(Pause())
    time.sleep(max(0.0, for_s - (time.monotonic() - began_s)))
    end()
    until(lambda: cluster.is_ready(name), f"{name} is back")
    cluster.asked(Resume())


@contextmanager
def two_hosts() -> Iterator[tuple[tuple[str, ...], tuple[str, ...], str]]:
    """Two network namespaces with a cable between them → commands that run others in each, and the cable's end in the
    first, which is 10.77.3.1. Skips where that needs rights that are not there."""
    names = [f"troupe-{side}-{os.getpid()}" for side in "ab"]
    if shutil.which("ip") is None or subprocess.run(["ip", "netns", "add", names[0]], check=False).returncode:
        pytest.skip("network namespaces need iproute2 and root")
    try:
        cable = f"tr{os.getpid() % 100000}"
        inside = [("ip", "netns", "exec", name) for name in names]
        for command in (
            ["ip", "netns", "add", names[1]],
            [
                "ip",
                "link",
                "add",
                f"{cable}a",
                "netns",
                names[0],
                "type",
                "veth",
                "peer",
                "name",
                f"{cable}b",
                "netns",
                names[1],
            ],
            *([*inside[i], "ip", "addr", "add", f"10.77.3.{i + 1}/24", "dev", f"{cable}{'ab'[i]}"] for i in (0, 1)),
            *(
                [*inside[i], "ip", "link", "set", device, "up"]
                for i in (0, 1)
                for device in ("lo", f"{cable}{'ab'[i]}")
            ),
        ):
            subprocess.run(command, check=True)
        yield inside[0], inside[1], f"{cable}a"
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_free_with_a_worker_that_is_slow_and_one_that_is_killed(tmp_path: Path) -> None:
    with a_cluster(tmp_path, schedule__mode="free", schedule__max_staleness=2) as cluster:
        cluster.gather("worker", "slow")
        killed = False
        while cluster.goes_on:
            cluster.harm_all("slow", signal.SIGSTOP)
            time.sleep(0.3)
            cluster.harm_all("slow", signal.SIGCONT)
            time.sleep(0.1)
            if not killed and cluster.steps >= STEPS // 2:
                killed = True
                cluster.harm("worker")
                cluster.join("worker")
        cluster.finish()
        assert [line["step"] for line in lines(cluster.out)] == list(range(1, STEPS + 1))
        slots = in_store(cluster.out, "SELECT slot_step, place, attempt FROM groups")
        assert len(slots) == len(set(slots)), "each group ends once"
        attempts = {(step, place): [a for s, p, a in slots if (s, p) == (step, place)] for step, place, _ in slots}
        assert attempts.keys() == {(step, place) for step in range(STEPS) for place in range(P)}, "no prompt is lost"
        assert all(sorted(of_one) == list(range(len(of_one))) for of_one in attempts.values())
        trained = [one for one in completions(cluster.out) if one.state == "trained"]
        assert {one.step for one in trained} == set(range(1, STEPS + 1))
        learned, young = {line["step"]: line["tokens/trained"] for line in lines(cluster.out)}, Counter[int]()
        for one in trained:
            young[one.step] += sum(n for version, n in one.versions if one.step - 1 - version <= 2)
        assert learned == young, "what is too old is left out of the loss, token by token"
        assert set(cluster.parts_by_member()) == {"worker", "slow"}
