"""Metrics: counting, sinks that fail, listeners, queues."""

from __future__ import annotations

from typing import TypeAlias

import anyio
import pytest

from tests.fakes import FakeSink, ended, taken
from troupe.actors.metrics import Metrics, Tally
from troupe.messages import ClosedState, Drain, GroupClosed, Incident, Slot, Span, Update
from troupe.runtime import Broadcast, Channel, Mailbox, play

pytestmark = pytest.mark.anyio
SPAN = Span(actor="learner", name="learn", start_s=1.0, end_s=2.0)
INCIDENT = Incident(actor="scorer", kind="reward_timeout", message="late")


Report: TypeAlias = Update | GroupClosed | Incident | Span


def update(step: int) -> Update:
    return Update(step=step, version=step, total_steps=9, metrics={"reward": float(step)})


def closed(gid: int, state: ClosedState) -> GroupClosed:
    return GroupClosed(gid=gid, slot=Slot(step=0, place=gid), state=state, version=1)


class Stage:
    def __init__(self, *sinks: FakeSink, watched: tuple[Mailbox, ...] = ()) -> None:
        self.inbox = Mailbox("metrics")
        self.reports: Channel[Report] = self.inbox.channel("reports", Update, GroupClosed, Incident, Span, bound=99)
        self.listeners: Broadcast[Update] = Broadcast("updates", Update)
        self.tally = Tally()
        self.metrics = Metrics(self.inbox, sinks=sinks, listeners=self.listeners, tally=self.tally, watched=watched)

    async def play(self, *messages: Report) -> None:
        for message in messages:
            await self.reports.send(message)
        self.reports.close()
        await play([self.metrics])


async def test_counts_and_hands_everything_to_every_sink_in_order() -> None:
    one, other = FakeSink("one"), FakeSink("other")
    stage = Stage(one, other)
    ends = closed(0, "trained"), closed(1, "quarantined"), closed(2, "trained")
    messages: list[Report] = [ends[0], SPAN, ends[1], update(1), INCIDENT, ends[2]]
    await stage.play(*messages)
    assert one.got == other.got == messages
    assert (one.closed, other.closed) == (1, 1)
    assert stage.tally.closed_groups == {"trained": 2, "quarantined": 1}
    assert stage.tally.incidents == {"reward_timeout": 1}
    assert stage.tally.switched_off_sinks == {}


async def test_a_sink_that_fails_three_times_is_switched_off_and_the_others_go_on() -> None:
    bad, good = FakeSink("bad", refuses=(Update,)), FakeSink("good")
    stage = Stage(bad, good)
    # the spans between, which such a sink leaves alone, do not make it healthy
    await stage.play(update(1), SPAN, update(2), SPAN, update(3), SPAN, update(4))
    assert bad.attempts == 3
    assert bad.got == [SPAN, SPAN]
    assert bad.closed == 1
    [incident] = [message for message in good.got if isinstance(message, Incident)]
    assert (incident.kind, incident.message) == ("sink_failed", "the sink bad is switched off: disk full")
    assert [message.step for message in good.got if isinstance(message, Update)] == [1, 2, 3, 4]
    assert stage.tally.switched_off_sinks == {"bad": "OSError: disk full"}
    assert stage.tally.incidents == {"sink_failed": 1}


async def test_a_sink_that_recovers_stays() -> None:
    sink = FakeSink("shaky", refuses=(Update,))
    stage = Stage(sink)
    for message in (update(1), update(2)):
        await stage.metrics.handle(message)
    sink.refuses = ()
    await stage.metrics.handle(update(3))
    sink.refuses = (Update,)
    await stage.play(update(4), update(5))
    assert sink.attempts == 4
    assert stage.tally.switched_off_sinks == {}


async def test_sinks_that_fail_together_are_both_switched_off() -> None:
    """The second fails for the third time on the incident about the first, while both still take the update."""
    first = FakeSink("first", refuses=(Update,))
    second = FakeSink("second", refuses=(Update, Incident))
    third = FakeSink("third")
    stage = Stage(first, second, third)
    await stage.play(INCIDENT, INCIDENT, update(1), update(2), update(3), update(4))
    assert stage.tally.switched_off_sinks == {"first": "OSError: disk full", "second": "OSError: disk full"}
    assert stage.tally.incidents == {"reward_timeout": 2, "sink_failed": 2}
    assert [message.step for message in third.got if isinstance(message, Update)] == [1, 2, 3, 4]


async def test_a_sink_that_does_not_open_is_switched_off_at_once() -> None:
    bad, good = FakeSink("bad", opens=False), FakeSink("good")
    stage = Stage(bad, good)
    await stage.play(update(1))
    assert bad.got == []
    assert stage.tally.switched_off_sinks == {"bad": "OSError: no such device"}
    assert [type(message) for message in good.got] == [Incident, Update]


async def test_listeners_get_updates_of_which_a_slow_one_keeps_the_newest() -> None:
    stage = Stage()
    slow, late = stage.listeners.listen(2), Mailbox("none yet")
    for step in range(1, 6):
        await stage.metrics.handle(update(step))
        if step == 3:
            late = stage.listeners.listen(9)
    await stage.play()
    assert [message.step for message in await taken(slow)] == [4, 5]
    assert [message.step for message in await taken(late)] == [4, 5]
    assert ended(slow)
    assert ended(late)


async def test_updates_carry_the_queues() -> None:
    watched, sink = Mailbox("learner"), FakeSink()
    scored = watched.channel("scored", Incident, bound=5)
    watched.channel("request", Drain, bound=1, side=True)
    scored.send_nowait(INCIDENT)
    scored.send_nowait(INCIDENT)
    await Stage(sink, watched=(watched,)).play(update(1))
    [written] = sink.got
    assert isinstance(written, Update)
    assert written.metrics == {"reward": 1.0, "queue/scored/depth": 2.0, "queue/scored/wait_s": 0.0}


async def test_what_was_reported_before_a_cancel_is_still_written() -> None:
    sink = FakeSink()
    stage = Stage(sink)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stage.metrics.run)
        await anyio.wait_all_tasks_blocked()
        stage.reports.send_nowait(closed(0, "trained"))
        stage.reports.send_nowait(update(1))
        tasks.cancel_scope.cancel()
    assert sink.got == [closed(0, "trained"), update(1)]
    assert stage.tally.closed_groups == {"trained": 1}
    assert sink.closed == 1


async def test_a_sink_that_does_not_close_is_told_at_the_end() -> None:
    class Stuck(FakeSink):
        def close(self) -> None:
            raise OSError("stale handle")

    stage = Stage(Stuck("stuck"))
    await stage.play(update(1))
    assert stage.tally.switched_off_sinks == {"stuck": "stale handle"}
