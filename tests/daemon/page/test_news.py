"""News: what a trainer tells of incidents and completions, and what is left out."""

from __future__ import annotations

import anyio
import msgspec
import pytest

from tests.support.stored import acted, acted_rollout, closed, game_turn
from troupe.daemon.page.news import News, excerpt
from troupe.daemon.trainer import frames
from troupe.messages import GroupClosed, Incident
from troupe.runtime.frames import encode

pytestmark = pytest.mark.anyio


def incident(number: int, message: str = "late") -> Incident:
    return Incident(actor="scorer", kind="reward_timeout", message=f"{message} {number}")


async def test_those_that_are_alike_are_told_once_with_how_many() -> None:
    news = News()
    news.add(incident(1))
    for _ in range(400):
        news.add(incident(2))
    news.add(incident(1))
    told = news.collect()
    assert [(one.message, times) for one, times in zip(told.incidents, told.times, strict=True)] == [
        ("late 2", 400),
        ("late 1", 2),
    ]
    assert told.left_out == 0


async def test_the_newest_incidents_and_how_many_more() -> None:
    news = News()
    assert not news
    for number in range(20):
        news.add(incident(number))
    await news.some()
    told = news.collect()
    assert [one.message for one in told.incidents] == [f"late {number}" for number in range(4, 20)]
    assert told.left_out == 4
    assert not news
    with anyio.move_on_after(0) as waiting:
        await news.some()
    assert waiting.cancelled_caught


async def test_the_newest_groups() -> None:
    news = News()
    for step in range(1, 12):
        news.add(closed(step, 0))
    news.add(GroupClosed(gid=1, slot=closed(1, 0).slot, state="stale", version=12))
    assert [group.step for group in news.collect().groups] == list(range(4, 12)), (
        "there is nothing to see of the last one"
    )


async def test_the_best_and_the_worst_completion() -> None:
    group = excerpt(closed(3, 1, [0.5, None, 0.25, 1.0]))
    assert (group.step, group.state, group.rewards) == (3, "trained", (1.0, None, 0.5, 2.0))
    assert [(sample.sample, sample.reward, sample.scores) for sample in group.samples] == [
        (3, 2.0, {"r": 1.0}),
        (2, 0.5, {"r": 0.25}),
    ]
    rollout = closed(3, 1, [0.5, None, 0.25, 1.0]).scored.group.rollouts[3]  # type: ignore[union-attr]
    assert (group.samples[0].text, group.samples[0].tokens) == (rollout.text, len(rollout.token_ids))


@pytest.mark.parametrize("scores", [[1.0, 1.0, 1.0], [None, None, None], [None, 0.5, None]])
async def test_where_all_are_alike_the_first_two(scores: list[float | None]) -> None:
    assert [sample.sample for sample in excerpt(closed(1, 0, scores)).samples] == [0, 1]


async def test_a_group_without_rewards() -> None:
    group = excerpt(msgspec.structs.replace(closed(1, 0, [1.0]), rewards=()))
    assert (group.rewards, [sample.reward for sample in group.samples]) == ((None,), [None])


async def test_long_and_odd_text_is_cut_and_can_be_sent() -> None:
    news = News()
    news.add(incident(1, "x" * 5000))
    group = closed(1, 0, [0.0, 1.0])
    assert group.scored is not None
    rollouts = tuple(
        msgspec.structs.replace(rollout, text=f"begin {'ä' * 9000} \udcff end")
        for rollout in group.scored.group.rollouts
    )
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": None}]
    prompt = msgspec.structs.replace(group.scored.group.prompt, prompt=turns)
    scored = msgspec.structs.replace(
        group.scored, group=msgspec.structs.replace(group.scored.group, prompt=prompt, rollouts=rollouts)
    )
    news.add(msgspec.structs.replace(group, scored=scored))
    told = frames.decode_in_daemon(encode(news.collect()))
    assert isinstance(told, frames.Happened)
    assert len(told.incidents[0].message) < 1100
    text = told.groups[0].samples[0].text
    assert len(text) < 2100
    assert text.startswith("begin ä")
    assert " […] " in text
    assert text.endswith("ä ? end")
    assert told.groups[0].prompt == "system: be kind\nuser: null"


async def test_conversations_are_told_in_short() -> None:
    news = News()
    news.add(acted(1, 0))
    long = acted_rollout([game_turn(f"{turn}", "higher") for turn in range(200)])
    group = acted(2, 0)
    assert group.scored is not None
    told = msgspec.structs.replace(group.scored.group, rollouts=(long[0],) * 4, episodes=(long[1],) * 4)
    news.add(msgspec.structs.replace(group, scored=msgspec.structs.replace(group.scored, group=told)))
    sent = encode(news.collect())
    assert len(sent) < 30_000
    happened = frames.decode_in_daemon(sent)
    assert isinstance(happened, frames.Happened)
    best, worst = happened.groups[0].samples
    assert (best.tokens, best.read, best.text) == (81, 25, "")
    assert [one.turn for one in best.said if one.turn] == [1, 2, 3, 4, 5, 6]
    assert len(best.said[2].calls[0].result) < 700
    assert worst.said[-1].text == "I do not know."
    said = happened.groups[1].samples[0].said
    assert len(said) == 25
    assert said[12].text == "378 more messages"
    assert [one.text for one in said[-2:]] == ["199", "higher"]


def test_rows_of_an_evaluation_with_one_fault_are_one_incident_and_a_number() -> None:
    news = News()
    for row in range(400):
        news.add(Incident(actor="scorer", kind="late", message=f"evaluation of sums, row {row}: late, row 1: yes"))
    told = news.collect()
    assert [incident.message for incident in told.incidents] == ["evaluation of sums: late, row 1: yes"]
    assert (told.times, told.left_out) == ((400,), 0)
