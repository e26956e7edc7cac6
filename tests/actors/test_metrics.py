"""Metrics: counting, sinks that fail, listeners, queues."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import anyio
import pytest

from tests.support.fakes import DirectSinkThread, FakeSink, ended, taken
from tests.support.trace_events import read_trace
from troupe.actors.metrics import Heard, Metrics, Tally
from troupe.messages import CheckpointWritten, ClosedState, Drain, GroupClosed, Incident, Settle, Slot, Span, Update
from troupe.records.sinks.jsonl import JsonlSink
from troupe.records.sinks.sinks import Sinks
from troupe.records.sinks.thread import SinkLimits, SinkThread
from troupe.records.sinks.trace import TraceWriter
from troupe.runtime.broadcast import Broadcast
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.reporter import Reporter
from troupe.runtime.roles import Restarts, Role, run_roles

pytestmark = pytest.mark.anyio
SPAN = Span(actor="learner", name="learn", start_s=1.0, end_s=2.0)
INCIDENT = Incident(actor="scorer", kind="reward_timeout", message="late")


Report: TypeAlias = Update | GroupClosed | Incident | CheckpointWritten | Span


def update(step: int) -> Update:
    return Update(step=step, version=step, total_steps=9, metrics={"reward": float(step)})


def closed(gid: int, state: ClosedState) -> GroupClosed:
    return GroupClosed(gid=gid, slot=Slot(step=0, place=gid), state=state, version=1)


class Rig:
    def __init__(
        self,
        *sinks: FakeSink,
        watched: tuple[Mailbox, ...] = (),
        reporters: tuple[Reporter, ...] = (),
        thread: Callable[..., SinkThread] = SinkThread,
    ) -> None:
        self.inbox = Mailbox("metrics")
        self.reports: Channel[Report] = self.inbox.channel(
            "reports", Update, GroupClosed, Incident, CheckpointWritten, Span, bound=99
        )
        self.listeners: Broadcast[Heard] = Broadcast("news", Update, GroupClosed, Incident)
        self.tally = Tally()
        self.sinks = Sinks(sinks, limits=SinkLimits(gather_s=0.0), thread=thread)
        self.now_s = 100.0
        self.watched, self.reporters = watched, reporters
        self.metrics = self.make()

    def make(self) -> Metrics:
        return Metrics(
            self.inbox,
            sinks=self.sinks,
            listeners=self.listeners,
            tally=self.tally,
            watched=self.watched,
            reporters=self.reporters,
            clock=lambda: self.now_s,
        )

    async def run(self, *messages: Report) -> None:
        for message in messages:
            await self.reports.send(message)
        self.reports.close()
        await run_roles([self.metrics])


def told(sink: FakeSink) -> list[object]:
    """What a sink got, without the spans of the sinks' own writes."""
    return [message for message in sink.got if not (isinstance(message, Span) and message.actor == "metrics")]


def steps(sink: FakeSink) -> list[int]:
    return [message.step for message in sink.got if isinstance(message, Update)]


async def test_counts_and_hands_everything_to_every_sink_in_order() -> None:
    one, other = FakeSink("one"), FakeSink("other")
    rig = Rig(one, other)
    ends = closed(0, "trained"), closed(1, "quarantined"), closed(2, "trained")
    written = CheckpointWritten(version=1, folder="c", bytes=1, seconds=0.1)
    messages: list[Report] = [ends[0], SPAN, ends[1], INCIDENT, written, ends[2]]
    await rig.run(*messages)
    assert told(one) == told(other) == messages
    assert (one.closed, other.closed) == (1, 1)
    assert rig.tally.closed_groups == {"trained": 2, "quarantined": 1}
    assert rig.tally.incidents == {"reward_timeout": 1}
    assert rig.tally.switched_off_sinks == {}


async def test_a_sink_that_fails_is_an_incident_for_the_others() -> None:
    bad, good = FakeSink("bad", refuses=(Update,)), FakeSink("good")
    rig = Rig(bad, good, thread=DirectSinkThread)
    await rig.run(update(1), SPAN, update(2), SPAN, update(3), SPAN, update(4))
    assert bad.attempts == 3
    assert bad.closed == 1
    [incident] = [message for message in good.got if isinstance(message, Incident)]
    assert (incident.kind, incident.message) == ("sink_failed", "the sink bad is switched off: OSError: disk full")
    assert steps(good) == [1, 2, 3, 4]
    assert rig.tally.switched_off_sinks == {"bad": "OSError: disk full"}
    assert rig.tally.incidents == {"sink_failed": 1}


