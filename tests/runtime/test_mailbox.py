from __future__ import annotations

from collections import deque
from typing import Any

import anyio
import pytest
from anyio import wait_all_tasks_blocked
from anyio.lowlevel import checkpoint
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from troupe.runtime.broadcast import Broadcast
from troupe.runtime.mailbox import Channel, Mailbox, Overflow

pytestmark = pytest.mark.anyio


async def read_all(mailbox: Mailbox) -> list[Any]:
    return [message async for message in mailbox]


async def test_merges_channels_in_order_of_arrival_and_ends_when_the_last_has_closed() -> None:
    box = Mailbox("box")
    numbers, words = box.channel("numbers", int, bound=5), box.channel("words", str, bound=5)
    for channel, message in ((numbers, 1), (words, "a"), (words, "b"), (numbers, 2)):
        await channel.send(message)  # type: ignore[arg-type]
    numbers.close()
    got: list[Any] = []
    async with anyio.create_task_group() as group:

        async def read() -> None:
            got.extend(await read_all(box))

        group.start_soon(read)
        await wait_all_tasks_blocked()
        assert not got  # one channel is still open, so the reader waits
        await words.send("c")
        words.close()
    assert got == [1, "a", "b", 2, "c"]
    assert len(box) == 0


async def test_side_channels_are_read_but_keep_no_mailbox_open() -> None:
    box = Mailbox("box")
    work, control = box.channel("work", int, bound=2), box.channel("control", str, bound=1, side=True)
    await control.send("status")
    await work.send(1)
    work.close()
    assert not control.closed
    assert await read_all(box) == ["status", 1]


async def test_refuses_wrong_types_and_closed_channels_at_the_sender() -> None:
    box = Mailbox("box")
    channel: Channel[Any] = box.channel("mixed", int, str, bound=1)
    for send in (channel.send_nowait, channel.send):
        with pytest.raises(TypeError, match="channel mixed carries int, str, not float"):
            await send(1.5)  # type: ignore[misc]
    channel.close()
    channel.close()
    with pytest.raises(anyio.ClosedResourceError, match="mixed is closed"):
        channel.send_nowait(1)
    assert await read_all(box) == []


def test_refuses_a_bound_below_one() -> None:
    with pytest.raises(ValueError, match="channel c: a bound of 0"):
        Mailbox("box").channel("c", int, bound=0)


async def test_block_makes_senders_wait_and_serves_them_in_order() -> None:
    box = Mailbox("box")
    channel = box.channel("c", int, bound=2)
    channel.send_nowait(0)
    channel.send_nowait(1)
    with pytest.raises(anyio.WouldBlock):
        channel.send_nowait(9)
    async with anyio.create_task_group() as group:
        for number in (2, 3, 4):
            group.start_soon(channel.send, number)
            await wait_all_tasks_blocked()
        assert await anext(box) == 0
        with pytest.raises(anyio.WouldBlock):  # the free place belongs to the sender that has waited
            channel.send_nowait(9)
        assert [await anext(box) for _ in range(4)] == [1, 2, 3, 4]
    stats = channel.stats()
    assert (stats.sent, stats.peak_depth, stats.depth, stats.dropped) == (5, 2, 0, 0)
    assert stats.blocked_s > 0


async def test_a_sender_cancelled_with_a_place_in_hand_passes_it_on() -> None:
    box = Mailbox("box")
    channel = box.channel("c", int, bound=1)
    channel.send_nowait(0)
    async with anyio.create_task_group() as group:
        scope = anyio.CancelScope()

        async def impatient() -> None:
            with scope:
                await channel.send(1)

        group.start_soon(impatient)
        await wait_all_tasks_blocked()
        group.start_soon(channel.send, 2)
        await wait_all_tasks_blocked()
        scope.cancel()  # the first sender is cancelled …
        assert await anext(box) == 0  # … and in the same moment gets the place
        with anyio.fail_after(30):
            assert await anext(box) == 2
    channel.close()
    assert await read_all(box) == []


