"""The clients of a listening socket."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from typing import Any

import anyio
import pytest

from troupe.runtime.arrivals import SocketServer

pytestmark = pytest.mark.anyio


class Greeter(SocketServer):
    whose = "page"
    pause_s = 0.001

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.greeted = 0

    def _open(self) -> socket.socket:
        return self.listener

    async def _serve(self, connection: socket.socket) -> None:
        assert not connection.getblocking()
        connection.sendall(b"hello")
        self.greeted += 1


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
    with caplog.at_level(logging.WARNING, "troupe.daemon"), anyio.fail_after(10):
        async with Greeter() as server:
            clients = [socket.create_connection(server.listener.getsockname()) for _ in range(2)]
            while server.greeted < 2:  # noqa: ASYNC110 - what is waited for tells nobody
                await anyio.sleep(0.001)
            for client in clients:
                client.close()
    assert server.listener.fileno() == -1
    assert [record.message.partition(": ")[0] for record in caplog.records] == [
        "a client of the page could not be let in"
    ] * 2
    assert "Too many open files" in caplog.text
