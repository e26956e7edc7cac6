"""Typed, bounded mailboxes that end when their last sender has closed.

A `Mailbox` is what one actor reads: the merged inbox of its `Channel`s, in order of arrival. The overflow policy and
the bound belong to the channel, not to the inbox, so a flood of spans never delays or drops an update. A message that
was taken stays *in hand* until the reader is done with it, so that what a failed reader had in hand can be given to the
next one. Everything here runs on one event loop; no locks, no sentinels, no polling.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import anyio
import msgspec

T = TypeVar("T")

Overflow = Literal["block", "newest", "drop_oldest"]
"""What a full channel does with one more message: make the sender wait; keep the newest ones of a state whose past
nobody needs; or drop the oldest and count it as lost."""


class ChannelStats(msgspec.Struct, frozen=True, kw_only=True):
    """What a channel measured since it was opened."""

    name: str
    depth: int
    """Messages waiting now."""
    bound: int
    peak_depth: int
    sent: int
    dropped: int
    """Messages that overflow removed unread; counted for `drop_oldest`, by design 0 for `block`."""
    wait_s: float
    """Seconds that messages have spent in the channel, summed."""
    blocked_s: float
    """Seconds that senders have waited for room, summed."""


class Channel(Generic[T]):
    """One sender's way into a mailbox: bounded, typed, with a declared overflow policy.

    `types` are the message classes that it carries; anything else is refused at the sender, where the mistake is.
    """

    def __init__(
        self,
        inbox: Mailbox,
        name: str,
        types: tuple[type, ...],
        bound: int,
        overflow: Overflow,
        *,
        side: bool,
    ) -> None:
        if bound < 1:
            raise ValueError(f"channel {name}: a bound of {bound} can hold no message; give at least 1")
        self.name = name
        self.side = side
        self.closed = False
        self._inbox = inbox
        self._types = types
        self._bound = bound
        self._overflow = overflow
        self._blocked: deque[anyio.Event] = deque()
        self._depth = self._reserved = self._peak = self._sent = self._dropped = 0
        self._wait_s = self._blocked_s = 0.0

    async def send(self, message: T) -> None:
        """Deliver, waiting for room where the policy is `block`. Waiting senders are served in order."""
        self._check(message)
        if self._overflow == "block" and self._full:
            await self._wait_for_room()
            self._check(message)  # it may have been closed meanwhile
        self._put(message)

    def send_nowait(self, message: T) -> None:
        """Deliver at once; `anyio.WouldBlock` where a `block` channel is full."""
        self._check(message)
        if self._overflow == "block" and self._full:
            raise anyio.WouldBlock
        self._put(message)

    def carries(self, message: object) -> bool:
        """Whether it is of a type that may be sent."""
        return isinstance(message, self._types)

    async def settled(self) -> None:
        """Wait until the reader is done with everything sent."""
        while self._depth or self._inbox._holds_any_of(self):
            await self._inbox._next_progress()

    def close(self) -> None:
        """No more messages will come; the mailbox ends once every channel that keeps it open has closed.

        Senders that still wait for room get `anyio.ClosedResourceError`: what they hold was never delivered.
        """
        self.closed = True
        while self._blocked:
            self._reserved += 1
            self._blocked.popleft().set()
        self._inbox._channel_closed()

    def keep_open(self) -> None:
        """From now on the mailbox does not end before this channel, which was a side one, has closed."""
        self.side = False

    def stats(self) -> ChannelStats:
        """The channel's measurements."""
        return ChannelStats(
            name=self.name,
            depth=self._depth,
            bound=self._bound,
            peak_depth=self._peak,
            sent=self._sent,
            dropped=self._dropped,
            wait_s=self._wait_s,
            blocked_s=self._blocked_s,
        )

    def _check(self, message: T) -> None:
        if not self.carries(message):
            raise TypeError(refusal(self.name, self._types, message))
        if self.closed:
            raise anyio.ClosedResourceError(f"channel {self.name} is closed")

    async def _wait_for_room(self) -> None:
        since_s = self._inbox.clock()
        turn = anyio.Event()
        self._blocked.append(turn)
        try:
            await turn.wait()
        except BaseException:
            if turn.is_set():  # cancelled with a place already in hand: pass it on
                self._reserved -= 1
                self._grant()
            else:
                self._blocked.remove(turn)
            raise
        finally:
            self._blocked_s += self._inbox.clock() - since_s
        self._reserved -= 1

    @property
    def _full(self) -> bool:
        return self._depth + self._reserved >= self._bound

    def _grant(self) -> None:
        """Reserve a free place for the sender that has waited longest."""
        if self._blocked and not self._full:
            self._reserved += 1
            self._blocked.popleft().set()

    def _put(self, message: T) -> None:
        while self._depth >= self._bound and self._overflow != "block":  # a place that was granted is never refused
            self._inbox._drop_oldest_of(self)
            self._depth -= 1
            self._dropped += self._overflow == "drop_oldest"
        self._depth += 1
        self._sent += 1
        self._peak = max(self._peak, self._depth)
        self._inbox._arrived(self, message)

    def _taken(self, waited_s: float) -> None:
        self._depth -= 1
        self._wait_s += waited_s
        self._grant()

    def _taken_back(self) -> None:
        self._depth += 1  # beyond the bound where it is full: what was delivered once is not refused now


