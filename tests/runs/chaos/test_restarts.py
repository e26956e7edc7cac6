"""Every actor is made to fail at every await of its loop, at start and at the end: the run is the same as without."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import troupe
from tests.support import virtual_time
from tests.support.fakes import same_bits, tiny_config, weigh_ids
from tests.support.faults import Faults
from tests.support.straight import run_straight
from tests.support.wiring import Hooks, Ledger, digest, prepared_run, virtual_factories
from troupe import RunConfig
from troupe.actors import checkpointer as writer_room
from troupe.actors.generator import actor as generator_room
from troupe.actors.schedule import ScheduleConfig
from troupe.checkpoint import CheckpointConfig, load_checkpoint
from troupe.errors import RunError
from troupe.grpo import LearnerConfig
from troupe.policy import GenerationConfig, RolloutEngine
from troupe.rewards import RewardManager, batch_reward
from troupe.run.result import RunResult
from troupe.run.supervisor import Supervisor

pytestmark = pytest.mark.no_cover  # the tracer would double their time

ACTORS = ("prompter", "generator", "scorer", "checkpointer", "metrics")
P, STEPS = 2, 2
SCHEDULES: dict[str, dict[str, Any]] = {
    "pinned, in turns": {"mode": "pinned", "max_staleness": 0},
    "pinned, overlapping": {"mode": "pinned", "max_staleness": 1},
    "free": {"mode": "free", "max_staleness": 1, "on_stale": "requeue"},
}


class Run(NamedTuple):
    """What a run came to."""

    ledger: Ledger
    result: RunResult
    faults: Faults


class Slow(Hooks):
    """Work takes a while, so that the actors overlap."""

    def delay_s(self, who: str) -> float:
        return {"generator": 0.3, "learner": 0.5, "checkpointer": 1.1}.get(who, 0.0)


async def coarse(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """Many groups are without signal, and some without a score."""
    if digest(completion_ids)[0] < 25:
        raise ValueError("no opinion")
    return [float(sum(ids) % 2) for ids in completion_ids]


@batch_reward
async def parity(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Called once a step."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def run_with_faults(
    folder: Path,
    schedule: str,
    actor: str,
    strike: tuple[int, ...] = (),
    *,
    at_stop: bool = False,
    reward: Callable[..., Any] = coarse,
) -> Run:
    config = RunConfig(
        seed=3,
        output=tempfile.mkdtemp(dir=folder),  # a run that ended is in the way of the next
        generation=GenerationConfig(num_generations=2, max_completion_length=5),
        learner=LearnerConfig(batch_size=P, max_steps=STEPS, dynamic_sampling=True, max_resampling_attempts=2),
        schedule=ScheduleConfig(**SCHEDULES[schedule]),
        checkpoint=CheckpointConfig(every=1),
    )
    rewards = RewardManager([reward], config=config.rewards)
    ledger, faults = Ledger((config.schedule.max_staleness + 1) * P), Faults(actor, strike, at_stop=at_stop)
    slow = Slow()
    factories = virtual_factories(prepared_run(config, rewards, rows=5), slow, ledger)

    async def body() -> RunResult:
        async with Supervisor(config, factories=factories) as run:
            await run.wait()
        return run.result

    with faults.injected():
        result = virtual_time.run(body)
    return Run(ledger, result, faults)


def assert_whole(run: Run) -> None:
    """Nothing was lost, nothing doubled."""
    ledger = run.ledger
    assert not ledger.broken
    assert ledger.closed.keys() == ledger.issued.keys()
    assert set(ledger.closed.values()) == {1}
    assert not ledger.alive
    assert [update.step for update in ledger.updates] == [1, 2]
    assert sorted(set(ledger.written)) == [1, 2]
    assert ledger.final == STEPS
    assert run.result.closed_groups.keys() == ledger.states.keys()


def assert_faults_leave_no_trace(
    folder: Path, schedule: str, actor: str, *, every: int, in_a_row: int, reward: Callable[..., Any] = coarse
) -> None:
    calm = run_with_faults(folder, schedule, actor, reward=reward)
    assert_whole(calm)
    for point in itertools.count(0, every):
        run = run_with_faults(folder, schedule, actor, tuple(range(point, point + in_a_row)), reward=reward)
        where = run.faults.places[point : point + in_a_row]
        if not where:  # the run was over before
            assert point >= 10
            return
        assert_whole(run)
        restarts = run.result.incidents.get("actor_restarted", 0)
        assert 1 <= restarts <= len(where), where  # faults of two tasks at once are one failure
        if schedule != "free":  # there the groups of a step depend on time, which a restart takes
            assert run.ledger.learned == calm.ledger.learned, where
            assert run.result.closed_groups == calm.result.closed_groups, where


@pytest.mark.parametrize(
    "actor",
    [pytest.param(actor, marks=() if actor in {"generator", "scorer"} else pytest.mark.slow) for actor in ACTORS],
)
def test_a_fault_at_an_await_is_mended_and_leaves_no_trace(tmp_path: Path, actor: str) -> None:
    every = 9 if actor == "metrics" else 1
    assert_faults_leave_no_trace(tmp_path, "pinned, overlapping", actor, every=every, in_a_row=1)


def test_a_fault_of_the_scorer_amid_a_round_that_is_scored_together(tmp_path: Path) -> None:
    assert_faults_leave_no_trace(tmp_path, "pinned, overlapping", "scorer", every=2, in_a_row=1, reward=parity)


@pytest.mark.slow
@pytest.mark.parametrize("in_a_row", [1, *(pytest.param(many, marks=pytest.mark.soak) for many in (2, 3))])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("actor", ACTORS)
def test_faults_at_any_await_one_after_the_other(tmp_path: Path, schedule: str, actor: str, in_a_row: int) -> None:
    assert_faults_leave_no_trace(tmp_path, schedule, actor, every=1, in_a_row=in_a_row)


@pytest.mark.parametrize("actor", ACTORS)
def test_a_fault_at_stop_is_told_and_nothing_else(tmp_path: Path, actor: str) -> None:
    run = run_with_faults(tmp_path, "pinned, overlapping", actor, at_stop=True)
    assert_whole(run)
    assert run.result.incidents["stop_failed"] == 1
    run = run_with_faults(tmp_path, "pinned, overlapping", actor, (7,), at_stop=True)
    assert_whole(run)
    assert (run.result.incidents["stop_failed"], run.result.incidents["actor_restarted"]) == (2, 1)


@pytest.mark.parametrize("actor", ACTORS)
def test_an_actor_that_goes_on_failing_ends_the_run(tmp_path: Path, actor: str) -> None:
    with pytest.raises(RunError, match=rf"{actor} failed: InjectedError: at .* restarted 3 times within 60 s"):
        run_with_faults(tmp_path, "pinned, overlapping", actor, tuple(range(7, 99)))


@pytest.mark.parametrize("place", ["decode", pytest.param("text", marks=pytest.mark.slow), "reward", "disk"])
def test_a_real_run_in_which_work_fails_once_equals_the_plain_loop(
    tmp_path: Path, ragged_model: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    owner, name = {
        "decode": (RolloutEngine, "load"),
        "text": (generator_room, "as_rollouts"),
        "reward": (RewardManager, "score_group"),
        "disk": (writer_room, "save_checkpoint"),
    }[place]
    work, calls = getattr(owner, name), itertools.count()

    def fails_once(*args: Any, **settings: Any) -> Any:
        if next(calls) == 3:
            raise ValueError("out of luck")
        return work(*args, **settings)

    monkeypatch.setattr(owner, name, fails_once)
    config = tiny_config(
        ragged_model, tmp_path, schedule__max_staleness=1, schedule__generator="thread", checkpoint__every=1
    )
    result = troupe.train(config, [weigh_ids])
    assert result.incidents == {"actor_restarted": 1}
    assert result.closed_groups == {"trained": 8}
    last = load_checkpoint(Path(result.folder) / "checkpoints" / "step-00000004")
    assert same_bits(last.weights, run_straight(config, weigh_ids).weights)
