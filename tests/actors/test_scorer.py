"""Scorer: groups are scored side by side; missing scores and incidents; broken rewards."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from tests.support.fakes import Reports, ended, make_group, make_prompt, send_all, taken
from troupe.actors.scorer import Scorer
from troupe.errors import RewardError
from troupe.messages import GroupClosed, Hold, Incident, RolloutGroup, ScoredGroup, Span
from troupe.rewards import RewardManager, RewardsConfig, TrainerState, batch_reward
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.roles import run_roles

pytestmark = pytest.mark.anyio


class Scoring:
    def __init__(
        self, *rewards: Any, breaker_failures: int = 8, recorded: dict[int, ScoredGroup] | None = None
    ) -> None:
        self.recorded = recorded
        self.reports, self.inbox, self.learner = Reports(), Mailbox("scorer"), Mailbox("learner")
        self.prompter = Mailbox("prompter")
        self.groups: Channel[RolloutGroup] = self.inbox.channel("rollouts", RolloutGroup, bound=9)
        config = RewardsConfig(retries=0, breaker_failures=breaker_failures, breaker_max_wait_s=0.001)
        self.rewards = RewardManager(rewards, config=config)
        self.scored = self.learner.channel("scored", ScoredGroup, bound=9)
        self.prompter.channel("closed", GroupClosed, bound=1)  # keeps the mailbox open
        self.holds = self.prompter.channel("hold", Hold, bound=1, overflow="newest", side=True)
        self.report = self.reports.reporter("scorer")
        self.scorer = self.another()

    def another(self) -> Scorer:
        """One who goes on with the same mailboxes and rewards."""
        return Scorer(
            self.inbox,
            self.scored,
            rewards=self.rewards,
            hold=self.holds,
            recorded=self.recorded,
            trainer_state=lambda step: TrainerState.at(step, max_steps=9, prompts=2, num_generations=3, rows=4),
            report=self.report,
        )

    async def hold(self, *, held: bool) -> Hold:
        """The next message to the prompter that holds it, or no longer does."""
        async for hold in self.prompter:
            if bool(hold.reasons) == held:
                return hold  # type: ignore[no-any-return]
        raise AssertionError


async def test_a_slow_group_does_not_hold_up_a_fast_one() -> None:
    release = anyio.Event()

    async def slow_for_the_first(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        if prompts[0] == "prompt 0":
            await release.wait()
        return [float(sum(ids)) for ids in completion_ids]

    scoring = Scoring(slow_for_the_first)
    groups = [make_group(make_prompt(0, place)) for place in range(2)]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_roles, [scoring.scorer])
        await send_all(scoring.groups, groups)
        await anyio.wait_all_tasks_blocked()
        [fast] = await taken(scoring.learner)
        assert fast.group == groups[1]
        assert not ended(scoring.learner), "a group is still in hand"
        release.set()
    [slow] = await taken(scoring.learner)
    assert slow.group == groups[0]
    assert slow.scores == {"slow_for_the_first": tuple(float(sum(r.token_ids)) for r in groups[0].rollouts)}
    assert ended(scoring.learner)
    spans = [m for m in await taken(scoring.reports.mailbox) if isinstance(m, Span)]
    scored = [(s.name, s.step, s.gid) for s in spans if s.kind == "work"]
    assert scored == [("score slow_for_the_first", 0, 1), ("score slow_for_the_first", 0, 0)]


async def test_a_failed_call_is_an_incident_and_its_scores_are_missing_not_zero() -> None:
    def broken(completions: list[str], **_: Any) -> list[float]:
        raise ConnectionError("judge is away")

    def whole(completions: list[str], log_metric: Any, **_: Any) -> list[float | None]:
        log_metric("seen", len(completions))
        return [1.0, None, float("nan")]

    scoring = Scoring(broken, whole)
    await send_all(scoring.groups, [make_group(make_prompt(0, 1))])
    await run_roles([scoring.scorer])
    [scored] = await taken(scoring.learner)
    assert scored.scores == {"broken": (None, None, None), "whole": (1.0, None, None)}
    assert scored.logged == {"seen": 3.0}
    incidents = await scoring.reports.incidents()
    assert [(i.kind, i.gid) for i in incidents] == [("reward_error", 1), ("reward_nonfinite", 1)]
    assert "ConnectionError: judge is away" in incidents[0].message


@pytest.mark.parametrize("answer", [[1.0], "111", [1.0, "x", 2.0]])
async def test_a_broken_contract_ends_the_run(answer: Any) -> None:
    def wrong(completions: list[str], **_: Any) -> Any:
        return answer

    scoring = Scoring(wrong)
    await send_all(scoring.groups, [make_group(make_prompt(0, 0))])
    with pytest.raises(RewardError, match="reward wrong returned"):
        await run_roles([scoring.scorer])
    assert await taken(scoring.learner) == []
    assert not ended(scoring.learner)


async def test_incidents_arrive_before_the_group_they_are_about() -> None:
    scoring = Scoring(lambda completions: [None, None, float("inf")])
    seen: list[object] = []
    sent_incident, sent_group = scoring.scorer.report.incident, scoring.scorer.outputs[0].send  # type: ignore[union-attr]

    async def note_incident(incident: Incident) -> None:
        seen.append(incident.kind)
        await sent_incident(incident)

    async def note_group(message: ScoredGroup) -> None:
        seen.append("group")
        await sent_group(message)

    scoring.scorer.report.incident = note_incident  # type: ignore[method-assign]
    scoring.scorer.outputs[0].send = note_group  # type: ignore[union-attr,method-assign]
    await send_all(scoring.groups, [make_group(make_prompt(0, 0))])
    await run_roles([scoring.scorer])
    assert seen == ["reward_nonfinite", "group"]


async def test_rewards_are_told_where_training_stands_by_the_slot_alone() -> None:
    states: list[TrainerState] = []

    def look(completions: list[str], trainer_state: TrainerState) -> list[float]:
        states.append(trainer_state)
        return [0.0] * len(completions)

    scoring = Scoring(look)
    await send_all(scoring.groups, [make_group(make_prompt(3, 1))])
    await run_roles([scoring.scorer])
    (state,) = states
    assert (state.global_step, state.max_steps, state.epoch, state.num_train_epochs) == (3, 9, 1.5, 5)
    assert (state.train_batch_size, state.is_world_process_zero, state.log_history) == (6, True, ())


async def test_prompting_is_held_while_a_reward_is_down_and_nothing_is_lost() -> None:
    up = anyio.Event()

    async def away(completions: list[str]) -> list[float]:
        if not up.is_set():
            raise ConnectionError("no judge")
        return [1.0] * len(completions)

    scoring = Scoring(away, breaker_failures=2)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_roles, [scoring.scorer])
        await send_all(scoring.groups, [make_group(make_prompt(0, place)) for place in range(5)])
        with anyio.fail_after(30):
            hold = await scoring.hold(held=True)
            up.set()
            await scoring.hold(held=False)
    assert hold.reasons[0].startswith("reward away is down: ConnectionError: no judge")
    groups = await taken(scoring.learner)
    assert sorted(group.scores["away"].count(None) for group in groups) == [0, 0, 0, 0, 3]
    kinds = [incident.kind for incident in await scoring.reports.incidents()]
    assert sorted(kinds) == ["reward_back", "reward_down", "reward_error"]


async def test_who_takes_over_scores_what_was_in_hand_and_says_what_is_down() -> None:
    up = anyio.Event()

    @batch_reward
    async def whole(completions: list[str]) -> list[float]:
        if not up.is_set():
            raise ConnectionError("no judge")
        return [float(len(completions))] * len(completions)

    scoring = Scoring(whole, breaker_failures=1)
    groups = [make_group(make_prompt(0, place)) for place in range(2)]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(scoring.scorer.run)
        for group in groups:
            await scoring.groups.send(group)
        with anyio.fail_after(30):
            await scoring.hold(held=True)
        tasks.cancel_scope.cancel()
    scoring.inbox.take_back()
    scoring.groups.close()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_roles, [scoring.another()])
        with anyio.fail_after(30):
            await scoring.hold(held=True)
            up.set()
    scored = await taken(scoring.learner)
    assert [(s.group, s.scores) for s in scored] == [(group, {"whole": (6.0,) * 3}) for group in groups]


async def test_scores_of_before_a_resume_are_used_once_and_only_for_the_same_completions() -> None:
    asked: list[int] = []

    def reward(completions: list[str], **_: Any) -> list[float]:
        asked.append(len(completions))
        return [0.5] * len(completions)

    same, other = make_group(make_prompt(0, 0), size=2), make_group(make_prompt(0, 1), size=2)
    before = make_group(make_prompt(0, 2), size=2)
    recorded = {
        0: ScoredGroup(group=same, scores={"reward": (0.0, 1.0)}),
        1: ScoredGroup(
            group=RolloutGroup(prompt=other.prompt, rollouts=before.rollouts), scores={"reward": (0.0, 1.0)}
        ),
    }
    scoring = Scoring(reward, recorded=recorded)
    await send_all(scoring.groups, [same, other])
    await scoring.rewards.start()
    await run_roles([scoring.scorer])
    await scoring.rewards.stop()
    scores = {group.group.prompt.gid: group.scores for group in await taken(scoring.learner)}
    assert scores == {0: {"reward": (0.0, 1.0)}, 1: {"reward": (0.5, 0.5)}}
    assert asked == [2]
    assert recorded == {}, "nothing stays that a later checkpoint would take for scored"
