"""The clients of a listening socket, one after the other, whatever happens to any of them."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncGenerator

import anyio

_LOG = logging.getLogger("troupe.daemon")
_PAUSE_S = 0.1
"""After one who could not be let in: where no descriptors are left, the next could not either."""


async def arrivals(listener: socket.socket, whose: str, pause_s: float = _PAUSE_S) -> AsyncGenerator[socket.socket]:
    """Connections that do not block, until it is cancelled; then the listener is closed."""
    loop = asyncio.get_running_loop()
    with listener:
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:  # no descriptors left, or the client is gone already
                _LOG.warning("a client of the %s could not be let in: %s", whose, error)
                await anyio.sleep(pause_s)
                continue
            connection.setblocking(False)
            yield connection