async def test_a_sender_cancelled_while_waiting_takes_no_place() -> None:
    box = Mailbox("box")
    channel = box.channel("c", int, bound=1)
    channel.send_nowait(0)
    async with anyio.create_task_group() as group:
        group.start_soon(channel.send, 1)
        await wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    assert await anext(box) == 0
    channel.send_nowait(2)
    assert await anext(box) == 2


async def test_closing_tells_waiting_senders_that_nothing_was_delivered() -> None:
    box = Mailbox("box")
    channel = box.channel("c", int, bound=1)
    channel.send_nowait(0)
    refused: list[int] = []

    async def send(number: int) -> None:
        try:
            await channel.send(number)
        except anyio.ClosedResourceError:
            refused.append(number)

    async with anyio.create_task_group() as group:
        for number in (1, 2):
            group.start_soon(send, number)
            await wait_all_tasks_blocked()
        channel.close()
    assert refused == [1, 2]
    assert await read_all(box) == [0]


@pytest.mark.parametrize(("overflow", "dropped"), [("newest", 0), ("drop_oldest", 2)])
async def test_overflow_drops_the_oldest_of_its_own_channel_only(overflow: Any, dropped: int) -> None:
    box = Mailbox("box")
    flood = box.channel("flood", int, bound=2, overflow=overflow)
    kept = box.channel("kept", str, bound=1)
    await flood.send(0)
    await kept.send("precious")
    for number in (1, 2, 3):
        await flood.send(number)
    flood.close()
    kept.close()
    assert await read_all(box) == ["precious", 2, 3]
    stats = flood.stats()
    assert (stats.sent, stats.dropped, stats.depth, stats.peak_depth) == (4, dropped, 0, 2)


async def test_waiting_time_is_measured() -> None:
    now = [100.0]
    box = Mailbox("box", clock=lambda: now[0])
    channel = box.channel("c", int, bound=2)
    channel.send_nowait(1)
    now[0] = 101.5
    channel.send_nowait(2)
    now[0] = 104.0
    assert [await anext(box), await anext(box)] == [1, 2]
    assert channel.stats().wait_s == pytest.approx(4.0 + 2.5)
    assert (channel.stats().name, channel.stats().bound) == ("c", 2)


async def test_a_reader_cancelled_while_waiting_loses_nothing() -> None:
    box = Mailbox("box")
    channel = box.channel("c", int, bound=1)
    async with anyio.create_task_group() as group:
        group.start_soon(anext, box)
        await wait_all_tasks_blocked()
        group.cancel_scope.cancel()
        channel.send_nowait(7)
    channel.close()
    assert await read_all(box) == [7]


