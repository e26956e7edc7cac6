"""One connection to a message server, from dialing to its end: asks, and hears what comes. See `connection.py`."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import logging
import secrets
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeAlias

from troupe.cluster.bus import BusState, NoAnswer, inbox_of
from troupe.cluster.keys import server_name
from troupe.cluster.ticket import Ticket

Client: TypeAlias = Any
Msg: TypeAlias = Any
Subscription: TypeAlias = Any
"""Of `nats`, which is there only with the extra `cluster`."""

DIAL_S = 8.0
_FLUSH_S = 10
_LEAVE_S = 0.3
_PING_S, _PINGS = 5, 2
"""A server that answers so many pings not is gone; a cable may be pulled without a word."""
_PENDING_BYTES = 16 * 1024 * 1024
_LOOK_S = 1.0
_NOBODY, _NONE = "503", "404"


def _is_news(record: logging.LogRecord) -> bool:
    """What asyncio writes at the end of every TLS stream of `nats` says nothing."""
    return "eof_received() has no effect" not in record.msg


logging.getLogger("asyncio").addFilter(_is_news)


class Untold(Exception):  # noqa: N818 - an answer, not a fault
    """The server has no such message."""


class Dialed:
    """A connection that stands, until `ended`."""

    def __init__(self, client: Client, name: str) -> None:
        self._client = client
        self.server: str = client._server_info.get("server_id", "")
        """The id of the server's process: another one has nothing stored."""
        self.ended = asyncio.Event()
        self.reason = ""
        """Why it ended."""
        self._inbox = f"{inbox_of(name)}.{secrets.token_hex(8)}"
        self._numbers = itertools.count()
        self._asked: dict[str, tuple[str, asyncio.Future[bytes]]] = {}
        self._subscribed: dict[str, Subscription] = {}
        self._all: list[Subscription] = []
        self._watching: asyncio.Task[None] | None = None

    async def listen(self) -> None:
        """Hear the replies, and notice the end; to be called once, first."""
        self._watching = asyncio.get_running_loop().create_task(self._watch())
        self._all = [await self._client.subscribe(f"{self._inbox}.*", cb=self._replied)]

    async def ask(self, subject: str, data: bytes) -> bytes:
        """One request → its reply. NoAnswer where nobody serves it, or the connection ends; Untold."""
        number = f"{next(self._numbers)}-{secrets.token_hex(4)}"
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._asked[number] = subject, future
        try:
            await self.publish(subject, data, f"{self._inbox}.{number}")
            return await future
        finally:
            del self._asked[number]
            if future.done() and not future.cancelled():
                future.exception()  # seen, also where it ended while the request was sent

    async def publish(self, subject: str, data: bytes, reply: str = "") -> None:
        """Send a message. NoAnswer where the connection has ended."""
        try:
            await self._client.publish(subject, data, reply=reply)
        except Exception as error:
            self._end(str(error))
            raise NoAnswer(subject, "lost", str(error)) from None

    async def subscribe(self, subject: str, arrived: Callable[[Dialed, Msg], None]) -> None:
        """Have messages of a subject given to a function that returns at once; the server knows when this returns."""

        async def hear(message: Msg) -> None:
            arrived(self, message)

        self._subscribed[subject] = await self._client.subscribe(subject, cb=hear)
        self._all.append(self._subscribed[subject])
        await self._client.flush(_FLUSH_S)

    async def unsubscribe(self, subject: str) -> None:
        """Hear no more of a subject."""
        with suppress(Exception):  # the connection has ended
            await self._subscribed.pop(subject).unsubscribe()

    async def close(self) -> None:
        """End it, and what is being asked."""
        self._end("closed")
        if self._watching is not None:
            self._watching.cancel()
        with suppress(Exception):
            await asyncio.wait_for(self._client.close(), _LEAVE_S)
        for subscription in self._all:
            with suppress(Exception):  # the client leaves their tasks where it ended by itself
                subscription._stop_processing()

    async def _watch(self) -> None:
        """The client does not always tell that its connection has ended, such as while it connects or closes."""
        while self._client.is_connected:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(_LOOK_S)
        self._end("the connection ended")

    def _end(self, reason: str) -> None:
        self.reason = self.reason or reason
        self.ended.set()
        for subject, future in self._asked.values():
            if not future.done():
                future.set_exception(NoAnswer(subject, "lost", self.reason))

    async def _replied(self, message: Msg) -> None:
        asked = self._asked.get(message.subject.rpartition(".")[2])
        if asked is None or asked[1].done():
            return
        subject, future = asked
        status = (message.headers or {}).get("Status")
        if status == _NOBODY:
            future.set_exception(NoAnswer(subject, "nobody"))
        elif status == _NONE:
            future.set_exception(Untold(subject))
        else:
            future.set_result(message.data)


async def dial(address: str, ticket: Ticket, tls: ssl.SSLContext) -> Dialed | tuple[BusState, str]:
    """Connect to one address → the connection, or how that failed and why, in words without secrets."""
    client = importlib.import_module("nats.aio.client").Client()
    failures = (OSError, TimeoutError, importlib.import_module("nats.errors").Error)
    told: list[str] = []
    dialed: Dialed | None = None

    async def heard(error: Exception) -> None:
        told.append(_worded(error))
        del told[:-3]

    async def closed() -> None:
        if dialed is not None:
            dialed._end(told[-1] if told else "the connection ended")

    try:
        async with asyncio.timeout(DIAL_S):
            await client.connect(
                f"tls://{address}",
                name=ticket.name,
                nkeys_seed_str=ticket.seed,
                tls=tls,
                tls_hostname=server_name(ticket.run),
                tls_handshake_first=True,
                inbox_prefix=inbox_of(ticket.name),
                allow_reconnect=False,
                max_reconnect_attempts=1,
                reconnect_time_wait=0,
                connect_timeout=4,
                ping_interval=_PING_S,
                max_outstanding_pings=_PINGS,
                pending_size=_PENDING_BYTES,
                error_cb=heard,
                closed_cb=closed,
            )
            dialed = Dialed(client, ticket.name)
            await dialed.listen()
    except failures as error:
        await (dialed or Dialed(client, ticket.name)).close()
        return _failed(error), f"{address}: {told[-1] if isinstance(error, TimeoutError) and told else _worded(error)}"
    return dialed


def _failed(error: Exception) -> BusState:
    if isinstance(error, ssl.SSLCertVerificationError) or (
        isinstance(error, ssl.SSLError) and error.reason in ("WRONG_VERSION_NUMBER", "UNSUPPORTED_PROTOCOL")
    ):
        return "untrusted"
    return "refused" if "authorization violation" in str(error).lower() else "lost"


def _worded(error: Any) -> str:
    return str(error) or type(error).__name__
