"""Scorer: groups are scored side by side; missing scores and incidents; broken rewards."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from tests.fakes import Reports, ended, make_group, make_prompt, send_all, taken
from troupe.actors.scorer import Scorer
from troupe.errors import RewardError
from troupe.messages import Incident, RolloutGroup, ScoredGroup, Span
from troupe.rewards import RewardManager, RewardsConfig
from troupe.runtime import Channel, Mailbox, play

pytestmark = pytest.mark.anyio


class Stage:
    def __init__(self, *rewards: Any) -> None:
        self.reports, self.inbox, self.learner = Reports(), Mailbox("scorer"), Mailbox("learner")
        self.groups: Channel[RolloutGroup] = self.inbox.channel("rollouts", RolloutGroup, bound=9)
        self.scorer = Scorer(
            self.inbox,
            self.learner.channel("scored", ScoredGroup, bound=9),
            rewards=RewardManager(rewards, config=RewardsConfig(retries=0)),
            report=self.reports.reporter("scorer"),
        )


async def test_a_slow_group_does_not_hold_up_a_fast_one() -> None:
    release = anyio.Event()

    async def slow_for_the_first(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        if prompts[0] == "prompt 0":
            await release.wait()
        return [float(sum(ids)) for ids in completion_ids]

    stage = Stage(slow_for_the_first)
    groups = [make_group(make_prompt(0, place)) for place in range(2)]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(play, [stage.scorer])
        await send_all(stage.groups, groups)
        await anyio.wait_all_tasks_blocked()
        [fast] = await taken(stage.learner)
        assert fast.group == groups[1]
        assert not ended(stage.learner), "a group is still in hand"
        release.set()
    [slow] = await taken(stage.learner)
    assert slow.group == groups[0]
    assert slow.scores == {"slow_for_the_first": tuple(float(sum(r.token_ids)) for r in groups[0].rollouts)}
    assert ended(stage.learner)
    spans = [m for m in await taken(stage.reports.mailbox) if isinstance(m, Span)]
    scored = [(s.name, s.step, s.gid) for s in spans if s.kind == "work"]
    assert scored == [("score slow_for_the_first", 0, 1), ("score slow_for_the_first", 0, 0)]


async def test_a_failed_call_is_an_incident_and_its_scores_are_missing_not_zero() -> None:
    def broken(completions: list[str], **_: Any) -> list[float]:
        raise ConnectionError("judge is away")

    def whole(completions: list[str], log_metric: Any, **_: Any) -> list[float | None]:
        log_metric("seen", len(completions))
        return [1.0, None, float("nan")]

    stage = Stage(broken, whole)
    await send_all(stage.groups, [make_group(make_prompt(0, 1))])
    await play([stage.scorer])
    [scored] = await taken(stage.learner)
    assert scored.scores == {"broken": (None, None, None), "whole": (1.0, None, None)}
    assert scored.logged == {"seen": 3.0}
    incidents = await stage.reports.incidents()
    assert [(i.kind, i.gid) for i in incidents] == [("reward_error", 1), ("reward_nonfinite", 1)]
    assert "ConnectionError: judge is away" in incidents[0].message


@pytest.mark.parametrize("answer", [[1.0], "111", [1.0, "x", 2.0]])
async def test_a_broken_contract_ends_the_play(answer: Any) -> None:
    def wrong(completions: list[str], **_: Any) -> Any:
        return answer

    stage = Stage(wrong)
    await send_all(stage.groups, [make_group(make_prompt(0, 0))])
    with pytest.raises(RewardError, match="reward wrong returned"):
        await play([stage.scorer])
    assert await taken(stage.learner) == []
    assert not ended(stage.learner)


async def test_incidents_arrive_before_the_group_they_are_about() -> None:
    stage = Stage(lambda completions: [None, None, float("inf")])
    seen: list[object] = []
    sent_incident, sent_group = stage.scorer.report.incident, stage.scorer.outputs[0].send  # type: ignore[union-attr]

    async def note_incident(incident: Incident) -> None:
        seen.append(incident.kind)
        await sent_incident(incident)

    async def note_group(message: ScoredGroup) -> None:
        seen.append("group")
        await sent_group(message)

    stage.scorer.report.incident = note_incident  # type: ignore[method-assign]
    stage.scorer.outputs[0].send = note_group  # type: ignore[union-attr,method-assign]
    await send_all(stage.groups, [make_group(make_prompt(0, 0))])
    await play([stage.scorer])
    assert seen == ["reward_nonfinite", "group"]