async def test_sinks_that_fail_together_are_both_switched_off() -> None:
    """The second fails for the third time on the incident about the first, while both still take the update."""
    first = FakeSink("first", refuses=(Update,))
    second = FakeSink("second", refuses=(Update, Incident))
    third = FakeSink("third")
    rig = Rig(first, second, third, thread=DirectSinkThread)
    await rig.run(INCIDENT, INCIDENT, update(1), update(2), update(3), update(4))
    assert rig.tally.switched_off_sinks == {"first": "OSError: disk full", "second": "OSError: disk full"}
    assert rig.tally.incidents == {"reward_timeout": 2, "sink_failed": 2}
    assert steps(third) == [1, 2, 3, 4]


async def test_listeners_hear_of_groups_and_incidents_those_of_sinks_too() -> None:
    rig = Rig(FakeSink("bad", refuses=(GroupClosed,)), thread=DirectSinkThread)
    incidents, groups = rig.listeners.listen(9, Incident), rig.listeners.listen(9, GroupClosed)
    ends = [closed(gid, "trained") for gid in range(3)]
    await rig.run(INCIDENT, *ends)
    assert await taken(groups) == ends
    heard = await taken(incidents)
    assert [incident.kind for incident in heard] == ["reward_timeout", "sink_failed"]


async def test_listeners_get_updates_of_which_a_slow_one_keeps_the_newest() -> None:
    rig = Rig()
    slow, late = rig.listeners.listen(2), Mailbox("none yet")
    for step in range(1, 6):
        await rig.metrics.handle(update(step))
        if step == 3:
            late = rig.listeners.listen(9)
    await rig.run()
    assert [message.step for message in await taken(slow)] == [4, 5]
    assert [message.step for message in await taken(late)] == [4, 5]
    assert ended(slow)
    assert ended(late)


async def test_updates_carry_the_queues_and_what_was_dropped() -> None:
    watched = Mailbox("learner")
    scored = watched.channel("scored", Incident, bound=5)
    watched.channel("request", Drain, bound=1, side=True)
    scored.send_nowait(INCIDENT)
    scored.send_nowait(INCIDENT)
    rig = Rig(watched=(watched,))
    spans = rig.inbox.channel("spans", Span, bound=2, overflow="drop_oldest", side=True)
    for _ in range(5):
        spans.send_nowait(SPAN)
    listener = rig.listeners.listen(9)
    await rig.run(update(1))
    [told_update] = await taken(listener)
    assert told_update.metrics == {
        "reward": 1.0,
        "queue/scored/depth": 2.0,
        "queue/scored/wait_s": 0.0,
        "spans_dropped": 3.0,
    }


async def test_updates_say_where_the_time_went() -> None:
    learning = Mailbox("nobody")
    spans = learning.channel("spans", Span, bound=9, overflow="drop_oldest")
    reporter = Reporter("generator", None, spans, clock=lambda: rig.now_s)
    rig = Rig(reporters=(reporter,))
    listener = rig.listeners.listen(9)
    await rig.metrics.handle(Span(actor="learner", name="learn", start_s=101.0, end_s=104.0))
    await rig.metrics.handle(Span(actor="scorer", name="score", start_s=103.0, end_s=106.0))
    rig.now_s = 105.0
    with reporter.span("decode"):
        rig.now_s = 110.0
        await rig.metrics.handle(update(1))
    [told_update] = await taken(listener)
    times = {key: value for key, value in told_update.metrics.items() if key.startswith("time/")}
    assert times["time/learner/busy"] == pytest.approx(0.3)
    assert times["time/scorer/busy"] == pytest.approx(0.3)
    assert times["time/reward/hidden_s"] == pytest.approx(2.0)
    assert times["time/reward/exposed_s"] == pytest.approx(1.0)
    assert times["time/generator/busy"] == pytest.approx(0.5)


async def test_writes_of_the_sinks_are_its_own_work() -> None:
    sink = FakeSink("disk")
    rig = Rig(sink, thread=DirectSinkThread)
    await rig.run(INCIDENT, closed(0, "trained"), SPAN)
    own = [message for message in sink.got if isinstance(message, Span) and message.actor == "metrics"]
    assert [(span.name, span.lane) for span in own] == [("write disk", 0)]  # of the incident; told with the group


