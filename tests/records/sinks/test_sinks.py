"""Sinks in threads: order, failures, slowness, hanging, the end."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from tests.records.sinks.steps import Clock, update
from tests.support.fakes import DirectSinkThread, FakeSink
from troupe.messages import GroupClosed, Incident, Slot, Span, Update
from troupe.records.sinks.sinks import Sinks
from troupe.records.sinks.thread import SinkLimits, SinkThread

pytestmark = pytest.mark.anyio
PATIENCE_S = 60.0
SPAN = Span(actor="learner", name="learn", start_s=1.0, end_s=2.0)
OWN_SPAN = Span(actor="metrics", name="write trace", start_s=1.0, end_s=2.0)
INCIDENT = Incident(actor="scorer", kind="reward_timeout", message="late")
CLOSED = GroupClosed(gid=1, slot=Slot(step=0, place=0), state="trained", version=1)


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


IMPATIENT = SinkLimits(gather_s=0.0, first_pause_s=0.001, longest_pause_s=0.004)


def begun(
    *sinks: FakeSink,
    clock: Callable[[], float] | None = None,
    timeout_s: float = PATIENCE_S,
    limits: SinkLimits = IMPATIENT,
) -> Sinks:
    made = Sinks(sinks, timeout_s=timeout_s, clock=clock or Clock(), limits=limits)
    made.open()
    return made


async def test_every_sink_gets_what_it_takes_in_order_and_is_closed_once() -> None:
    one, other = FakeSink("one"), FakeSink("other")
    other.takes = (Update, Incident)
    sinks = begun(one, other)
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
    sinks = begun(sink)
    sinks.write(update(1))
    sinks.open()
    sinks.write(update(2))
    await sinks.close()
    assert opened == ["fake"]
    assert sink.got == [update(1), update(2)]


async def test_a_slow_sink_holds_up_nobody_and_writes_what_came_meanwhile_at_once() -> None:
    slow, quick = GatedSink("slow"), FakeSink("quick")
    sinks = begun(slow, quick)
    sinks.write(update(1))
    assert slow.reached.wait(PATIENCE_S)
    for step in range(2, 100):  # returns although nothing is written
        sinks.write(update(step))
    assert slow.got == []
    slow.gate.set()
    assert await sinks.close() == ()
    assert slow.got == quick.got == [update(step) for step in range(1, 100)]
    assert slow.flushes <= 3  # the first, the rest, and perhaps nothing at the end


async def test_a_sink_that_is_behind_is_given_no_more_spans_but_everything_else() -> None:
    slow = GatedSink()
    sinks = begun(slow, limits=SinkLimits(gather_s=0.0, most_waiting=3))
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
    sinks = begun(hanging, good, clock=clock, timeout_s=5.0 if at != "close" else 0.05)
    sinks.write(update(1))
    if at != "close":
        assert hanging.reached.wait(PATIENCE_S)
        assert sinks.news() == []
        clock.now_s += 5.5
        [incident] = sinks.news()
        why = "it has not come back for 5.5 s (metrics.sink_timeout_s is 5)"
        assert incident.kind == "sink_failed"
        assert incident.message == f"the sink hanging is switched off: {why}"
        assert sinks.news() == []
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
    sinks = begun(bad)
    for message in (update(1), SPAN, update(2), SPAN, update(3), SPAN, update(4)):
        sinks.write(message)
    [incident] = await sinks.close()
    assert incident.message == "the sink bad is switched off: OSError: disk full"
    assert (bad.attempts, bad.got, bad.closed) == (3, [SPAN, SPAN], 1)


async def test_a_package_that_would_end_the_program_ends_its_sink_only() -> None:
    class Leaving(FakeSink):
        def open(self) -> None:
            raise SystemExit("nobody is logged in")

    leaving, other = Leaving("leaving"), FakeSink("other")
    sinks = begun(leaving, other)
    sinks.write(update(1))
    [incident] = await sinks.close()
    assert incident.message == "the sink leaving is switched off: SystemExit: nobody is logged in"
    assert other.got == [update(1)]


async def test_a_sink_that_does_not_open_gets_nothing() -> None:
    bad = FakeSink("bad", opens=False)
    sinks = begun(bad)
    sinks.write(update(1))
    [incident] = await sinks.close()
    assert incident.message == "the sink bad is switched off: OSError: no such device"
    assert (bad.got, bad.closed) == ([], 1)


async def test_a_sink_that_does_not_close_is_told() -> None:
    class Stuck(FakeSink):
        def close(self) -> None:
            raise OSError("stale handle")

    sinks = begun(Stuck("stuck"))
    assert [incident.kind for incident in await sinks.close()] == ["sink_failed"]
    assert sinks.switched_off == {"stuck": "OSError: stale handle"}


async def test_writes_are_told_but_not_those_of_such_tellings() -> None:
    clock, sink = Clock(), GatedSink()
    sinks = begun(FakeSink("first"), sink, clock=clock)
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
    sinks = Sinks([sink], limits=SinkLimits(gather_s=PATIENCE_S))
    sinks.open()
    for _ in range(50):
        sinks.write(SPAN)
        sinks.write(CLOSED)
    sinks.write(update(1))  # wakes it
    await sinks.close()
    assert len(sink.got) == 101
    assert sink.flushes <= 2


class Disk(FakeSink):
    """A durable sink that cannot flush, or settle, while its disk is ill."""

    def __init__(self, name: str = "disk", *, ill: tuple[str, ...] = ()) -> None:
        super().__init__(name)
        self.notes: deque[Incident] = deque()
        self.ill = ill
        self.tries = 0
        self.tried = threading.Event()
        self.safe: list[object] = []
        self.settled: list[int] = []

    def open(self) -> None:
        self._try("open")

    def flush(self) -> None:
        self._try("flush")
        self.safe = list(self.got)

    def settle(self) -> None:
        self._try("settle")
        self.settled.append(len(self.safe))

    def _try(self, what: str) -> None:
        if what in self.ill:
            self.tries += 1
            if self.tries >= 3:
                self.tried.set()
            raise OSError(28, "No space left on device")


def kinds(incidents: list[Incident]) -> list[str]:
    return [incident.kind for incident in incidents]


async def until(holds: Callable[[], bool]) -> None:
    """Wait for a thread."""
    with anyio.fail_after(PATIENCE_S):
        while not holds():  # noqa: ASYNC110 - a thread cannot set an event of the loop's
            await anyio.sleep(0.001)


@pytest.mark.parametrize("call", ["open", "flush"])
async def test_a_disk_that_fails_for_a_while_loses_nothing(call: str) -> None:
    disk = Disk(ill=(call, "flush"))
    sinks = begun(disk)
    sinks.write(update(1))
    assert disk.tried.wait(PATIENCE_S)
    sinks.write(update(2))
    [failing] = sinks.news()
    assert failing.kind == "sink_failing"
    assert failing.message == (
        "the sink disk cannot write at the moment (OSError: [Errno 28] No space left on device); it keeps what comes "
        "and tries again"
    )
    assert sinks.news() == []
    disk.ill = ()
    await until(lambda: disk.safe == [update(1), update(2)])
    sinks.write(update(3))
    await until(lambda: len(disk.safe) == 3)
    assert kinds(sinks.news()) == ["sink_back"]
    assert await sinks.close() == ()
    assert (disk.safe, disk.closed) == ([update(1), update(2), update(3)], 1)
    assert sinks.switched_off == {}
    assert disk.settled == [3], "the end of a run is settled"


async def test_a_disk_that_never_comes_back_is_given_up_at_the_end() -> None:
    disk = Disk(ill=("flush",))
    sinks = begun(disk, timeout_s=0.1)
    sinks.write(update(1))
    sinks.write(update(2))
    assert kinds(list(await sinks.close())) == ["sink_failing", "sink_failed"]
    assert sinks.switched_off == {
        "disk": "OSError: [Errno 28] No space left on device; 2 messages were not written within 0.1 s of the run's "
        "end (metrics.sink_timeout_s)"
    }
    await until(lambda: disk.closed == 1)


async def test_a_disk_that_comes_back_at_the_end_is_waited_for() -> None:
    disk = Disk(ill=("flush", "settle"))
    sinks = begun(disk)
    sinks.write(update(1))
    closed: list[Incident] = []

    async def close() -> None:
        closed.extend(await sinks.close())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(close)
        await until(disk.tried.is_set)
        disk.ill = ("settle",)
        await until(lambda: disk.safe == [update(1)])
        disk.ill = ()
    assert kinds(closed) == ["sink_failing", "sink_back"]
    assert (disk.safe, disk.settled, disk.closed, sinks.switched_off) == ([update(1)], [1], 1, {})


async def test_a_disk_that_fails_while_too_much_comes_is_switched_off() -> None:
    disk, other = Disk(ill=("flush",)), FakeSink("other")
    sinks = begun(disk, other, limits=IMPATIENT._replace(most_waiting=5))
    for step in range(1, 6):
        sinks.write(update(step))
    assert disk.tried.wait(PATIENCE_S)
    assert kinds(sinks.news()) == ["sink_failing"]
    sinks.write(update(6))
    await until(lambda: sinks._threads[0].waiting == 6)
    [incident] = sinks.news()
    why = "OSError: [Errno 28] No space left on device; 6 messages wait, more than the 5 that may"
    assert sinks.switched_off == {"disk": why}
    assert incident.message == f"the sink disk is switched off: {why}"
    await sinks.close()
    assert len(other.got) == 6


async def test_a_durable_sink_that_fails_for_other_reasons_is_switched_off_as_any() -> None:
    class Wrong(Disk):
        def flush(self) -> None:
            raise ValueError("a bug")

    sinks = begun(Wrong())
    for step in range(1, 4):
        sinks.write(update(step))
        await until(lambda: sinks._threads[0].waiting >= step and not sinks._threads[0]._waiting)  # noqa: B023
    await sinks.close()
    assert sinks.switched_off == {"disk": "ValueError: a bug"}


async def test_notes_of_a_sink_are_told() -> None:
    disk = Disk()
    disk.notes.append(INCIDENT)
    sinks = begun(disk)
    assert await sinks.close() == (INCIDENT,)


def test_pauses_grow_up_to_a_limit() -> None:
    pauses: list[float] = []
    thread = DirectSinkThread(Disk(), 0, lambda write: None, time.perf_counter)

    class Change(threading.Condition):
        def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
            pauses.append(timeout or 0.0)

    thread._change = Change()
    for _ in range(8):
        thread._have_trouble("full")
        thread._next_batch()
    SinkThread.finish(thread)
    thread._next_batch()
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 0.1]


async def test_settled_comes_when_everything_put_before_is_on_every_durable_disk() -> None:
    slow, quick, plain = Disk("slow"), Disk("quick"), FakeSink("plain")
    gate = threading.Event()
    settle = slow.settle

    def gated() -> None:
        assert gate.wait(PATIENCE_S)
        settle()

    slow.settle = gated  # type: ignore[method-assign]
    sinks = begun(slow, plain, quick)
    done: list[int] = []

    async def wait(version: int) -> None:
        assert await sinks.settled(version)
        done.append(version)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait, 1)
        await anyio.wait_all_tasks_blocked()
        for step in (1, 2):
            sinks.write(CLOSED)
            sinks.write(update(step))
            if step == 1:
                sinks.settle(1)
        await until(lambda: quick.settled != [])
        await anyio.wait_all_tasks_blocked()
        assert done == []
        gate.set()
    assert done == [1]
    assert slow.settled[0] >= 2
    assert quick.settled[0] >= 2
    with anyio.move_on_after(0.01) as scope:
        await sinks.settled(2)
    assert scope.cancelled_caught, "nobody asked for the second"
    assert sinks._listeners == []
    sinks.settle(2)
    sinks.settle(1)  # asked again, as by a restarted actor
    assert await sinks.settled(2)
    assert await sinks.settled(1)
    await sinks.close()
    assert await sinks.settled(9), "the end is settled"


async def test_a_disk_that_hangs_is_waited_for_as_long_as_it_may() -> None:
    disk = GatedDisk()
    clock = Clock()
    sinks = begun(disk, timeout_s=0.05, clock=clock)
    sinks.write(update(1))
    sinks.settle(1)
    assert not await sinks.settled(1)
    clock.now_s += 1.0
    assert await sinks.settled(1), "a sink about to be switched off holds up nobody"
    assert kinds(sinks.news()) == ["sink_failed"]
    assert await sinks.settled(1)
    disk.gate.set()
    await sinks.close()


class GatedDisk(Disk):
    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def settle(self) -> None:
        assert self.gate.wait(PATIENCE_S)


async def test_a_disk_that_fails_holds_up_nobody_and_settles_when_it_is_back() -> None:
    disk = Disk(ill=("settle",))
    sinks = begun(disk)
    sinks.write(update(1))
    sinks.settle(1)
    assert await sinks.settled(1)
    assert disk.settled == []
    disk.ill = ()
    await until(lambda: disk.settled == [1])
    await until(lambda: sinks._threads[0].trouble is None)
    assert kinds(sinks.news()) == ["sink_failing", "sink_back"]
    assert await sinks.settled(1)
    await sinks.close()


async def test_without_durable_sinks_there_is_nothing_to_settle_and_before_opening_one_waits() -> None:
    assert await Sinks([FakeSink()]).settled(3)
    assert not await Sinks([Disk()], timeout_s=0.01).settled(3)
