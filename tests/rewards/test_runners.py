"""Functions that move to processes of their own: because of what they call, or because their calls do not end."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.rewards import process_rewards
from tests.support.fakes import make_group, make_prompt
from troupe.errors import RewardError
from troupe.messages import Incident
from troupe.rewards import RewardActor, RewardManager, RewardSample, RewardsConfig

pytestmark = [pytest.mark.anyio, pytest.mark.alone]

FILE = process_rewards.__file__


@asynccontextmanager
async def started(reward: Any, **settings: Any) -> AsyncIterator[tuple[RewardManager, list[Incident]]]:
    told: list[Incident] = []
    config = RewardsConfig(**{"processes": 1, "retries": 0, **settings})
    async with RewardManager(reward, config=config) as manager:
        manager.listen(told.append)
        yield manager, told


async def scores(manager: RewardManager, *completions: str) -> Any:
    result = await manager.compute_rewards(["p"] * len(completions), list(completions))
    return next(iter(result.scores.values()))


@pytest.mark.parametrize(
    ("name", "why"),
    [("hides", "signal.signal()"), ("forks", "os.fork()"), ("forks_async", "os.fork()")],
)
async def test_a_function_moves_to_a_process_with_the_call_that_shows_that_it_must(name: str, why: str) -> None:
    async with started(f"{FILE}:{name}") as (manager, told):
        assert await scores(manager, "ab", "c") == (2.0, 1.0)
        assert await scores(manager, "abcd") == (4.0,)
    (incident,) = told
    assert incident.kind == "reward_moved"
    assert incident.message.startswith(f"reward {name} now runs in processes of its own, 1 at a time")
    assert f"it calls {why} ({Path(FILE)}:" in incident.message


async def test_calls_at_the_same_time_move_together() -> None:
    async with started(process_rewards.hides, processes=2) as (manager, told):
        groups = [make_group(make_prompt(0, place, batch_size=9)) for place in range(6)]
        results = await manager.score_groups(groups)
    expected = [tuple(float(len(r.text)) for r in group.rollouts) for group in groups]
    assert [result.scores["hides"] for result in results] == expected
    assert [incident.kind for incident in told] == ["reward_moved"]


async def test_it_is_told_of_later_where_nobody_listens_yet() -> None:
    async with RewardManager(f"{FILE}:hides", config=RewardsConfig(processes=1)) as manager:
        await scores(manager, "a")
        told: list[Incident] = []
        manager.listen(told.append)
        manager.listen(told.append)
    assert [incident.kind for incident in told] == ["reward_moved"]


async def test_what_has_no_name_in_a_process_ends_with_what_to_do() -> None:
    def local(completions: list[str]) -> list[float]:
        with suppress(ValueError):
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        return [1.0] * len(completions)

    wanted = (
        r"reward local needs a process of its own, since it calls signal.signal\(\) .*rewards.run = .*a local function"
    )
    async with started(local) as (manager, told):
        with pytest.raises(RewardError, match=wanted):
            await scores(manager, "a")
    assert told == []


async def test_a_manager_that_was_not_started_says_so() -> None:
    manager = RewardManager(f"{FILE}:hides")
    with pytest.raises(
        RewardError, match=r"reward hides needs a process of its own: it calls signal.signal.*async with"
    ):
        await scores(manager, "a")


async def test_an_actor_cannot_move_and_says_so() -> None:
    class Forks(RewardActor):
        async def score(self, sample: RewardSample) -> float:
            with suppress(RuntimeError):
                os.fork()
            return 1.0

    async with started(Forks()) as (manager, _):
        with pytest.raises(RewardError, match=r"reward Forks calls os.fork\(\) .* write it as a function"):
            await scores(manager, "a")


async def test_one_that_ends_the_process_is_wrong_code() -> None:
    async with started(f"{FILE}:ends_all", breaker_failures=1) as (manager, told):
        with pytest.raises(RewardError, match=r"reward ends_all has not worked once.*exit code 0"):
            await manager.score_group(make_group(make_prompt(0, 0)))
    assert [incident.kind for incident in told] == ["reward_moved"]


@pytest.fixture
def hanging() -> Iterator[None]:
    process_rewards.HERE.set()
    yield
    process_rewards.HERE.clear()


@pytest.mark.slow
@pytest.mark.usefixtures("hanging")
async def test_calls_that_do_not_end_are_told_of_and_then_made_where_they_can_be_killed() -> None:
    async with started("tests.rewards.process_rewards:late", timeout_s=1.0) as (manager, told):
        first = await manager.compute_rewards(["p"], ["abc"])
        assert first.scores["late"] == (None,)
        assert "no answer within 1 s; 1 of its calls did not end" in first.incidents[0].message
        assert 'rewards.run = ["process"]' in first.incidents[0].message
        assert await scores(manager, "abc") == (3.0,)
    (incident,) = told
    assert incident.kind == "reward_moved"
    assert "2 of its calls did not end in time" in incident.message


@pytest.mark.usefixtures("hanging")
async def test_what_cannot_move_stays_and_says_how_many_were_left() -> None:
    def local(completions: list[str]) -> list[float]:
        return process_rewards.late(completions)

    async with started(local, timeout_s=0.01) as (manager, told):
        results = [await manager.compute_rewards(["p"], ["abc"]) for _ in range(3)]
    assert [result.scores["local"] for result in results] == [(None,)] * 3
    assert "3 of its calls did not end" in results[2].incidents[0].message
    assert told == []


async def test_code_that_wants_another_thread_is_told_of_processes_where_it_works() -> None:
    async with started(process_rewards.wants_its_thread, breaker_failures=1) as (manager, _):
        with pytest.raises(RewardError, match=r"has not worked once.*_thread\._local.*rewards\.run = \[.process.\]"):
            await manager.score_group(make_group(make_prompt(0, 0)))
    async with started(f"{FILE}:wants_its_thread", run=["process"]) as (manager, _):
        assert await scores(manager, "a") == (1.0,)