async def test_no_deadlock_with_many_senders_and_one_place() -> None:
    box = Mailbox("box")
    channels = [box.channel(f"c{i}", int, bound=1) for i in range(3)]

    async def send_all(sender: int) -> None:
        for number in range(20):
            await channels[sender].send(100 * sender + number)
            if number % 3 == 0:
                await checkpoint()
        channels[sender].close()

    async with anyio.create_task_group() as group:
        for sender in range(3):
            group.start_soon(send_all, sender)
        with anyio.fail_after(30):
            got = await read_all(box)
    for sender in range(3):
        assert [n for n in got if n // 100 == sender] == [100 * sender + i for i in range(20)]


class Model(RuleBasedStateMachine):
    """Two channels of one mailbox beside a plain list of what should be in it."""

    def __init__(self) -> None:
        super().__init__()
        self.box = Mailbox("box")
        self.block = self.box.channel("block", int, bound=2)
        self.lossy = self.box.channel("lossy", str, bound=2, overflow="drop_oldest")
        self.expected: deque[int | str] = deque()
        self.sent = self.dropped = 0

    def waiting(self, kind: type) -> list[int | str]:
        return [message for message in self.expected if isinstance(message, kind)]

    @rule(number=st.integers())
    def send_blocking(self, number: int) -> None:
        if len(self.waiting(int)) == 2:
            with pytest.raises(anyio.WouldBlock):
                self.block.send_nowait(number)
        else:
            self.block.send_nowait(number)
            self.expected.append(number)

    @rule(word=st.text(max_size=2))
    def send_lossy(self, word: str) -> None:
        if len(self.waiting(str)) == 2:
            first = next(i for i, message in enumerate(self.expected) if isinstance(message, str))
            del self.expected[first]
            self.dropped += 1
        self.lossy.send_nowait(word)
        self.expected.append(word)
        self.sent += 1

    @precondition(lambda self: self.expected)
    @rule()
    def read(self) -> None:
        reading = self.box.__anext__()
        with pytest.raises(StopIteration) as end:
            reading.send(None)  # there is a message, so it does not wait
        assert end.value.value == self.expected.popleft()

    @invariant()
    def agrees(self) -> None:
        assert len(self.box) == len(self.expected)
        assert self.block.stats().depth == len(self.waiting(int))
        stats = self.lossy.stats()
        assert (stats.depth, stats.sent, stats.dropped) == (len(self.waiting(str)), self.sent, self.dropped)


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


async def test_broadcast_reaches_who_listens_and_keeps_the_newest_only() -> None:
    news: Broadcast[int] = Broadcast("news", int)
    news.send_nowait(0)
    slow, other = news.listen(2), news.listen(5)
    for number in (1, 2, 3):
        news.send_nowait(number)
    news.leave(other)
    news.leave(other)
    news.send_nowait(4)
    news.close()
    assert await read_all(slow) == [3, 4]
    assert await read_all(other) == [1, 2, 3]
    assert await read_all(news.listen(1)) == []
    assert news.closed


async def test_broadcast_of_several_types_to_who_wants_some() -> None:
    news: Broadcast[int | str] = Broadcast("news", int, str)
    numbers, all_of_it = news.listen(1, int), news.listen(9)
    for message in (1, 2, "a", "b"):
        news.send_nowait(message)
    news.close()
    assert await read_all(numbers) == [2], "texts push no number out"
    assert await read_all(all_of_it) == [1, 2, "a", "b"]


def test_broadcast_refuses_a_wrong_type_even_where_nobody_listens() -> None:
    with pytest.raises(TypeError, match="channel news carries int, not str"):
        Broadcast("news", int).send_nowait("x")  # type: ignore[arg-type]


async def test_who_asks_for_the_next_message_is_done_with_the_one_before() -> None:
    box = Mailbox("box")
    channel, other = box.channel("numbers", int, bound=9), box.channel("others", int, bound=9)
    await channel.settled()  # nothing was sent
    channel.send_nowait(1)
    other.send_nowait(2)
    assert (await anext(box), box.in_hand) == (1, (1,))
    assert (await anext(box), box.in_hand) == (2, (2,))
    await channel.settled()


async def test_a_message_stays_in_hand_until_it_is_done_and_can_be_taken_back() -> None:
    box = Mailbox("box")
    one, two = box.channel("one", str, bound=2), box.channel("two", str, bound=9)
    for channel, text in ((one, "a"), (two, "b"), (one, "c"), (two, "d")):
        channel.send_nowait(text)
    taken: list[Any] = [await box.take() for _ in range(3)]
    assert taken == ["a", "b", "c"] == list(box.in_hand)
    assert len(box) == 1
    box.done(taken[1])
    box.done(taken[1])  # once more changes nothing
    box.done("never there")
    assert list(box.in_hand) == ["a", "c"]
    box.take_back()
    assert not box.in_hand
    assert list(box.waiting) == ["a", "c", "d"]
    assert [await box.take() for _ in range(3)] == ["a", "c", "d"]
    box.take_back()
    assert box.waiting == ("a", "c", "d")


async def test_done_tells_equal_messages_apart() -> None:
    box = Mailbox("box")
    channel = box.channel("lists", list, bound=3)
    for _ in range(2):
        channel.send_nowait([])
    first, second = await box.take(), await box.take()
    box.done(second)
    assert box.in_hand[0] is first


async def test_what_is_taken_back_counts_as_waiting_again_even_beyond_the_bound() -> None:
    box = Mailbox("box")
    channel = box.channel("numbers", int, bound=2)
    for number in (0, 1):
        channel.send_nowait(number)
    await box.take()
    await box.take()
    for number in (2, 3):
        channel.send_nowait(number)
    box.take_back()
    assert (channel.stats().depth, channel.stats().sent) == (4, 4)
    async with anyio.create_task_group() as group:
        group.start_soon(channel.send, 4)
        await wait_all_tasks_blocked()
        assert [await anext(box) for _ in range(2)] == [0, 1]
        await wait_all_tasks_blocked()
        assert box.waiting == (2, 3), "there is no room yet"
        assert await anext(box) == 2
        await wait_all_tasks_blocked()
        assert box.waiting == (3, 4)
    channel.close()
    assert [number async for number in box] == [3, 4]


@pytest.mark.parametrize("overflow", ["newest", "drop_oldest"])
async def test_a_lossy_channel_sheds_what_was_taken_back_when_it_is_full(overflow: Overflow) -> None:
    box = Mailbox("box")
    channel = box.channel("numbers", int, bound=2, overflow=overflow)
    channel.send_nowait(0)
    await box.take()
    for number in (1, 2):
        channel.send_nowait(number)
    box.take_back()
    channel.send_nowait(3)
    assert box.waiting == (2, 3)
    assert channel.stats().dropped == (2 if overflow == "drop_oldest" else 0)


async def test_a_channel_is_settled_when_everything_is_done_and_not_before() -> None:
    box = Mailbox("box")
    channel, other = box.channel("numbers", int, bound=3), box.channel("others", int, bound=3)
    settled = anyio.Event()

    async def wait() -> None:
        await channel.settled()
        settled.set()

    for number in (1, 2):
        channel.send_nowait(number)
    other.send_nowait(3)
    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        one, two, _ = await box.take(), await box.take(), await box.take()
        box.done(two)
        await wait_all_tasks_blocked()
        box.take_back()
        await wait_all_tasks_blocked()
        assert not settled.is_set()
        assert await box.take() == one
        box.done(one)
        await wait_all_tasks_blocked()
        assert settled.is_set(), "what another channel brought is not asked for"


async def test_an_ended_mailbox_is_read_to_its_end_whatever_may_still_come() -> None:
    box = Mailbox("box")
    channel = box.channel("numbers", int, bound=3)
    got: list[int] = []

    async def read() -> None:
        got.extend([number async for number in box])

    async with anyio.create_task_group() as group:
        channel.send_nowait(1)
        group.start_soon(read)
        await wait_all_tasks_blocked()
        box.end()
    assert got == [1]
    channel.send_nowait(2)
    assert [number async for number in box] == [2]
    with pytest.raises(anyio.EndOfStream):
        await box.take()


async def test_a_mailbox_says_when_it_moved_last() -> None:
    box = Mailbox("box")
    channel = box.channel("numbers", int, bound=3)
    made_s = box.moved_s
    channel.send_nowait(1)
    assert box.moved_s == made_s
    await box.take()
    assert box.moved_s > made_s


async def test_a_reader_may_keep_its_mailbox_open_for_answers_on_the_side() -> None:
    mailbox = Mailbox("reader")
    work = mailbox.channel("work", int, bound=1)
    answers = mailbox.channel("answers", str, bound=1, side=True)
    work.close()
    got: list[str] = []

    async def read() -> None:
        got.extend([message async for message in mailbox])

    async with anyio.create_task_group() as tasks:
        with mailbox.kept_open():
            with mailbox.kept_open():
                tasks.start_soon(read)
                await checkpoint()
            await answers.send("yes")
            while mailbox.finished < 1:
                await checkpoint()
    assert got == ["yes"]
