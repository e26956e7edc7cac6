"""The server's end of the control socket: many clients, none of which can harm the run or each other.

What a client may use up is bounded: connections, the bytes of a line, the time that a line and an answer may take.
Whoever goes over a bound is told so, where he listens, and dropped.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeAlias

import anyio
import anyio.lowlevel
import msgspec

from troupe.daemon.control.place import Peer, Place, peer_of
from troupe.daemon.control.protocol import MAX_REQUEST_BYTES, ProtocolError, Reply, Request, decode_request, encode_line
from troupe.errors import sayable
from troupe.messages import Refused
from troupe.runtime.arrivals import SocketServer

Handler: TypeAlias = Callable[[Request, Peer], Awaitable[Reply]]

_LOG = logging.getLogger("troupe.daemon")
_CHUNK_BYTES = 64 * 1024


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a client may use up."""

    connections: int = 32
    line_s: float = 10.0
    """From the first byte of a request to its last."""
    idle_s: float = 300.0
    """Without any byte, after which a place is given to others."""
    write_s: float = 10.0
    """That a client may take to read an answer."""


class _DroppedError(Exception):
    """The client is told why, and dropped."""


class ControlServer(SocketServer):
    """Serves a run folder's control socket: `async with ControlServer(folder, handler) as server`.

    The folder has to be there. Entering raises OutputError where somebody else serves it; where the system has no
    sockets to give, `unavailable` says why, and nobody is served. Leaving drops everybody and removes the socket.
    """

    whose = "control socket"

    def __init__(
        self,
        folder: Path,
        handler: Handler,
        limits: Limits | None = None,
        *,
        place: Place | None = None,
        peer_of: Callable[[socket.socket], Peer] = peer_of,
    ) -> None:
        """`place`: where it listens; `peer_of`: who is at the other end."""
        self.unavailable: str | None = None
        self._place = place or Place(folder)
        self._peer_of = peer_of
        self._handler = handler
        self._limits = limits or Limits()

    def _open(self) -> socket.socket | None:
        try:
            self._place.take()
            return self._place.listen()
        except OSError as error:
            self._place.leave()
            self.unavailable = f"there is no control socket ({error}), so `troupe status` and the like do not reach it"
            return None
        except BaseException:
            self._place.leave()
            raise

    def _leave(self) -> None:
        self._place.leave()

    async def _serve(self, connection: socket.socket) -> None:
        peer = self._peer_of(connection)
        try:
            try:
                self._check(peer)
                await self._converse(connection, peer)
            except _DroppedError as reason:
                _LOG.debug("%s is dropped: %s", peer, reason)
                await _send(connection, _refusal(str(reason)), self._limits.write_s)
        except (OSError, TimeoutError) as error:
            _LOG.debug("%s is gone: %r", peer, error)

    def _check(self, peer: Peer) -> None:
        if not peer.may_enter:
            raise _DroppedError(f"this run belongs to another user than {peer.uid}")
        if self.connections > self._limits.connections:
            raise _DroppedError(f"{self._limits.connections} clients are there already; try again when one has gone")

    async def _converse(self, connection: socket.socket, peer: Peer) -> None:
        """Until the client closes its side; half a line before that is no request."""
        read = bytearray()
        while (line := await self._line(connection, read)) is not None:
            await _send(connection, await self._answer(line, peer), self._limits.write_s)
            await anyio.lowlevel.checkpoint()  # a client that never stops asking leaves others their turn

    async def _line(self, connection: socket.socket, read: bytearray) -> bytes | None:
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        searched = 0
        while (end := read.find(b"\n", searched)) < 0:
            searched = len(read)
            if searched > MAX_REQUEST_BYTES:
                raise _DroppedError(f"a request has at most {MAX_REQUEST_BYTES:,} bytes")
            allowed_s = begun_s + self._limits.line_s - loop.time() if read else self._limits.idle_s
            try:
                with anyio.fail_after(max(0.0, allowed_s)):
                    chunk = await loop.sock_recv(connection, _CHUNK_BYTES)
            except TimeoutError:
                what = "a request was not finished" if read else "nothing was asked"
                raise _DroppedError(f"{what} within {self._limits.line_s if read else allowed_s:g} s") from None
            if not chunk:
                return None
            if not read:
                begun_s = loop.time()
            read += chunk
        line = bytes(read[:end])
        del read[: end + 1]
        if len(line) > MAX_REQUEST_BYTES:
            raise _DroppedError(f"a request has at most {MAX_REQUEST_BYTES:,} bytes")
        return line

    async def _answer(self, line: bytes, peer: Peer) -> bytes:
        try:
            request = decode_request(line)
        except ProtocolError as error:
            _LOG.debug("%s: %s", peer, error)
            return _refusal(str(error))
        try:
            return encode_line(await self._handler(request, peer))
        except Exception as error:  # a request must not end the run
            _LOG.exception("a request of %s failed", peer)
            return _refusal(f"the request failed: {type(error).__name__}: {error}")


def _refusal(message: str) -> bytes:
    return encode_line(Refused(message=sayable(message)))


async def _send(connection: socket.socket, line: bytes, within_s: float) -> None:
    with anyio.fail_after(within_s):
        await asyncio.get_running_loop().sock_sendall(connection, line)
