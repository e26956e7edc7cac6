"""Runs with a teacher, in virtual time: whatever goes wrong and however long it takes, in the pinned schedule the same
is learned, what was said of groups included, and every group is closed once."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.support import virtual_time
from tests.support.chaos import Chaos, Report, assert_all_holds, config_of, perform, rewards_of, seeded
from tests.support.plans import Plan, draw_plan
from tests.support.wiring import Ledger, digest, prepared_run, virtual_factories
from troupe.actors.teacher.forward import with_log_probs
from troupe.actors.teacher.settings import TeacherConfig
from troupe.messages import RolloutGroup
from troupe.rewards import RewardManager
from troupe.run.supervisor import Supervisor

pytestmark = pytest.mark.no_cover


def taught(group: RolloutGroup) -> RolloutGroup:
    """Follows from the tokens."""
    noise = [[-byte / 255 for byte in digest(rollout.token_ids)] for rollout in group.rollouts]
    return with_log_probs(
        group, [tuple(said[: len(r.token_ids)]) for said, r in zip(noise, group.rollouts, strict=True)]
    )


class TeachingChaos(Chaos):
    """Knows who sends groups to the scorer where there is a teacher."""

    def on_step(self, who: str, place: str) -> None:
        super().on_step("teacher" if (who, place) == ("generator", "send") else who, place)


def drive(plan: Plan) -> Report:
    """A run of the plan, of which a teacher is a part; what is learned is a hash of all that it has said, too."""
    with TemporaryDirectory(prefix="troupe-teaching-") as folder:
        config = msgspec.structs.replace(config_of(plan, Path(folder)), teacher=TeacherConfig(path="teacher"))
        chaos, ledger = TeachingChaos(plan), Ledger((plan.max_staleness + 1) * plan.prompts)
        rewards = rewards_of(chaos)
        prepared = prepared_run(config, RewardManager(rewards, config=config.rewards), plan.rows)
        teachers: Any = SimpleNamespace(forward=lambda temperature: SimpleNamespace(taught=taught))
        prepared = msgspec.structs.replace(prepared, inputs=msgspec.structs.replace(prepared.inputs, teachers=teachers))
        run = Supervisor(config, factories=virtual_factories(prepared, chaos, ledger))
        with seeded(plan.seed):
            report = virtual_time.run(perform, run, chaos, ledger, rewards[0])
    assert_all_holds(plan, report)
    return report


def plan_of(seed: int, **changes: Any) -> Plan:
    quiet: dict[str, Any] = {"requests": (), "deadly": 0.0, "outage": None, "watchdog_s": 0.0}
    return msgspec.structs.replace(draw_plan(seed), **quiet | changes)


def test_timing_and_faults_change_nothing() -> None:
    failed = 0
    for seed in (1, 6):
        plan = plan_of(seed, mode="pinned", faults=0.03)
        calm, report = drive(plan.calm()), drive(plan)
        assert (report.weights, report.ledger.states) == (calm.weights, calm.ledger.states)
        failed += report.faults["teacher"]
    assert failed, "in some of them the teacher fails, and is followed by another"


@pytest.mark.parametrize("seed", range(2))
def test_the_free_schedule_too_closes_every_group_once(seed: int) -> None:
    assert drive(plan_of(seed, mode="free", faults=0.004)).steps
