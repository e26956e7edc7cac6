from __future__ import annotations

from typing import ClassVar

import anyio
import anyio.lowlevel
import pytest
from anyio import wait_all_tasks_blocked

from troupe.runtime import Actor, Channel, Mailbox, play
from troupe.runtime.supervision import first_fault

pytestmark = pytest.mark.anyio


class Relay(Actor):
    """Passes numbers on; breaks at 13."""

    name: ClassVar[str] = "relay"

    def __init__(self, inbox: Mailbox, out: Channel[int]) -> None:
        super().__init__(inbox, [out])
        self.out = out
        self.stopped = False

    async def handle(self, message: int) -> None:
        if message == 13:
            raise ValueError("13 is refused") from OSError("no luck")
        await self.out.send(message)

    async def stop(self) -> None:
        self.stopped = True


def chain(length: int) -> tuple[Channel[int], list[Relay], Mailbox]:
    boxes = [Mailbox(f"box {i}") for i in range(length + 1)]
    channels = [box.channel("numbers", int, bound=1) for box in boxes]
    return channels[0], [Relay(boxes[i], channels[i + 1]) for i in range(length)], boxes[-1]


async def test_the_end_travels_down_the_play() -> None:
    first, relays, last = chain(3)
    got: list[int] = []

    async def read() -> None:
        got.extend([number async for number in last])

    async with anyio.create_task_group() as group:
        group.start_soon(play, list(reversed(relays)))  # the order of starting does not matter
        group.start_soon(read)
        for number in range(5):
            await first.send(number)
        first.close()
    assert got == [0, 1, 2, 3, 4]
    assert all(relay.stopped for relay in relays)


async def test_a_fault_cancels_the_others_and_is_raised_as_itself_with_its_cause() -> None:
    first, relays, _ = chain(3)
    first.send_nowait(13)
    with pytest.raises(ValueError, match="13 is refused") as caught:
        await play(relays)
    assert isinstance(caught.value.__cause__, OSError)
    assert str(caught.value.__cause__) == "no luck"
    assert all(relay.stopped for relay in relays)
    assert not relays[-1].out.closed


async def test_a_cancelled_play_ends_without_a_fault() -> None:
    _, relays, _ = chain(2)
    async with anyio.create_task_group() as group:
        group.start_soon(play, relays)
        await wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    assert all(relay.stopped for relay in relays)


class LastWords(Actor):
    """Sends a number when it has been cancelled, and some time after it."""

    name: ClassVar[str] = "last words"

    def __init__(self, out: Channel[int]) -> None:
        super().__init__(Mailbox("silence"), [out])
        self.inbox.channel("never closed", int, bound=1)
        self.out = out

    async def handle(self, message: int) -> None:
        raise AssertionError("nobody writes")

    async def stop(self) -> None:
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
        await self.out.send(7)


class Listener(Actor):
    """Keeps what it is told, and when it stops what is there still."""

    name: ClassVar[str] = "listener"
    leaves_last: ClassVar[bool] = True

    def __init__(self, inbox: Mailbox) -> None:
        super().__init__(inbox)
        self.heard: list[int] = []

    async def handle(self, message: int) -> None:
        if message == 13:
            raise ValueError("13 is refused")
        self.heard.append(message)

    async def stop(self) -> None:
        while len(self.inbox):
            await self.handle(await anext(self.inbox))


def audience() -> tuple[LastWords, Listener, Channel[int]]:
    box = Mailbox("listener")
    out, other = box.channel("numbers", int, bound=3), box.channel("others", int, bound=3)
    return LastWords(out), Listener(box), other


async def test_who_leaves_last_hears_what_the_others_say_when_they_are_cancelled() -> None:
    speaker, listener, _ = audience()
    async with anyio.create_task_group() as group:
        group.start_soon(play, [listener, speaker])
        await wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    assert listener.heard == [7]


async def test_who_leaves_last_hears_what_the_others_say_after_a_fault() -> None:
    speaker, listener, _ = audience()
    first, relays, _ = chain(1)
    first.send_nowait(13)
    with pytest.raises(ValueError, match="13 is refused"):
        await play([speaker, listener, *relays])
    assert listener.heard == [7]


async def test_a_fault_of_who_leaves_last_ends_the_play_too() -> None:
    speaker, listener, other = audience()
    other.send_nowait(13)
    with pytest.raises(ValueError, match="13 is refused"):
        await play([speaker, listener])
    assert listener.inbox.channels[0].stats().sent == 1, "the speaker was stopped"


async def test_who_leaves_last_ends_by_itself_when_all_is_said() -> None:
    box = Mailbox("listener")
    listener, numbers = Listener(box), box.channel("numbers", int, bound=3)
    relay_box = Mailbox("relay")
    first = relay_box.channel("numbers", int, bound=3)
    for number in (1, 2):
        first.send_nowait(number)
    first.close()
    await play([listener, Relay(relay_box, numbers)])
    assert listener.heard == [1, 2]


async def test_first_fault_looks_through_groups_and_past_cancellations() -> None:
    cancelled = anyio.get_cancelled_exc_class()
    inner, outer = KeyError("inner"), ValueError("outer")
    tree = BaseExceptionGroup("", [cancelled(), BaseExceptionGroup("", [cancelled(), inner]), outer])
    assert first_fault(tree) is inner
    alone = cancelled()
    assert first_fault(BaseExceptionGroup("", [alone])) is alone
