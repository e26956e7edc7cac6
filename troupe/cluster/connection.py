"""The real bus: a connection to the run's message server that is made anew for ever, in a thread and loop of its own.

Whatever an event loop of the run does meanwhile, pings are answered here. A connection that was lost is replaced by a
new one, with a client of its own; what was being asked then ends with NoAnswer.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, TypeVar

import anyio
import msgspec

from troupe.cluster.bus import HUB, BusState, FullError, Handler, NoAnswer, checked_size
from troupe.cluster.dialing import Dialed, Untold, dial
from troupe.cluster.keys import check_packages, client_context, public_key
from troupe.cluster.server_settings import stream
from troupe.cluster.serving import Served
from troupe.cluster.ticket import Ticket
from troupe.cluster.users import stream_of
from troupe.runtime.backoff import backoff_s

T = TypeVar("T")

STORE_S = 20.0
"""That the server may take to store, give or forget a message."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _REFUSED_PAUSE_S = 0.2, 3.0, 10.0
_BEGIN_S = 15.0
_REFUSALS = 4
"""In a row, after which a key counts as unknown: one that was just made may not have come to the server yet."""
_NO_STREAM = 404


@asynccontextmanager
async def connect(
    ticket: Ticket, *, on_state: Callable[[BusState], None] = lambda state: None
) -> AsyncIterator[Connection]:
    """A bus for whoever the ticket is of; there at once, whether or not the server is.

    `on_state` is called in the bus's own thread. ConfigError where the ticket cannot be used.
    """
    check_packages()
    connection = Connection(ticket, on_state)
    connection.start()
    try:
        yield connection
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(connection.close)


