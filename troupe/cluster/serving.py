"""What the hub serves: requests from the bus's thread to tasks of the hub's loop, and their replies back."""

from __future__ import annotations

import asyncio
from collections import Counter

from troupe.cluster.bus import Handler, NoAnswer, asker_of, checked_size, inbox_of
from troupe.cluster.dialing import Dialed, Msg

MOST = 64
"""Requests of one worker that are being answered; further ones are dropped, and asked again by an honest one."""
MOST_BYTES = 64 * 1024 * 1024
"""That those may have together."""
_RETURNED = "_R_."
"""What the server puts in place of a worker's inbox, whose account the hub's cannot name."""


class Served:
    """A subject with its handler."""

    def __init__(
        self, subject: str, handler: Handler, bus_loop: asyncio.AbstractEventLoop, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.subject = subject
        self.dropped: Counter[str] = Counter()
        """Requests that were not answered, by worker."""
        self._handler = handler
        self._bus_loop, self._loop = bus_loop, loop
        self._open: Counter[str] = Counter()
        self._open_bytes: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._has_ended = False

    def end(self) -> None:
        """Answer nobody any more; on the hub's loop."""
        self._has_ended = True
        for task in self._tasks:
            task.cancel()

    def arrived(self, dialed: Dialed, message: Msg) -> None:
        """A request; on the bus's loop. A reply goes only where the asker itself could listen: who may name another
        place for it would have the hub write there."""
        try:
            name = asker_of(message.subject)
        except IndexError:
            return
        size = len(message.data)
        if (
            not message.reply.startswith((_RETURNED, f"{inbox_of(name)}."))
            or self._open[name] >= MOST
            or self._open_bytes[name] + size > MOST_BYTES
        ):
            self.dropped[name] += 1
            return
        self._open[name] += 1
        self._open_bytes[name] += size
        try:
            self._loop.call_soon_threadsafe(self._begin, dialed, message, name)
        except RuntimeError:  # that loop has ended
            self._over(name, size)

    def _begin(self, dialed: Dialed, message: Msg, name: str) -> None:
        if self._has_ended:
            return
        task = self._loop.create_task(self._answered(dialed, message))
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._done(task, name, len(message.data)))

    async def _answered(self, dialed: Dialed, message: Msg) -> None:
        reply = await self._handler(message.subject, message.data)
        checked_size(message.subject, reply)
        asyncio.run_coroutine_threadsafe(_sent(dialed, message.reply, reply), self._bus_loop)

    def _done(self, task: asyncio.Task[None], name: str, size: int) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            about = f"a request of worker {name} could not be answered"
            self._loop.call_exception_handler({"message": about, "exception": error})
        try:
            self._bus_loop.call_soon_threadsafe(self._over, name, size)
        except RuntimeError:  # the bus is closed
            return

    def _over(self, name: str, size: int) -> None:
        self._open[name] -= 1
        self._open_bytes[name] -= size


async def _sent(dialed: Dialed, subject: str, data: bytes) -> None:
    try:
        await dialed.publish(subject, data)
    except NoAnswer:
        return  # who asked asks again