class _Letter(NamedTuple):
    """A message on its way through a mailbox."""

    channel: Channel[Any]
    message: Any
    since_s: float
    """When it came to lie in the mailbox."""


class Mailbox:
    """The merged inbox of one actor: `async for message in mailbox` until every channel has closed.

    With `async for`, asking for the next message means that the reader is done with the one before. A reader that is
    done with messages at other times calls `take` and `done`.

    Channels opened with `side=True` (control) never keep a mailbox open: an actor ends when its work ends, however
    long somebody could still ask something of it. A reader that waits for an answer through one keeps it open itself
    (`kept_open`).
    """

    def __init__(self, name: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self.name = name
        self.clock = clock
        self.channels: list[Channel[Any]] = []
        self.moved_s = clock()
        """When a message was last taken; before the first, when the mailbox was made."""
        self.finished = 0
        """Messages that the reader was done with so far."""
        self._queue: deque[_Letter] = deque()
        self._in_hand: list[_Letter] = []
        self._read: _Letter | None = None  # what `async for` gave out last
        self._arrival = anyio.Event()
        self._progress: anyio.Event | None = None  # made by who waits for it
        self._over = False
        self._keeping = 0

    def channel(
        self,
        name: str,
        *types: type[T],
        bound: int,
        overflow: Overflow = "block",
        side: bool = False,
    ) -> Channel[T]:
        """Open one more way in. All channels are opened before the actor starts reading."""
        channel: Channel[T] = Channel(self, name, types, bound, overflow, side=side)
        self.channels.append(channel)
        return channel

    @property
    def waiting(self) -> tuple[Any, ...]:
        """The messages that nobody has taken yet, in order of arrival."""
        return tuple(letter.message for letter in self._queue)

    @property
    def in_hand(self) -> tuple[Any, ...]:
        """The messages that the reader has taken and is not done with, in order of arrival."""
        return tuple(letter.message for letter in self._in_hand)

    async def take(self) -> Any:
        """The next message, which stays in hand until `done`; `anyio.EndOfStream` when no more can come."""
        while not self._queue:
            if self._over or (not self._keeping and all(each.closed or each.side for each in self.channels)):
                raise anyio.EndOfStream
            self._arrival = anyio.Event()
            await self._arrival.wait()
        letter = self._queue.popleft()
        self.moved_s = self.clock()
        letter.channel._taken(self.moved_s - letter.since_s)
        self._in_hand.append(letter)
        return letter.message

    def done(self, message: object) -> None:
        """The reader needs the message no more, whatever happens. One that is not in hand is left alone."""
        for i, letter in enumerate(self._in_hand):
            if letter.message is message:
                del self._in_hand[i]
                self.finished += 1
                self._progressed()
                return

    @contextmanager
    def kept_open(self) -> Iterator[None]:
        """The reader still waits for messages while in the body, though all channels may have closed but side ones."""
        self._keeping += 1
        try:
            yield
        finally:
            self._keeping -= 1
            self._arrival.set()

    def take_back(self) -> None:
        """Put everything in hand back at the head, in order of arrival, for the reader that comes next."""
        now_s = self.clock()
        while self._in_hand:
            letter = self._in_hand.pop()
            letter.channel._taken_back()
            self._queue.appendleft(letter._replace(since_s=now_s))
        self._read = None
        self._arrival.set()

    def end(self) -> None:
        """End the mailbox when what waits has been read, whatever the senders still want to say."""
        self._over = True
        self._arrival.set()

    def __aiter__(self) -> Mailbox:
        return self

    async def __anext__(self) -> Any:
        if self._read is not None:
            self.done(self._read.message)
            self._read = None
        try:
            message = await self.take()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None
        self._read = self._in_hand[-1]
        return message

    def __len__(self) -> int:
        return len(self._queue)

    def _arrived(self, channel: Channel[Any], message: Any) -> None:
        self._queue.append(_Letter(channel, message, self.clock()))
        self._arrival.set()

    def _channel_closed(self) -> None:
        self._arrival.set()

    def _drop_oldest_of(self, channel: Channel[Any]) -> None:
        index = next(i for i, letter in enumerate(self._queue) if letter.channel is channel)
        del self._queue[index]
        self._progressed()

    def _holds_any_of(self, channel: Channel[Any]) -> bool:
        return any(letter.channel is channel for letter in self._in_hand)

    async def _next_progress(self) -> None:
        if self._progress is None:
            self._progress = anyio.Event()
        await self._progress.wait()

    def _progressed(self) -> None:
        if self._progress is not None:
            self._progress.set()
            self._progress = None


def refusal(name: str, types: tuple[type, ...], message: object) -> str:
    """What is said of a message that a channel does not carry."""
    expected = ", ".join(t.__name__ for t in types)
    return f"channel {name} carries {expected}, not {type(message).__name__}"
