"""The teacher: what it says of a group, once, whoever fails; and what it has no opinion of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from tests.support.episodes import acted
from tests.support.fakes import Reports, device_thread, ended, make_group, make_prompt, send_all, taken
from troupe.actors.teacher.actor import Teacher
from troupe.actors.teacher.forward import TeacherForward, Teachers, is_taught, with_log_probs
from troupe.messages import RolloutGroup, ScoredGroup, Span
from troupe.policy import Policy, load_policy
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.roles import Restarts, Role, run_roles

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> Policy:
    return load_policy(tiny_model)


def forward_of(policy: Policy) -> TeacherForward:
    return TeacherForward(policy.config, policy.weights, policy.base, 1.0)


def log_probs_of(policy: Policy, prompts: list[tuple[int, ...]], completions: list[tuple[int, ...]]) -> Any:
    return policy.compute_log_probs(prompts, completions).tolist()


def said(group: RolloutGroup) -> list[tuple[float, ...]]:
    return [rollout.teacher_log_probs for rollout in group.rollouts]


def test_it_says_what_the_policy_of_its_folder_says(policy: Policy) -> None:
    group = make_group(make_prompt(0, 0))
    taught = forward_of(policy).taught(group)
    ids = [rollout.token_ids for rollout in group.rollouts]
    expected = log_probs_of(policy, [group.prompt.prompt_ids] * len(ids), ids)
    for own, row in zip(said(taught), expected, strict=True):
        assert own == pytest.approx(row[: len(own)], abs=1e-5)
    assert with_log_probs(taught, [()] * len(ids)) == group, "nothing else has changed"
    by_row = replace(forward_of(policy), most_places=1)
    for own, alone in zip(said(taught), said(by_row.taught(group)), strict=True):
        assert own == pytest.approx(alone, abs=1e-5)


def test_each_row_of_an_episode_follows_its_own_prompt_and_what_was_observed_is_left_out(policy: Policy) -> None:
    """Three tokens sampled, two observed, two sampled in a row that begins anew."""
    episode = acted(3, 2, 2, rows=[(5, (70, 71, 72))])
    prompt = make_prompt(0, 0)
    [own] = said(forward_of(policy).taught(RolloutGroup(prompt=prompt, rollouts=(episode,))))
    first = log_probs_of(policy, [prompt.prompt_ids], [episode.token_ids[:5]])[0]
    second = log_probs_of(policy, [(70, 71, 72)], [episode.token_ids[5:]])[0]
    assert own == pytest.approx([*first[:3], 0.0, 0.0, *second], abs=1e-5)


def test_from_an_id_on_that_it_does_not_know_it_says_what_the_policy_said(policy: Policy) -> None:
    group = make_group(make_prompt(0, 0), size=1)
    [rollout] = group.rollouts
    odd = msgspec.structs.replace(rollout, token_ids=(10, 999, 10), log_probs=(-1.0, -2.0, -3.0))
    [own] = said(forward_of(policy).taught(replace_rollout(group, odd)))
    assert own[0] != -1.0
    assert own[1:] == (-2.0, -3.0)
    small = replace(forward_of(policy), config=msgspec.structs.replace(policy.config, vocab_size=8))
    assert said(small.taught(replace_rollout(group, odd))) == [(-1.0, -2.0, -3.0)], "not even the prompt is known"


def test_each_row_is_for_the_teacher_that_it_names(policy: Policy) -> None:
    """Another temperature stands for another teacher."""
    teachers = Teachers({"": forward_of(policy), "warm": replace(forward_of(policy), temperature=2.0)}, "who")
    told = {}
    for name, who in (("none", None), ("warm", "warm")):
        group = make_group(make_prompt(0, 0, who=who))
        told[name] = said(teachers.taught(group))
        assert told[name] == said(teachers.by_name[who or ""].taught(group))
    assert told["none"] != told["warm"]


def replace_rollout(group: RolloutGroup, rollout: object) -> RolloutGroup:
    return msgspec.structs.replace(group, rollouts=(rollout,))


class Lesson:
    """A teacher whose network is a count of what it was asked."""

    def __init__(self, recorded: dict[int, ScoredGroup] | None = None, fails: int = 0) -> None:
        self.inbox, self.scorer, self.reports = Mailbox("teacher"), Mailbox("scorer"), Reports()
        self.groups: Channel[RolloutGroup] = self.inbox.channel("untaught", RolloutGroup, bound=9)
        self.taught = self.scorer.channel("rollouts", RolloutGroup, bound=9)
        self.asked: list[int] = []
        self.recorded, self.fails = recorded, fails
        self.report, self.device = self.reports.reporter("teacher"), device_thread("teacher")

    def teach(self, group: RolloutGroup) -> RolloutGroup:
        self.asked.append(group.prompt.gid)
        if len(self.asked) <= self.fails:
            raise OSError("the device is away")
        return with_log_probs(group, [(-0.5,) * len(rollout.token_ids) for rollout in group.rollouts])

    def make(self) -> Teacher:
        return Teacher(
            self.inbox,
            self.taught,
            device=self.device,
            teach=self.teach,
            recorded=self.recorded,
            report=self.report,
        )

    async def of(self, *groups: RolloutGroup) -> list[RolloutGroup]:
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run_roles, [Role(self.make)], Restarts(first_s=0.0))
                await send_all(self.groups, groups)
        assert ended(self.scorer)
        return await taken(self.scorer)


async def test_groups_come_in_order_each_asked_about_once_and_with_a_span() -> None:
    lesson = Lesson()
    groups = [make_group(make_prompt(0, place)) for place in range(2)]
    taught = await lesson.of(*groups)
    assert [group.prompt.gid for group in taught] == lesson.asked == [0, 1]
    assert all(map(is_taught, taught))
    spans = [message for message in await taken(lesson.reports.mailbox) if isinstance(message, Span)]
    assert [(span.step, span.gid) for span in spans if span.name == "teach"] == [(0, 0), (0, 1)]


async def test_a_successor_is_asked_about_what_was_in_hand() -> None:
    lesson = Lesson(fails=2)
    taught = await lesson.of(*[make_group(make_prompt(0, place)) for place in range(2)])
    assert lesson.asked == [0, 0, 0, 1]
    assert [group.prompt.gid for group in taught] == [0, 1]


async def test_what_was_said_before_a_resume_is_not_asked_again_unless_completions_differ() -> None:
    groups = [make_group(make_prompt(0, place)) for place in range(3)]
    before = [with_log_probs(group, [(-7.0,) * len(r.token_ids) for r in group.rollouts]) for group in groups]
    other = make_group(make_prompt(5, 0))
    recorded = {
        0: ScoredGroup(group=before[0], scores={}),
        1: ScoredGroup(group=msgspec.structs.replace(before[1], rollouts=other.rollouts), scores={}),
    }
    lesson = Lesson(recorded)
    taught = await lesson.of(groups[0], groups[1], before[2])
    assert lesson.asked == [1], "the first was recorded, the last had it with it"
    assert (taught[0], taught[2]) == (before[0], before[2])