class Connection:
    """A `Bus` over the network; see there. Made by `connect`."""

    def __init__(self, ticket: Ticket, on_state: Callable[[BusState], None]) -> None:
        public_key(ticket.seed)
        self._ticket = ticket
        self._tls = client_context(ticket.ca)
        self._on_state = on_state
        self._state: BusState = "lost"
        self._detail = ""
        self._server: str | None = None
        self._epoch = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._turn, name=f"troupe-bus-{ticket.name}", daemon=True)
        self._dialed: Dialed | None = None
        self._changed = asyncio.Event()
        self._served: list[Served] = []
        self._keeping: asyncio.Task[None] | None = None

    name = property(lambda self: self._ticket.name)
    epoch = property(lambda self: self._epoch)
    state = property(lambda self: self._state)

    @property
    def detail(self) -> str:
        """Why there is no connection, in words; empty where there is one."""
        return self._detail

    def start(self) -> None:
        """Begin to connect."""
        self._thread.start()

    def close(self) -> None:
        """End the connection, the thread, and what is being asked. Waits for that."""

        async def end() -> None:
            if self._keeping is not None:
                self._keeping.cancel()
                with suppress(asyncio.CancelledError):
                    await self._keeping
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.wait_for(asyncio.gather(*others, return_exceptions=True), 2.0)

        with suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(end(), self._loop).result(5.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
        if not self._thread.is_alive():
            self._loop.close()

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        checked_size(subject, data)
        return await self._there(self._asked(subject, data, timeout_s))

    def serve(self, subject: str, handler: Handler) -> AbstractAsyncContextManager[None]:
        @asynccontextmanager
        async def served() -> AsyncIterator[None]:
            one = Served(subject, handler, self._loop, asyncio.get_running_loop())
            await self._there(self._begin(one))
            try:
                yield
            finally:
                one.end()
                with anyio.CancelScope(shield=True):
                    await self._there(self._cease(one))

        return served()

    async def put(self, subject: str, data: bytes) -> None:
        checked_size(subject, data)
        await self._there(self._stored(subject, data))

    async def get(self, subject: str) -> bytes | None:
        where = f"$JS.API.DIRECT.GET.{stream_of(self._ticket.run)}.{subject}"
        try:
            return await self._there(self._asked(where, b"", STORE_S))
        except NoAnswer as error:
            if error.why == "nobody":  # no such stream: the hub has not made it yet
                return None
            raise
        except Untold:
            return None

    async def purge(self, subject: str) -> None:
        await self._there(self._api("PURGE", {"filter": subject}))

    async def _there(self, work: Coroutine[Any, Any, T]) -> T:
        """Have something done by the bus's own loop, and wait for it on this one."""
        if not self._thread.is_alive():
            work.close()
            raise NoAnswer("", "lost", "the bus is closed")
        try:
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))
        except asyncio.CancelledError:
            if not self._thread.is_alive() or self._keeping is None or self._keeping.done():
                task = asyncio.current_task()
                if task is not None and not task.cancelling():
                    raise NoAnswer("", "lost", "the bus is closed") from None
            raise

    # All that follows runs in the bus's own loop.

    def _turn(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._keeping = self._loop.create_task(self._keep_connected())
        self._loop.run_forever()

    async def _keep_connected(self) -> None:
        """Connect, wait for the end of the connection, connect again."""
        failures = refusals = 0
        while True:
            for address in self._ticket.addresses:
                dialed = await dial(address, self._ticket, self._tls)
                if isinstance(dialed, Dialed):
                    break
                state, self._detail = dialed
                refusals = refusals + 1 if state == "refused" else 0
                if state != "refused" or refusals >= _REFUSALS:
                    self._say(state)
            else:
                failures += 1
                pause_s = backoff_s(1 if refusals else failures, _FIRST_PAUSE_S, _LONGEST_PAUSE_S)
                await asyncio.sleep(_REFUSED_PAUSE_S if self._state == "refused" else pause_s)
                continue
            try:
                await self._use(dialed)
            finally:
                self._dialed = None
                self._changed.clear()
                await dialed.close()
            failures, refusals, self._detail = 0, 0, dialed.reason
            self._say("lost")
            await asyncio.sleep(_FIRST_PAUSE_S)

    async def _use(self, dialed: Dialed) -> None:
        """Take a new connection into use until it ends."""
        if dialed.server != self._server:
            self._server = dialed.server
            self._epoch += 1
        try:
            async with asyncio.timeout(_BEGIN_S):
                if self.name == HUB:
                    await self._declare(dialed)
                for one in self._served:
                    await dialed.subscribe(one.subject, one.arrived)
        except Exception as error:  # it ended while it began
            dialed.reason = str(error)
            return
        self._dialed, self._detail = dialed, ""
        self._changed.set()
        self._say("connected")
        await dialed.ended.wait()

    def _say(self, state: BusState) -> None:
        if state != self._state:
            self._state = state
            self._on_state(state)

    async def _asked(self, subject: str, data: bytes, timeout_s: float) -> bytes:
        try:
            async with asyncio.timeout(timeout_s):
                while self._dialed is None:
                    if self._state == "refused":
                        raise NoAnswer(subject, "refused", self._detail)
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._changed.wait(), 0.5)
                return await self._dialed.ask(subject, data)
        except TimeoutError:
            if self._dialed is not None:
                raise NoAnswer(subject, "timeout") from None
            raise NoAnswer(subject, "untrusted" if self._state == "untrusted" else "lost", self._detail) from None

    async def _begin(self, one: Served) -> None:
        self._served.append(one)
        if self._dialed is not None:
            await self._dialed.subscribe(one.subject, one.arrived)

    async def _cease(self, one: Served) -> None:
        self._served.remove(one)
        if self._dialed is not None:
            await self._dialed.unsubscribe(one.subject)

    async def _stored(self, subject: str, data: bytes) -> None:
        for declared in (False, True):
            try:
                reply = msgspec.json.decode(await self._asked(subject, data, STORE_S))
            except NoAnswer as error:
                if error.why != "nobody" or declared:
                    raise
                if self._dialed is not None:
                    await self._declare(self._dialed)
                continue
            if "error" in reply:
                raise FullError(f"the message server does not store {len(data)} bytes: {reply['error']['description']}")
            return

    async def _declare(self, dialed: Dialed) -> None:
        """Make the stream, where the server has none."""
        body = msgspec.json.encode(stream(self._ticket.run))
        async with asyncio.timeout(STORE_S):
            reply = await dialed.ask(f"$JS.API.STREAM.CREATE.{stream_of(self._ticket.run)}", body)
        _checked(reply, "CREATE")

    async def _api(self, verb: str, body: dict[str, Any]) -> None:
        stream = stream_of(self._ticket.run)
        where = f"$JS.API.STREAM.{verb}.{stream}"
        _checked(await self._asked(where, msgspec.json.encode(body), STORE_S), verb)


def _checked(reply: bytes, verb: str) -> None:
    error = msgspec.json.decode(reply).get("error")
    if error and error.get("code") != _NO_STREAM:
        raise FullError(f"the message server refuses {verb.lower()}: {error['description']}")