async def test_a_successor_goes_on_with_the_same_open_sinks(tmp_path: Path) -> None:
    jsonl = JsonlSink(tmp_path / "metrics.jsonl")
    rig = Rig()
    rig.sinks = Sinks([jsonl, TraceWriter(tmp_path / "trace.json")])
    failing = [2, 4]

    class Frail(Metrics):
        async def handle(self, message: Any) -> None:
            if isinstance(message, Update) and message.step in failing:
                failing.remove(message.step)
                raise OSError("out of luck")
            await super().handle(message)

    def make() -> Metrics:
        return Frail(rig.inbox, sinks=rig.sinks, listeners=rig.listeners, tally=rig.tally)

    for step in range(1, 6):
        await rig.reports.send(update(step))
        await rig.reports.send(closed(step, "trained"))
        await rig.reports.send(Span(actor="learner", name="learn", start_s=float(step), end_s=step + 0.5))
    rig.reports.close()
    await run_roles([Role(make)], Restarts(first_s=0.0))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert rig.tally.closed_groups == {"trained": 5}
    trace = read_trace(json.loads((tmp_path / "trace.json").read_text()))
    assert [piece.name for piece in trace.slices].count("learn") == 5


@pytest.mark.parametrize("at", ["writes", "news", "write"])
async def test_what_is_handed_over_again_is_counted_once(monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """The sinks fail before they have taken the message."""
    rig = Rig(FakeSink())
    working, failures = getattr(rig.sinks, at), [OSError("out of luck")]

    def failing(*given: object) -> object:
        if failures:
            raise failures.pop()
        return working(*given)

    monkeypatch.setattr(rig.sinks, at, failing)
    await rig.reports.send(closed(0, "trained"))
    await rig.reports.send(INCIDENT)
    rig.reports.close()
    await run_roles([Role(rig.make)], Restarts(first_s=0.0))
    assert failures == []
    assert rig.tally.closed_groups == {"trained": 1}
    assert rig.tally.incidents["reward_timeout"] == 1


async def test_what_was_told_before_is_settled_also_by_a_successor(tmp_path: Path) -> None:
    """The first actor fails with the request in hand; who asked waits until the second has had it carried out."""
    path = tmp_path / "metrics.jsonl"
    rig = Rig()
    rig.sinks = Sinks([JsonlSink(path)], limits=SinkLimits(gather_s=0.0))
    settles = rig.inbox.channel("settle", Settle, bound=1, overflow="newest", side=True)
    failures = [OSError("out of luck")]
    seen: list[list[int]] = []

    class Frail(Metrics):
        async def handle(self, message: Any) -> None:
            if isinstance(message, Settle) and failures:
                raise failures.pop()
            await super().handle(message)

    def make() -> Metrics:
        return Frail(rig.inbox, sinks=rig.sinks, listeners=rig.listeners, tally=rig.tally)

    async def checkpoint() -> None:
        for step in (1, 2):
            await rig.reports.send(update(step))
        settles.send_nowait(Settle(version=2))
        assert await rig.sinks.settled(2)
        seen.append([json.loads(line)["step"] for line in path.read_text().splitlines()])
        rig.reports.close()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(checkpoint)
        await run_roles([Role(make)], Restarts(first_s=0.0))
    assert seen == [[1, 2]]
    assert failures == []


async def test_a_step_of_a_thousand_spans_costs_little(tmp_path: Path) -> None:
    """Measured at 15 to 20 ms, the writing included; the bound is wide, for the machine may be busy."""
    rig = Rig()
    rig.sinks = Sinks([TraceWriter(tmp_path / "trace.json")])
    metrics = rig.make()
    await metrics.start()
    costs_s = []
    for step in range(5):
        start_s = time.perf_counter()
        for i in range(1000):
            began_s = 100.0 + step + i / 1000
            await metrics.handle(
                Span(actor="scorer", name="score", start_s=began_s, end_s=began_s + 0.01, lane=i % 16, gid=i)
            )
        rig.now_s = 101.0 + step
        await metrics.handle(update(step + 1))
        costs_s.append(time.perf_counter() - start_s)
    await metrics.finish()
    assert min(costs_s) < 0.3


async def test_findings_come_with_the_step_and_a_step_that_comes_once_more_counts_once() -> None:
    sink, times = FakeSink(), 40
    rig = Rig(sink)
    figures = {"reward": 0.0, "reward_std": 0.0, "frac_reward_zero_std": 1.0}
    steps = [Update(step=step, version=step, total_steps=99, metrics=figures) for step in range(1, times)]
    await rig.run(*(update for update in steps for _ in range(2)))
    updates = [message for message in told(sink) if isinstance(message, Update)]
    begun = next(update for update in updates if update.findings)
    assert begun.step == 32
    assert begun.findings[0].rule == "no_signal"
    assert begun.findings[0].since == 28
    assert begun.metrics["diagnosis/no_signal"] == 1.0
    assert rig.tally.diagnosis.findings == updates[-1].findings
