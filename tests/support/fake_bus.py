"""A message server in memory, with the methods of a `Bus`, for tests in virtual time: it loses what it is told to."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import anyio

from troupe.cluster.bus import HUB, Bus, BusState, FullError, Handler, NoAnswer, checked_size


class FakeBroker:
    """The server. `bus(name)` is an end of it, for the hub (`HUB`) or for a worker."""

    def __init__(self, run: str = "r1") -> None:
        self.run = run
        self.epoch = 1
        self.stored: dict[str, bytes] = {}
        self.asked: list[str] = []
        """Subjects of all requests that arrived."""
        self.lose_request: Callable[[str], bool] = lambda subject: False
        """Whether the request that arrives now, by its subject, is lost before it is read."""
        self.lose_reply: Callable[[str], bool] = lambda subject: False
        """Whether it is handled, and its reply lost."""
        self.damage: Callable[[str, bytes], bytes] = lambda subject, data: data
        """What `get` gives instead of what is stored."""
        self.delay_s: Callable[[str], float] = lambda subject: 0.0
        """Before a request arrives."""
        self.servers: list[tuple[str, Handler]] = []
        self.cut: set[str] = set()
        """Names of those whose cable is pulled."""
        self.revoked: set[str] = set()
        self.away = False
        self.room: float = math.inf
        """Bytes that may be stored."""
        self.tasks: set[asyncio.Future[bytes]] = set()
        self.failures: list[BaseException] = []
        """What handlers raised; whoever asked got no reply."""

    def bus(self, name: str) -> Bus:
        """An end of this server's."""
        return FakeBus(self, name)

    def restart(self) -> None:
        """As after a kill: nothing is stored any more; what is being asked stays unanswered for those who ask."""
        self.stored.clear()
        self.epoch += 1

    def ended(self, task: asyncio.Future[bytes]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failures.append(error)

    def may(self, name: str, subject: str) -> bool:
        """Whether the server lets somebody ask on a subject."""
        return name == HUB or subject.startswith(f"{self.run}.{HUB}.{name}.")


class FakeBus:
    """One end."""

    def __init__(self, broker: FakeBroker, name: str) -> None:
        self.name = name
        self._broker = broker

    @property
    def epoch(self) -> int:
        return self._broker.epoch

    @property
    def state(self) -> BusState:
        broker = self._broker
        if self.name in broker.revoked:
            return "refused"
        return "lost" if broker.away or self.name in broker.cut else "connected"

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        checked_size(subject, data)
        with anyio.move_on_after(timeout_s):
            await self._connected(subject)
            await anyio.sleep(self._broker.delay_s(subject))
            return await self._answered(subject, data)
        raise NoAnswer(subject, "timeout")

    async def _answered(self, subject: str, data: bytes) -> bytes:
        broker = self._broker
        if self.state != "connected" or not broker.may(self.name, subject) or broker.lose_request(subject):
            await anyio.sleep_forever()
        handler = next((handler for where, handler in broker.servers if _covers(where, subject)), None)
        if handler is None:
            raise NoAnswer(subject, "nobody")
        broker.asked.append(subject)
        epoch = broker.epoch
        task = asyncio.ensure_future(handler(subject, data))  # goes on, whatever becomes of whoever asked
        broker.tasks.add(task)
        task.add_done_callback(broker.ended)
        try:
            reply = await asyncio.shield(task)
        except Exception:
            await anyio.sleep_forever()
        checked_size(subject, reply)
        if epoch != broker.epoch:
            raise NoAnswer(subject, "lost")
        if self.state != "connected" or broker.lose_reply(subject):
            await anyio.sleep_forever()
        return reply

    def serve(self, subject: str, handler: Handler) -> AbstractAsyncContextManager[None]:
        @asynccontextmanager
        async def served() -> AsyncIterator[None]:
            entry = (subject, handler)
            self._broker.servers.append(entry)
            try:
                yield
            finally:
                self._broker.servers.remove(entry)

        return served()

    async def put(self, subject: str, data: bytes) -> None:
        checked_size(subject, data)
        assert self.name == HUB, "workers store nothing"
        await self._at_server(subject)
        others = sum(len(each) for where, each in self._broker.stored.items() if where != subject)
        if others + len(data) > self._broker.room:
            raise FullError(f"the message server does not store {len(data)} bytes: no room")
        self._broker.stored[subject] = bytes(data)

    async def get(self, subject: str) -> bytes | None:
        await self._at_server(subject)
        data = self._broker.stored.get(subject)
        return None if data is None else self._broker.damage(subject, data)

    async def purge(self, subject: str) -> None:
        assert self.name == HUB, "workers store nothing"
        await self._at_server(subject)
        for each in [each for each in self._broker.stored if _covers(subject, each)]:
            del self._broker.stored[each]

    async def _at_server(self, subject: str) -> None:
        await anyio.sleep(self._broker.delay_s(subject))
        if self.state != "connected":
            raise NoAnswer(subject, "lost")

    async def _connected(self, subject: str) -> None:
        while self.state != "connected":
            if self.state == "refused":
                raise NoAnswer(subject, "refused")
            await anyio.sleep(0.1)


def _covers(pattern: str, subject: str) -> bool:
    return subject.startswith(pattern[:-1]) if pattern.endswith(".>") else subject == pattern
