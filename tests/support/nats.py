"""A real message server for tests, and ends of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import anyio

from tests.support.extras import extra
from troupe.cluster.bus import asked_subjects, asker_of
from troupe.cluster.connection import Connection, connect
from troupe.cluster.server import MessageServer, serving
from troupe.cluster.ticket import Ticket, read_ticket

STORE_BYTES = 24 * 1024 * 1024
PATIENCE_S = 30.0


@contextmanager
def server(folder: Path, serve: str = "127.0.0.1:0") -> Iterator[MessageServer]:
    """The message server of a run whose folder this is; the test is skipped where there is none to be had."""
    extra("nkeys")
    folder.mkdir(exist_ok=True)
    with serving(folder / "join", serve, store_bytes=STORE_BYTES) as serving_now:
        yield serving_now


def ticket_of(server: MessageServer, name: str) -> Ticket:
    """The ticket of a worker, who is invited if need be."""
    file = server.users.ticket_file(name)
    return read_ticket(file if file.exists() else server.users.invite(name))


@asynccontextmanager
async def ends(*tickets: Ticket) -> AsyncIterator[list[Connection]]:
    """Their ends of the bus, when all are connected."""
    async with AsyncExitStack() as stack:
        made = [await stack.enter_async_context(connect(ticket)) for ticket in tickets]
        with anyio.fail_after(PATIENCE_S):
            for one in made:
                await until(one, "connected")
        yield made


async def until(one: Connection, state: str) -> None:
    """Wait for a state of a connection."""
    with anyio.fail_after(PATIENCE_S):
        while one.state != state:  # noqa: ASYNC110 - it is told in another thread
            await anyio.sleep(0.01)


@asynccontextmanager
async def echoing(hub: Connection, run: str) -> AsyncIterator[list[str]]:
    """The hub answers every request with who asked and the first 16 bytes → the subjects that it was asked on."""
    asked: list[str] = []

    async def answer(subject: str, data: bytes) -> bytes:
        asked.append(subject)
        return asker_of(subject).encode() + b":" + data[:16]

    async with hub.serve(asked_subjects(run), answer):
        yield asked
