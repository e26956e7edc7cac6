"""Runs that act, in virtual time: whatever goes wrong and however long environments take, in the pinned schedule the
same is learned, nothing that was answered is asked again, and every group is closed once."""

from __future__ import annotations

import random
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.support import virtual_time
from tests.support.acting import CONTEXT, LONGEST, FakeAnswers, conversations_of
from tests.support.chaos import Chaos, Report, assert_all_holds, config_of, perform, rewards_of, seeded
from tests.support.plans import Plan, draw_plan
from tests.support.wiring import Ledger, prepared_run, virtual_factories
from troupe.actors.conversations import Rules
from troupe.policy import GenerationConfig
from troupe.rewards import RewardManager
from troupe.run.supervisor import Supervisor

pytestmark = pytest.mark.no_cover


def drive(plan: Plan, *, most_delay_s: float = 0.0) -> tuple[Report, FakeAnswers]:
    """A run of the plan, in which the policy acts; environments take up to so many virtual seconds."""
    dice = random.Random(plan.seed)
    answers = FakeAnswers(lambda: dice.random() ** 4 * most_delay_s)
    acting_setup: Any = SimpleNamespace(
        manager=answers, conversations=lambda: conversations_of(answers), rules=Rules(context=CONTEXT)
    )
    with TemporaryDirectory(prefix="troupe-acting-") as folder:
        config = config_of(plan, Path(folder))
        generation = GenerationConfig(num_generations=plan.generations, max_completion_length=LONGEST)
        config = msgspec.structs.replace(config, generation=generation)
        chaos, ledger = Chaos(plan), Ledger((plan.max_staleness + 1) * plan.prompts)
        rewards = rewards_of(chaos)
        prepared = prepared_run(
            config, RewardManager(rewards, config=config.rewards), plan.rows, acting_setup=acting_setup
        )
        run = Supervisor(config, factories=virtual_factories(prepared, chaos, ledger))
        with seeded(plan.seed):
            report = virtual_time.run(perform, run, chaos, ledger, rewards[0])
    assert_all_holds(plan, report)
    return report, answers


def plan_of(seed: int, **changes: Any) -> Plan:
    quiet: dict[str, Any] = {"requests": (), "deadly": 0.0, "outage": None, "watchdog_s": 0.0}
    return msgspec.structs.replace(draw_plan(seed), **quiet | changes)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_timing_and_faults_change_nothing_and_nothing_is_asked_twice(seed: int) -> None:
    plan = plan_of(seed, mode="pinned", faults=0.004)
    calm, quiet = drive(plan.calm())
    report, answers = drive(plan, most_delay_s=30.0)
    assert (report.weights, report.ledger.states) == (calm.weights, calm.ledger.states)
    assert answers.known == quiet.known
    # what an environment was at when its actor failed was not answered
    assert all(times == 1 for times in answers.asked.values()) or report.faults["environment"]


@pytest.mark.parametrize("seed", range(8))
def test_the_free_schedule_too_closes_every_group_once(seed: int) -> None:
    report, answers = drive(plan_of(seed, mode="free", faults=0.004), most_delay_s=30.0)
    assert report.steps
    trained = {gid for gid in answers.forgotten if gid >= 0}  # below 0: evaluated
    assert trained <= report.ledger.closed.keys()
