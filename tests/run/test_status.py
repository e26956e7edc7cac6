"""Who has which group, what everybody does, and what is told when nothing moves."""

from __future__ import annotations

import math
import time
from typing import Any, ClassVar

import pytest

from tests.support.fakes import make_group, make_prompt, make_scored
from troupe.messages import GroupClosed, Incident, LiveGroup, Prompt, RolloutGroup, ScoredGroup, Slot, Span
from troupe.run.status import doing, gid_of, last_movement_s, live_groups, queues, stall
from troupe.runtime.actor import Actor
from troupe.runtime.mailbox import Mailbox
from troupe.runtime.reporter import Reporter

pytestmark = pytest.mark.anyio


class Player(Actor):
    """Stands about."""

    name: ClassVar[str] = "player"

    def __init__(self, name: str, *, last: bool = False) -> None:
        self.name = name  # type: ignore[misc]
        self.leaves_last = last  # type: ignore[misc]
        reports = Mailbox("reports")
        report = Reporter(
            name,
            reports.channel("incidents", Incident, bound=9),
            reports.channel("spans", Span, bound=9, overflow="drop_oldest"),
        )
        super().__init__(Mailbox(name), report=report)
        self.way_in = self.inbox.channel(f"to {name}", Prompt, RolloutGroup, ScoredGroup, GroupClosed, bound=9)

    async def handle(self, message: Any) -> None:
        raise AssertionError("it is never played")


def cast() -> list[Player]:
    return [Player(name) for name in ("prompter", "generator", "scorer", "learner")]


def alive(*prompts: Prompt, since_s: float = 90.0) -> dict[int, tuple[Slot, float]]:
    return {prompt.gid: (prompt.slot, since_s + i) for i, prompt in enumerate(prompts)}


async def test_a_group_belongs_to_who_has_it_furthest_down_the_line() -> None:
    actors = prompter, generator, scorer, learner = cast()
    prompts = [make_prompt(step, place) for step in range(3) for place in range(2)]
    for prompt in prompts[:5]:
        generator.way_in.send_nowait(prompt)
    for _ in range(4):
        await generator.inbox.take()
    scorer.way_in.send_nowait(make_group(prompts[0]))
    learner.way_in.send_nowait(make_scored(0, 1))
    groups = live_groups(alive(*prompts), actors, 100.0, handed_over={0, 1, 2})
    assert [(group.gid, group.owner, group.waiting) for group in groups] == [
        (0, "scorer", True),
        (1, "learner", True),
        (2, "learner", False),  # handed over, and with nobody else: it is among those that are collected
        (3, "generator", False),
        (4, "generator", True),
        (5, "learner", False),
    ]
    assert [group.age_s for group in groups] == [10.0, 9.0, 8.0, 7.0, 6.0, 5.0]
    assert groups[3].slot == Slot(step=1, place=1)
    await scorer.inbox.take()
    assert not live_groups(alive(prompts[0]), actors, 100.0)[0].waiting
    closed = GroupClosed(gid=5, slot=prompts[5].slot, state="trained", version=1)
    prompter.way_in.send_nowait(closed)
    assert live_groups(alive(prompts[5]), actors, 100.0)[0].owner == "prompter"
    assert gid_of("something else") is None


async def test_queues_are_those_of_the_data_channels() -> None:
    actors = cast()
    actors[0].inbox.channel("control", Prompt, bound=1, side=True).send_nowait(make_prompt(0, 0))
    actors[1].way_in.send_nowait(make_prompt(0, 0))
    assert queues(actors) == {"to prompter": 0, "to generator": 1, "to scorer": 0, "to learner": 0}


async def test_what_everybody_does_is_told_in_words() -> None:
    prompter, generator, scorer, learner = cast()
    with (
        prompter.report.span("idle", kind="wait"),
        learner.report.span("learn", step=3),
        scorer.report.span("score", gid=7),
        scorer.report.span("a"),
        scorer.report.span("b"),
        scorer.report.span("c"),
    ):
        elsewhere = Span(actor="generator", name="generate", start_s=time.perf_counter(), end_s=math.inf, process=7)
        generator.report.forward(elsewhere)
        now_s = time.perf_counter() + 300.0
        told = doing([prompter, generator, scorer, learner], now_s)
    assert told == {
        "prompter": "waits: idle for 300.0 s",
        "generator": "generate for 300.0 s",
        "scorer": "score of group 7 for 300.0 s, a for 300.0 s, b for 300.0 s, and 1 more",
        "learner": "learn for 300.0 s",
    }
    assert doing([prompter], now_s) == {"prompter": "nothing told"}


async def test_movement_is_a_message_taken_or_work_begun_on_a_device() -> None:
    actors = prompter, _generator, scorer, learner = cast()
    metrics = Player("metrics", last=True)
    begin_s = last_movement_s(actors)
    with scorer.report.span("score"), learner.report.span("idle", kind="wait"):
        assert last_movement_s(actors) == begin_s, "a reward that hangs does not move, nor does one who waits"
    with learner.report.span("learn"):
        learning_s = last_movement_s(actors)
    assert learning_s > begin_s
    metrics.way_in.send_nowait(make_prompt(0, 0))
    await metrics.inbox.take()
    assert last_movement_s([*actors, metrics]) == begin_s
    prompter.way_in.send_nowait(make_prompt(0, 0))
    await prompter.inbox.take()
    assert last_movement_s(actors) == prompter.inbox.moved_s > learning_s
    assert last_movement_s([]) == 0.0


OLDEST = LiveGroup(gid=12, slot=Slot(step=3, place=0, attempt=1), owner="scorer", waiting=False, age_s=640.4)


async def test_a_stall_names_the_oldest_group_and_what_everybody_waits_for() -> None:
    actors = _prompter, _generator, scorer, learner = cast()
    with scorer.report.span("score", gid=12), learner.report.span("idle", kind="wait"):
        incident = stall([OLDEST], actors, time.perf_counter() + 600.0, 600.2)
    assert (incident.actor, incident.kind, incident.gid) == ("supervisor", "stalled", 12)
    assert incident.message == (
        "nothing has moved for 600 s; the oldest group is 12 (step 3, place 0, attempt 1), with scorer, 640 s old; "
        "prompter: nothing told; generator: nothing told; scorer: score of group 12 for 600.0 s; "
        "learner: waits: idle for 600.0 s"
    )
    waiting = LiveGroup(gid=1, slot=Slot(step=0, place=1), owner="learner", waiting=True, age_s=1.0)
    assert "group is 1 (step 0, place 1, attempt 0), waiting for learner, 1 s old" in (
        stall([waiting], actors, 0.0, 600.0).message
    )


async def test_a_device_that_computes_is_named_and_not_called_dead() -> None:
    actors = cast()
    with actors[3].report.span("learn", step=3):
        incident = stall([], actors, time.perf_counter() + 300.0, 300.0)
    assert (incident.kind, incident.gid) == ("long_work", None)
    assert incident.message.startswith(
        "nothing has moved for 300 s; learner is computing `learn` since 300 s; prompter: nothing told; "
    )
    elsewhere = Span(actor="generator", name="generate", start_s=time.perf_counter(), end_s=math.inf, process=7)
    actors[1].report.forward(elsewhere)
    assert "generator is computing `generate` since" in stall([], actors, time.perf_counter(), 300.0).message
