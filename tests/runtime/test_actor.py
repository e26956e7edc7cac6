from __future__ import annotations

from typing import Any, ClassVar

import anyio
import pytest
from anyio import wait_all_tasks_blocked

from troupe.messages import Incident, Span
from troupe.runtime.actor import Actor
from troupe.runtime.broadcast import Broadcast
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.reporter import Reporter

pytestmark = pytest.mark.anyio


class Doubler(Actor):
    """Sends twice what it gets; keeps a diary of its life."""

    name: ClassVar[str] = "doubler"

    def __init__(self, inbox: Mailbox, out: Channel[int], *others: Any, report: Reporter | None = None) -> None:
        super().__init__(inbox, [out, *others], report)
        self.out = out
        self.diary: list[str] = []
        self.gate = anyio.Event()

    async def start(self) -> None:
        self.diary.append("start")

    async def handle(self, message: int) -> None:
        self.diary.append(f"handle {message}")
        if message < 0:
            raise ValueError(f"{message} is negative")
        if message == 0:
            self.tasks.start_soon(self._later)
        await self.out.send(2 * message)

    async def _later(self) -> None:
        await self.gate.wait()
        self.diary.append("task done")

    async def finish(self) -> None:
        self.diary.append("finish")
        await self.out.send(-1)

    async def stop(self) -> None:
        await anyio.lowlevel.checkpoint()  # would raise here if it were cancelled
        self.diary.append("stop")


def doubler(*messages: int) -> tuple[Doubler, Channel[int], Mailbox]:
    inbox, outbox = Mailbox("in"), Mailbox("out")
    channel = inbox.channel("numbers", int, bound=8)
    for message in messages:
        channel.send_nowait(message)
    return Doubler(inbox, outbox.channel("doubled", int, bound=8)), channel, outbox


async def test_lives_from_start_to_stop_and_closes_its_outputs() -> None:
    actor, channel, outbox = doubler(3, 4)
    channel.close()
    await actor.run()
    assert actor.diary == ["start", "handle 3", "handle 4", "finish", "stop"]
    assert [message async for message in outbox] == [6, 8, -1]
    assert actor.out.closed


async def test_waits_for_its_tasks_before_it_finishes() -> None:
    actor, channel, _ = doubler(0)
    channel.close()
    async with anyio.create_task_group() as group:
        group.start_soon(actor.run)
        await wait_all_tasks_blocked()
        assert actor.diary == ["start", "handle 0"]
        actor.gate.set()
    assert actor.diary == ["start", "handle 0", "task done", "finish", "stop"]


async def test_a_fault_stops_but_does_not_finish_nor_close() -> None:
    actor, _, _ = doubler(1, -5, 2)
    with pytest.RaisesGroup(pytest.RaisesExc(ValueError, match="-5 is negative")):
        await actor.run()
    assert actor.diary == ["start", "handle 1", "handle -5", "stop"]
    assert not actor.out.closed


async def test_a_cancelled_actor_stops_shielded() -> None:
    actor, _, _ = doubler(0)
    async with anyio.create_task_group() as group:
        group.start_soon(actor.run)
        await wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    assert actor.diary == ["start", "handle 0", "stop"]
    assert not actor.out.closed


async def test_outputs_that_are_closed_already_and_broadcasts_are_no_trouble() -> None:
    actor, channel, _ = doubler()
    news: Broadcast[int] = Broadcast("news", int)
    early = Mailbox("early").channel("early", int, bound=1)
    actor = Doubler(actor.inbox, actor.out, news, early)
    early.close()
    channel.close()
    await actor.run()
    assert news.closed
    assert actor.out.closed


async def test_the_base_class_asks_for_handle_only() -> None:
    class Listener(Actor):
        name: ClassVar[str] = "listener"
        heard: ClassVar[list[int]] = []

        async def handle(self, message: int) -> None:
            self.heard.append(message)

    box = Mailbox("box")
    channel = box.channel("numbers", int, bound=2)
    channel.send_nowait(1)
    channel.close()
    await Listener(box).run()
    assert Listener.heard == [1]


async def test_reporter_sends_incidents_and_spans_and_closes_both() -> None:
    times = iter([10.0, 12.5])
    box = Mailbox("metrics")
    incidents = box.channel("incidents", Incident, bound=2)
    spans = box.channel("spans", Span, bound=1, overflow="drop_oldest")
    report = Reporter("scorer", incidents, spans, clock=lambda: next(times))
    incident = Incident(actor="scorer", kind="odd", message="something odd")
    await report.incident(incident)
    with pytest.raises(KeyError), report.span("score", step=3, gid=7):
        raise KeyError
    report.close()
    expected = Span(actor="scorer", name="score", start_s=10.0, end_s=12.5, step=3, gid=7)
    assert [message async for message in box] == [incident, expected]
