"""Workers in runs of other kinds than the plain one: adapters, policies that act, the free schedule; and what a killed
worker leaves on its machine."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.clusters import LEASE_S, a_cluster, alone, until
from tests.support.fakes import write_prompts
from tests.support.games import acting, write_player
from tests.support.kills import STEPS, P
from tests.support.runs import in_store, lines, timeless
from troupe.actors.generator.locked_folder import SHARED_MEMORY
from troupe.messages import MemberStatus
from troupe.records.evaluations import read_evaluations

pytestmark = [
    pytest.mark.alone,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="what is left over is looked for in /proc"),
]
ADAPTER: dict[str, Any] = {"adapter__kind": "lora", "adapter__rank": 4, "learner__lr": 1e-3}


def final(out: Path) -> dict[str, bytes]:
    """What was trained."""
    return {path.name: path.read_bytes() for path in sorted((out / "final").glob("*.safetensors"))}


def learned(out: Path) -> list[dict[str, Any]]:
    """The figures of each step, without those of clocks."""
    return [{name: value for name, value in timeless(line).items() if "wait_s" not in name} for line in lines(out)]


def check_learned_alike(out: Path, whole: Path) -> None:
    assert final(out) == final(whole)
    assert learned(out) == learned(whole)


def scratch_folders() -> set[Path]:
    """Where weights for generators lie in memory."""
    return set(SHARED_MEMORY.glob("troupe-weights-*"))


@pytest.mark.soak
def test_an_adapter_is_all_that_travels_and_a_killed_worker_leaves_nothing_for_long(tmp_path: Path) -> None:
    whole = alone(tmp_path / "alone", **ADAPTER)
    before = scratch_folders()
    with a_cluster(tmp_path / "run", **ADAPTER) as cluster:
        cluster.gather("worker")
        assert cluster.at_step(4)
        mine = scratch_folders() - before
        assert mine
        cluster.harm("worker")
        until(lambda: not [line for pid, line in cluster.left() if "generator.process" in line], "its generator ends")
        cluster.join("worker")
        cluster.finish()
        assert not scratch_folders() & mine
        check_learned_alike(cluster.out, whole)


@pytest.mark.soak
def test_a_policy_that_acts_has_its_turns_answered_by_the_run(tmp_path: Path) -> None:
    settings = acting(tmp_path) | {
        "model__path": str(write_player(tmp_path / "player")),
        "data__path": str(write_prompts(tmp_path / "prompts.json")),
        "learner__lr": 1e-2,
        "learner__max_steps": 24,
        "schedule__parts": 2,
        "rewards__functions": [f"{tmp_path}/shares.py:shares"],
    }
    (tmp_path / "shares.py").write_text(
        "def shares(completion_ids, **_): return [sum(a) % 13 / 13 for a in completion_ids]"
    )
    whole = alone(tmp_path / "alone", **settings)
    with a_cluster(tmp_path / "run", **settings) as cluster:
        cluster.gather("worker", "other")
        assert cluster.at_step(2)
        cluster.harm_all("other", signal.SIGSTOP)  # longer than its lease: what it has goes to the other
        time.sleep(LEASE_S + 2.0)
        cluster.harm_all("other", signal.SIGCONT)
        until(lambda: cluster.at_work("other") or cluster.steps >= 8, "it goes on")
        cluster.harm("other")
        cluster.join("third")
        cluster.finish()
        check_learned_alike(cluster.out, whole)


@pytest.mark.soak
def test_in_the_free_schedule_no_prompt_is_lost_or_trained_twice_however_slow_a_worker_is(tmp_path: Path) -> None:
    with a_cluster(tmp_path, schedule__mode="free", schedule__max_staleness=3) as cluster:
        cluster.gather("worker", "slow")
        while cluster.goes_on:
            cluster.harm_all("slow", signal.SIGSTOP)
            time.sleep(0.3)
            cluster.harm_all("slow", signal.SIGCONT)
            time.sleep(0.1)
        cluster.finish()
        told = lines(cluster.out)
        slots = in_store(cluster.out, "SELECT slot_step, place, attempt, state FROM groups ORDER BY 1, 2, 3")
        ends = Counter(state for *_, state in slots)
        assert {"trained": ends["trained"], "stale": ends["stale"]} == {
            state: sum(line[f"groups/{state}"] for line in told) for state in ("trained", "stale")
        }
        assert len(told) == STEPS
        first = {(step, place) for step, place, attempt, _ in slots if not attempt}
        under_way = (3 + 1) * P
        issued = sorted({(step, place) for step in range(max(first)[0] + 1) for place in range(P)})
        assert first >= set(issued[: len(issued) - under_way])


def test_workers_decode_evaluations_and_one_that_is_killed_amid_them_changes_nothing(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} + {i + 1} =", "answer": str(2 * i + 1)} for i in range(80)]
    (tmp_path / "held-out.json").write_text(json.dumps(rows))
    sets = [{"name": "sampled", "path": str(tmp_path / "held-out.json"), "num_samples": 16, "temperature": 1.0}]
    settings: dict[str, Any] = {"evaluation__every": 4, "evaluation__sets": sets, "learner__max_steps": 6}
    whole = alone(tmp_path / "alone", **settings)
    with a_cluster(tmp_path / "run", **settings) as cluster:
        names = {"worker", "other"}
        for name in names:
            cluster.join(name)
        until(lambda: any(evaluates(cluster.member(name)) for name in names), "rows are decoded")
        killed = next((name for name in names if evaluates(cluster.member(name))), "other")
        cluster.harm(killed)
        cluster.finish()
        assert cluster.parts_by_member("evaluate").keys() >= names - {killed}
        check_learned_alike(cluster.out, whole)
        assert looked_at(cluster.out) == looked_at(whole)
        assert len(in_store(cluster.out, "SELECT 1 FROM evaluation_samples")) == 3 * 16 * len(rows)


def evaluates(member: MemberStatus | None) -> bool:
    """Whether it has a part of an evaluation."""
    return member is not None and any(name.startswith("e.") for name in member.leases)


def looked_at(out: Path) -> list[Any]:
    """All that evaluations came to."""
    figures = [(each.version, each.name, each.metrics) for each in read_evaluations(out)]
    samples = in_store(out, "SELECT * FROM evaluation_samples ORDER BY version, name, row, sample")
    return [figures, samples]
