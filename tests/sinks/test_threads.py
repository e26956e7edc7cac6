"""Sinks in threads: order, failures, slowness, hanging, the end."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from tests.fakes import FakeSink
from troupe.messages import GroupClosed, Incident, Slot, Span, Update
from troupe.sinks import Sinks

pytestmark = pytest.mark.anyio
PATIENCE_S = 60.0
SPAN = Span(actor="learner", name="learn", start_s=1.0, end_s=2.0)
OWN_SPAN = Span(actor="metrics", name="write trace", start_s=1.0, end_s=2.0)
INCIDENT = Incident(actor="scorer", kind="reward_timeout", message="late")
CLOSED = GroupClosed(gid=1, slot=Slot(step=0, place=0), state="trained", version=1)


def update(step: int) -> Update:
    return Update(step=step, version=step, total_steps=9, metrics={})


class GatedSink(FakeSink):
    """A sink whose calls of one kind do not come back before its gate is open."""

    def __init__(self, name: str = "gated", at: str = "write") -> None:
        super().__init__(name)
        self.at = at
        self.gate = threading.Event()
        self.reached = threading.Event()
        self.flushes = 0

    def open(self) -> None:
        self._pass("open")

    def write(self, message: object) -> None:
        self._pass("write")
        super().write(message)

    def flush(self) -> None:
        self.flushes += 1
        self._pass("flush")

    def close(self) -> None:
        self._pass("close")
        super().close()

    def _pass(self, call: str) -> None:
        if call == self.at:
            self.reached.set()
            assert self.gate.wait(PATIENCE_S)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def playing(*sinks: FakeSink, clock: Callable[[], float] | None = None, timeout_s: float = PATIENCE_S) -> Sinks:
    made = Sinks(sinks, timeout_s=timeout_s, clock=clock or Clock(), gather_s=0.0)
    made.open()
    return made


async def test_every_sink_gets_what_it_takes_in_order_and_is_closed_once() -> None:
    one, other = FakeSink("one"), FakeSink("other")
    other.takes = (Update, Incident)
    sinks = playing(one, other)
    messages = [SPAN, update(1), CLOSED, INCIDENT, SPAN, update(2)]
    for message in messages:
        sinks.write(message)
    assert await sinks.close() == ()
    assert one.got == messages
    assert other.got == [update(1), INCIDENT, update(2)]
    assert (one.closed, other.closed) == (1, 1)
    assert await sinks.close() == ()
    sinks.open()  # by a successor that comes too late
    sinks.write(update(3))
    assert (one.closed, len(one.got)) == (1, 6)


async def test_opening_twice_is_once() -> None:
    """A restarted actor goes on with the sinks that are open."""
    opened = []

    class Counting(FakeSink):
        def open(self) -> None:
            opened.append(self.name)

    sink = Counting()
    sinks = playing(sink)
    sinks.write(update(1))
    sinks.open()
    sinks.write(update(2))
    await sinks.close()
    assert opened == ["fake"]
    assert sink.got == [update(1), update(2)]


async def test_a_slow_sink_holds_up_nobody_and_writes_what_came_meanwhile_at_once() -> None:
    slow, quick = GatedSink("slow"), FakeSink("quick")
    sinks = playing(slow, quick)
    sinks.write(update(1))
    assert slow.reached.wait(PATIENCE_S)
    for step in range(2, 100):  # returns although nothing is written
        sinks.write(update(step))
    assert slow.got == []
    slow.gate.set()
    assert await sinks.close() == ()
    assert slow.got == quick.got == [update(step) for step in range(1, 100)]
    assert slow.flushes <= 3  # the first, the rest, and perhaps nothing at the end


async def test_a_sink_that_is_behind_is_given_no_more_spans_but_everything_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("troupe.sinks.threads._MOST_WAITING", 3)
    slow = GatedSink()
    sinks = playing(slow)
    sinks.write(update(1))
    assert slow.reached.wait(PATIENCE_S)
    for message in (SPAN, SPAN, SPAN, SPAN, SPAN, update(2), CLOSED, SPAN, INCIDENT):
        sinks.write(message)
    assert sinks.dropped == 3
    slow.gate.set()
    await sinks.close()
    assert slow.got == [update(1), SPAN, SPAN, SPAN, update(2), CLOSED, INCIDENT]


@pytest.mark.parametrize("at", ["open", "write", "flush", "close"])
async def test_a_hanging_sink_is_switched_off_and_the_others_go_on(at: str) -> None:
    clock = Clock()
    hanging, good = GatedSink("hanging", at), FakeSink("good")
    sinks = playing(hanging, good, clock=clock, timeout_s=5.0 if at != "close" else 0.05)
    sinks.write(update(1))
    if at != "close":
        assert hanging.reached.wait(PATIENCE_S)
        assert sinks.failed() == []
        clock.now_s += 5.5
        [incident] = sinks.failed()
        why = "it has not come back for 5.5 s (metrics.sink_timeout_s is 5)"
        assert incident.kind == "sink_failed"
        assert incident.message == f"the sink hanging is switched off: {why}"
        assert sinks.failed() == []
        sinks.write(update(2))
        assert await sinks.close() == ()
    else:
        [incident] = await sinks.close()
        why = "0 messages were not written within 0.05 s of the run's end (metrics.sink_timeout_s)"
    assert sinks.switched_off == {"hanging": why}
    assert good.got == [update(1), update(2)][: len(good.got)]
    assert good.closed == 1
    hanging.gate.set()  # it comes back, and finds that nobody waits
    assert update(2) not in hanging.got


async def test_three_failures_in_a_row_on_one_type_are_enough() -> None:
    bad = FakeSink("bad", refuses=(Update,))
    sinks = playing(bad)
    for message in (update(1), SPAN, update(2), SPAN, update(3), SPAN, update(4)):
        sinks.write(message)
    [incident] = await sinks.close()
    assert incident.message == "the sink bad is switched off: OSError: disk full"
    assert (bad.attempts, bad.got, bad.closed) == (3, [SPAN, SPAN], 1)


async def test_a_sink_that_does_not_open_gets_nothing() -> None:
    bad = FakeSink("bad", opens=False)
    sinks = playing(bad)
    sinks.write(update(1))
    [incident] = await sinks.close()
    assert incident.message == "the sink bad is switched off: OSError: no such device"
    assert (bad.got, bad.closed) == ([], 1)


async def test_a_sink_that_does_not_close_is_told() -> None:
    class Stuck(FakeSink):
        def close(self) -> None:
            raise OSError("stale handle")

    sinks = playing(Stuck("stuck"))
    assert [incident.kind for incident in await sinks.close()] == ["sink_failed"]
    assert sinks.switched_off == {"stuck": "OSError: stale handle"}


async def test_writes_are_told_but_not_those_of_such_tellings() -> None:
    clock, sink = Clock(), GatedSink()
    sinks = playing(FakeSink("first"), sink, clock=clock)
    sink.takes = ()
    sinks._threads[1].takes = (Update,)
    sinks.write(update(1))
    assert sink.reached.wait(PATIENCE_S)
    clock.now_s += 0.5
    sink.gate.set()
    sinks.write(OWN_SPAN)
    await sinks.close()
    told = sinks.writes()
    assert ("gated", 1, 100.0, 100.5) in told
    assert len([write for write in told if write.sink == "first"]) == 1  # the update; its own span makes none
    assert sinks.writes() == []


async def test_spans_are_gathered_before_a_sink_is_woken_for_them() -> None:
    sink = GatedSink(at="nowhere")
    sinks = Sinks([sink], gather_s=PATIENCE_S)
    sinks.open()
    for _ in range(50):
        sinks.write(SPAN)
        sinks.write(CLOSED)
    sinks.write(update(1))  # wakes it
    await sinks.close()
    assert len(sink.got) == 101
    assert sink.flushes <= 2
