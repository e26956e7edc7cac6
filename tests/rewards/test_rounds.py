"""Rewards of scope "batch": one call a round, for the groups of a run as they come and for others at once."""

from __future__ import annotations

import functools
from typing import Any

import anyio
import msgspec
import pytest

from tests.rewards.scoring import Scoring
from tests.support.fakes import make_group, make_prompt
from troupe.errors import RewardError
from troupe.messages import Span
from troupe.rewards import (
    RewardActor,
    RewardManager,
    RewardSample,
    TrainerState,
    batch_reward,
)
from troupe.runtime.mailbox import Mailbox
from troupe.runtime.reporter import Reporter

pytestmark = pytest.mark.anyio


class Ranks:
    """Scores by the rank of the prompt's text among all of the call."""

    scope = "batch"

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.faults = 0
        self.gate: anyio.Event | None = None

    async def __call__(self, prompts: list[str], log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
        self.calls.append(list(prompts))
        if self.gate is not None:
            await self.gate.wait()
        if self.faults:
            self.faults -= 1
            raise OSError("away")
        log_metric("calls", len(self.calls))
        log_extra("place", list(range(len(prompts))))
        return [float(index) for index in range(len(prompts))]


def groups(step: int = 0, attempt: int = 0, size: int = 3) -> list[Any]:
    return [make_group(make_prompt(step, place, attempt, batch_size=size), size=2) for place in range(size)]


async def test_one_call_a_round_in_slot_order_while_other_rewards_do_not_wait() -> None:
    ranks, seen = Ranks(), list[str]()

    async def each(prompts: list[str], completions: list[str]) -> list[float]:
        seen.append(prompts[0])
        return [0.0] * len(completions)

    scoring = Scoring(ranks, each, breaker_failures=0)
    first, second = groups(), groups(step=1)
    async with anyio.create_task_group() as tasks:
        for group in [first[2], second[0], first[0]]:
            tasks.start_soon(scoring.score, group)
        await anyio.wait_all_tasks_blocked()
        assert (ranks.calls, scoring.results) == ([], {})
        assert seen == ["prompt 2", "prompt 3", "prompt 0"]
        tasks.start_soon(scoring.score, first[1])
        await anyio.wait_all_tasks_blocked()
        assert ranks.calls == [["prompt 0"] * 2 + ["prompt 1"] * 2 + ["prompt 2"] * 2]
        for group in second[1:]:
            tasks.start_soon(scoring.score, group)
    assert len(ranks.calls) == 2
    by_place = [scoring.results[group.prompt.gid] for group in first]
    assert [result.scores["Ranks"] for result in by_place] == [(0.0, 1.0), (2.0, 3.0), (4.0, 5.0)]
    assert [result.extra["place"] for result in by_place] == [(0, 1), (2, 3), (4, 5)]
    assert [result.metrics for result in by_place] == [{"calls": 1.0}] * 3


async def test_a_failed_call_is_missing_for_the_round_and_told_once() -> None:
    ranks = Ranks()
    ranks.faults = 1
    scoring = Scoring(ranks, breaker_failures=0)
    async with anyio.create_task_group() as tasks:
        for group in groups():
            tasks.start_soon(scoring.score, group)
    assert [result.scores["Ranks"] for result in scoring.results.values()] == [(None, None)] * 3
    assert sum(len(result.incidents) for result in scoring.results.values()) == 1


async def test_replacements_are_a_round_of_their_own() -> None:
    ranks = Ranks()
    scoring = Scoring(ranks, breaker_failures=0)
    async with anyio.create_task_group() as tasks:
        for group in groups():
            tasks.start_soon(scoring.score, group)
        alone = make_group(make_prompt(0, 1, 1, batch_size=3, round_size=1), size=2)
        tasks.start_soon(scoring.score, alone)
    assert sorted(map(len, ranks.calls)) == [2, 6]


async def test_who_waits_for_the_round_is_not_at_work_meanwhile() -> None:
    ranks = Ranks()
    ranks.gate = anyio.Event()
    scoring = Scoring(ranks, breaker_failures=0)
    report = Reporter("scorer", None, Mailbox("metrics").channel("spans", Span, bound=99, overflow="drop_oldest"))
    async with anyio.create_task_group() as tasks:
        for group in groups(step=4, size=2):
            tasks.start_soon(scoring.manager.score_group, group, None, report)
        await anyio.wait_all_tasks_blocked()
        doing = [(span.name, span.kind, span.step, span.gid) for span in report.doing]
        ranks.gate.set()
    first, second = (group.prompt.gid for group in groups(step=4, size=2))
    assert doing == [
        ("score Ranks", "work", 4, first),
        ("wait for the round", "wait", 4, first),
        ("score Ranks", "work", 4, second),
    ]


async def test_groups_that_are_decoded_alone_are_scored_alone() -> None:
    ranks = Ranks()
    ranks.gate = anyio.Event()
    scoring = Scoring(ranks, breaker_failures=0)
    alone = [make_group(make_prompt(0, place, 1, batch_size=3, round_size=1), size=2) for place in (0, 2)]
    async with anyio.create_task_group() as tasks:
        for group in alone:
            tasks.start_soon(scoring.score, group)
            await anyio.wait_all_tasks_blocked()
        assert [len(call) for call in ranks.calls] == [2, 2], "neither waits for the other"
        ranks.gate.set()
    for group in alone:
        scoring.manager.settled(group)
    assert len(ranks.calls) == 2
    assert not scoring.manager.has_open_rounds


async def test_when_who_makes_the_call_is_cancelled_another_one_does() -> None:
    ranks = Ranks()
    ranks.gate = anyio.Event()
    scoring = Scoring(ranks, breaker_failures=0)
    cancelled = anyio.CancelScope()
    three = groups()

    async def last() -> None:
        with cancelled:
            await scoring.score(three[2])

    async with anyio.create_task_group() as tasks:
        for group in three[:2]:
            tasks.start_soon(scoring.score, group)
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(last)
        await anyio.wait_all_tasks_blocked()
        cancelled.cancel()
        await anyio.wait_all_tasks_blocked()
        assert len(ranks.calls) == 2
        ranks.gate.set()
    assert len(scoring.results) == 2
    await scoring.score(three[2])
    assert len(ranks.calls) == 2, "the group that comes again gets what the call gave"
    assert scoring.results[2].scores["Ranks"] == (4.0, 5.0)


async def test_a_group_that_comes_again_after_others_were_sent_on_does_not_wait_for_them() -> None:
    scoring = Scoring(Ranks())
    three = groups()
    async with anyio.create_task_group() as tasks:
        for group in three:
            tasks.start_soon(scoring.score, group)
    before = dict(scoring.results)
    scoring.manager.settled(three[0])
    for group in three[1:]:
        await scoring.score(group)
        scoring.manager.settled(group)
    assert scoring.results == before
    assert not scoring.manager.has_open_rounds, "nothing is kept when all are settled"


async def test_outside_of_a_run_all_that_is_given_is_one_batch() -> None:
    ranks = Ranks()
    manager = RewardManager([ranks, lambda completions: [1.0] * len(completions)])
    three = groups()
    columns = msgspec.structs.replace(three[1].prompt, columns={"only": "here"})
    three[1] = msgspec.structs.replace(three[1], prompt=columns)
    results = await manager.score_groups(three)
    assert [result.scores["Ranks"] for result in results] == [(0.0, 1.0), (2.0, 3.0), (4.0, 5.0)]
    assert (await manager.compute_rewards(["a", "b"], ["x", "y"])).rewards == (1.0, 2.0)
    assert [len(call) for call in ranks.calls] == [6, 2]
    assert await manager.score_groups([]) == []


async def test_the_scope_may_be_set_by_a_decorator_and_is_checked() -> None:
    calls: list[int] = []

    @batch_reward
    def count(completions: list[str], trainer_state: TrainerState) -> list[float]:
        calls.append(len(completions))
        return [0.0] * len(completions)

    scoring = Scoring(functools.partial(count))
    async with anyio.create_task_group() as tasks:
        for group in groups():
            tasks.start_soon(scoring.score, group)
    assert calls == [6]

    def odd(completions: list[str]) -> list[float]:
        return []

    odd.scope = "step"  # type: ignore[attr-defined]
    with pytest.raises(RewardError, match=r"reward odd has scope = 'step'; give 'group' or 'batch'"):
        RewardManager(odd)

    class Actor(RewardActor):
        scope = "batch"

        async def score(self, sample: RewardSample) -> float | None:
            return None

    with pytest.raises(RewardError, match="a RewardActor scores one sample a call"):
        RewardManager(Actor())
