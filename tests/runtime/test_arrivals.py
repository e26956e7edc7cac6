"""The clients of a listening socket."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from typing import Any

import anyio
import pytest

from troupe.runtime.arrivals import arrivals

pytestmark = pytest.mark.anyio


async def test_who_cannot_be_let_in_keeps_nobody_else_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loop = asyncio.get_running_loop()
    accept, faults = loop.sock_accept, [OSError(errno.EMFILE, "Too many open files"), ConnectionAbortedError("gone")]

    async def accept_or_not(listener: socket.socket) -> Any:
        if faults:
            raise faults.pop(0)
        return await accept(listener)

    monkeypatch.setattr(loop, "sock_accept", accept_or_not)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    with caplog.at_level(logging.WARNING, "troupe.daemon"):
        clients = [socket.create_connection(listener.getsockname()) for _ in range(2)]
        with anyio.fail_after(10):
            async for connection in arrivals(listener, "page", pause_s=0.001):
                with connection, clients.pop() as client:
                    assert not connection.getblocking()
                    connection.sendall(b"hello")
                    client.settimeout(10)
                if not clients:
                    break
    assert [record.message.partition(": ")[0] for record in caplog.records] == [
        "a client of the page could not be let in"
    ] * 2
    assert "Too many open files" in caplog.text
    listener.close()


async def test_cancelling_closes_the_listener() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)

    async def serve() -> None:
        async for _ in arrivals(listener, "page", pause_s=0.001):
            pass

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(serve)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    assert listener.fileno() == -1
