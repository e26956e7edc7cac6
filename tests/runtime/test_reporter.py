"""Reporter: lanes, nesting, spans of other threads, and what is going on now."""

from __future__ import annotations

import math
import random
import time

import anyio
import msgspec
import pytest

from tests.support.fakes import taken
from troupe.messages import Incident, Span
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.reporter import Reporter

pytestmark = pytest.mark.anyio


class Desk:
    """A reporter, a clock that it reads, and what it told."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.box = Mailbox("metrics")
        self.spans: Channel[Span] = self.box.channel("spans", Span, bound=9999, overflow="drop_oldest")
        self.report = Reporter("scorer", None, self.spans, clock=lambda: self.now_s)

    async def told(self) -> list[tuple[str, float, float, int]]:
        return [(span.name, span.start_s, span.end_s, span.lane) for span in await taken(self.box)]


@pytest.fixture
def desk() -> Desk:
    return Desk()


async def test_a_span_says_all_that_it_was_told(desk: Desk) -> None:
    with desk.report.span("room", step=3, gid=7, gids=[8, 9], kind="wait"):
        desk.now_s = 2.5
    assert await taken(desk.box) == [
        Span(actor="scorer", name="room", start_s=0.0, end_s=2.5, kind="wait", step=3, gid=7, gids=(8, 9), lane=0)
    ]


async def test_a_child_tells_of_beginnings_too_and_the_parent_knows_what_it_is_at(desk: Desk) -> None:
    child_box = Mailbox("frames")
    child = Reporter(
        "generator", None, child_box.channel("spans", Span, bound=99), process=77, clock=lambda: desk.now_s
    )
    with child.span("decode", step=3):
        desk.now_s = 1.0
        with child.span("hand over", gid=5):
            for span in await taken(child_box):
                desk.report.forward(span)
            desk.now_s = 2.0
            assert [(s.actor, s.name, s.start_s, s.end_s, s.process) for s in desk.report.doing] == [
                ("generator", "decode", 0.0, 2.0, 77),
                ("generator", "hand over", 1.0, 2.0, 77),
            ]
        for span in await taken(child_box):
            desk.report.forward(span)
    assert [span.name for span in desk.report.doing] == ["decode"]
    desk.report.forget(76)
    assert [span.name for span in desk.report.doing] == ["decode"]
    desk.report.forget(77)  # it died
    assert desk.report.doing == []
    assert await desk.told() == [("hand over", 1.0, 2.0, 0)]
    for span in await taken(child_box):
        desk.report.forward(span)
    assert await desk.told() == [("decode", 0.0, 2.0, 0)]


async def test_members_with_the_same_pid_are_not_mixed_up(desk: Desk) -> None:
    begun = Span(actor="generator", name="decode", start_s=0.0, end_s=math.inf, process=77, member="laptop")
    desk.report.forward(begun)
    desk.report.forward(msgspec.structs.replace(begun, member="studio"))
    desk.report.forward(msgspec.structs.replace(begun, member="studio", end_s=1.0))
    assert [span.member for span in desk.report.doing] == ["laptop"]
    desk.report.forget_member("studio")
    assert len(desk.report.doing) == 1
    desk.report.forget_member("laptop")
    assert desk.report.doing == []


async def test_what_one_task_does_within_its_work_shares_the_lane_and_what_others_do_does_not(desk: Desk) -> None:
    go_on = anyio.Event()

    async def score(name: str) -> None:
        with desk.report.span(name):
            await go_on.wait()
            with desk.report.span(f"part of {name}"):
                desk.now_s += 1

    async with anyio.create_task_group() as tasks:
        with desk.report.span("idle", kind="wait"):
            tasks.start_soon(score, "one")
            tasks.start_soon(score, "two")
            await anyio.wait_all_tasks_blocked()
            assert [(span.name, span.kind, span.lane) for span in desk.report.doing] == [
                ("idle", "wait", 0),
                ("one", "work", 1),
                ("two", "work", 2),
            ]
            desk.now_s = 10.0
        go_on.set()
    with desk.report.span("after"):
        desk.now_s += 1
    assert await desk.told() == [
        ("idle", 0.0, 10.0, 0),
        ("part of one", 10.0, 11.0, 1),
        ("one", 0.0, 11.0, 1),
        ("part of two", 11.0, 12.0, 2),
        ("two", 0.0, 12.0, 2),
        ("after", 12.0, 13.0, 0),
    ]
    assert desk.report.doing == []


async def test_work_timed_elsewhere_lies_within_what_its_task_does_if_it_fits(desk: Desk) -> None:
    desk.now_s = 1.0
    with desk.report.span("decode"):
        desk.report.record("prefill", 1.5, 2.0)
        desk.report.record("token", 2.0, 3.0)
        desk.report.record("earlier", 0.0, 0.5)  # before the work began
        desk.report.record("beside", 2.5, 3.0)  # while another one was going on
        desk.report.record("also beside", 2.6, 3.0)
        desk.now_s = 4.0
        desk.report.mark("moment", gid=1)
        with desk.report.span("part"):
            desk.now_s = 5.0
    assert await desk.told() == [
        ("prefill", 1.5, 2.0, 0),
        ("token", 2.0, 3.0, 0),
        ("earlier", 0.0, 0.5, 1),
        ("beside", 2.5, 3.0, 1),
        ("also beside", 2.6, 3.0, 2),
        ("moment", 4.0, 4.0, 0),
        ("part", 4.0, 5.0, 0),
        ("decode", 1.0, 5.0, 0),
    ]


async def test_a_fault_and_a_cancellation_end_a_span(desk: Desk) -> None:
    with pytest.raises(KeyError), desk.report.span("fails"):
        raise KeyError
    with anyio.move_on_after(0), desk.report.span("cancelled"):
        await anyio.sleep_forever()
    assert [name for name, *_ in await desk.told()] == ["fails", "cancelled"]
    assert desk.report.doing == []


async def test_a_span_that_ends_after_the_reports_are_closed_is_nobodys(desk: Desk) -> None:
    with desk.report.span("late"):
        desk.report.close()
    desk.report.mark("later")
    assert await desk.told() == []


async def test_incidents_from_where_nobody_may_wait() -> None:
    box = Mailbox("metrics")
    report = Reporter("scorer", box.channel("incidents", Incident, bound=1))
    incident = Incident(actor="scorer", kind="odd", message="something odd")
    report.incident_nowait(incident)
    report.incident_nowait(incident)  # no room
    assert await taken(box) == [incident]
    report.close()
    report.incident_nowait(incident)
    assert await taken(box) == []


async def test_without_channels_it_is_silent() -> None:
    report = Reporter("alone")
    await report.incident(Incident(actor="alone", kind="odd", message="nobody hears it"))
    report.incident_nowait(Incident(actor="alone", kind="odd", message="nobody hears it"))
    with report.span("work"):
        report.mark("moment")
    report.record("work", 1.0, 2.0)
    assert report.doing == []
    report.close()


@pytest.mark.parametrize("seed", range(20))
async def test_spans_in_a_lane_never_overlap_but_as_parts(desk: Desk, seed: int) -> None:
    dice = random.Random(seed)

    async def work(depth: int) -> None:
        for _ in range(dice.randrange(1, 3)):
            desk.now_s += 1
            with desk.report.span("work"):
                desk.now_s += 1
                for _ in range(dice.randrange(3)):
                    await anyio.lowlevel.checkpoint()
                    if depth:
                        tasks.start_soon(work, depth - 1)
                if dice.random() < 0.5:
                    desk.report.record("record", desk.now_s - dice.randrange(4) - 0.5, desk.now_s)
                if depth:
                    await work(depth - 1)
                desk.now_s += 1

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(work, 2)
    spans: list[Span] = await taken(desk.box)
    assert len(spans) > 5
    for lane in {span.lane for span in spans}:
        stack: list[Span] = []
        for span in sorted((s for s in spans if s.lane == lane), key=lambda span: (span.start_s, -span.end_s)):
            while stack and stack[-1].end_s <= span.start_s:
                stack.pop()
            assert not stack or span.end_s <= stack[-1].end_s
            stack.append(span)


async def test_a_span_costs_microseconds() -> None:
    """Measured at about 3 µs; the bound is wide, for the machine may be busy with something else."""
    box = Mailbox("metrics")
    report = Reporter("scorer", None, box.channel("spans", Span, bound=4096, overflow="drop_oldest"))
    costs_s = []
    for _ in range(30):
        start_s = time.perf_counter()
        for gid in range(100):
            with report.span("score", step=1, gid=gid):
                pass
        costs_s.append((time.perf_counter() - start_s) / 100)
    assert min(costs_s) < 50e-6
