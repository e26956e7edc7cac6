"""Frames of bytes over a socket: 4 bytes of length, most significant first, and that many bytes.

Messages between our own processes are frames of msgpack, which a decoder of the types that may come checks.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import cached_property
from typing import Any, BinaryIO

import anyio
import msgspec

MAX_FRAME_BYTES = 256 * 1024 * 1024
_LENGTH_BYTES = 4
_BUFFER_BYTES = 1024 * 1024

encode = msgspec.msgpack.Encoder().encode
"""One message as one frame."""


class FrameError(ValueError):
    """What came is no frame, or what was to be sent is too long for one."""


class MessageError(FrameError):
    """A frame that holds nothing that may come here."""


class Connection:
    """Frames both ways over one socket; the same on either side. One task receives at a time, any may send."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, max_frame_bytes: int = MAX_FRAME_BYTES
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._max_frame_bytes = max_frame_bytes
        self._length: int | None = None  # of the frame whose head was read already by a call that was cancelled

    @classmethod
    async def over(cls, wire: socket.socket, max_frame_bytes: int = MAX_FRAME_BYTES) -> Connection:
        """A connection that owns this stream socket."""
        reader, writer = await asyncio.open_connection(sock=wire, limit=_BUFFER_BYTES)
        return cls(reader, writer, max_frame_bytes)

    async def send(self, frame: bytes) -> None:
        """Send one frame whole, waiting while much is unsent. FrameError where it is too long, BrokenResourceError
        where nobody is there to read it."""
        if len(frame) > self._max_frame_bytes:
            raise FrameError(f"a frame of {len(frame):,} bytes is over the limit of {self._max_frame_bytes:,}")
        if self._writer.is_closing():
            raise anyio.BrokenResourceError("the connection is closed")
        self._writer.write(len(frame).to_bytes(_LENGTH_BYTES, "big") + frame)
        try:
            await self._writer.drain()
        except OSError as error:
            raise anyio.BrokenResourceError("the other side has closed the connection") from error

    async def receive(self) -> bytes:
        """The next frame. EndOfStream where the other side has closed; FrameError for a length that no frame has.

        May be cancelled without harm: the next call goes on where this one was.
        """
        try:
            if self._length is None:
                self._length = int.from_bytes(await self._reader.readexactly(_LENGTH_BYTES), "big")
            if self._length > self._max_frame_bytes:
                raise FrameError(
                    f"a frame of {self._length:,} bytes was announced, over the limit of {self._max_frame_bytes:,}: "
                    "what came is no frame"
                )
            frame = await self._reader.readexactly(self._length)
        except asyncio.IncompleteReadError as error:
            within = self._length is not None or error.partial
            raise anyio.EndOfStream("in the middle of a frame" if within else "") from None
        except OSError:
            raise anyio.EndOfStream("") from None
        self._length = None
        return frame

    @property
    def ended(self) -> bool:
        """Whether the other side has closed and all that it sent was read."""
        return self._reader.at_eof()

    def close(self) -> None:
        """Close at once: the other side reads what was sent and then the end. Safe to call twice."""
        self._writer.close()


class Wire:
    """The child's end of its connection, without an event loop: what is asked of it waits."""

    def __init__(self, wire: socket.socket) -> None:
        self._wire = wire

    @cached_property
    def _incoming(self) -> BinaryIO:  # made by who reads it: the socket stays open as long as it is
        return self._wire.makefile("rb")

    def send(self, frame: bytes) -> None:
        """Send one frame whole."""
        self._wire.sendall(len(frame).to_bytes(_LENGTH_BYTES, "big") + frame)

    def receive(self) -> bytes | None:
        """The next frame; None where the parent wants no more."""
        with suppress(OSError):
            head = self._incoming.read(_LENGTH_BYTES)
            length = int.from_bytes(head, "big")
            frame = self._incoming.read(length)
            if len(head) == _LENGTH_BYTES and len(frame) == length:
                return frame
        return None

    def run(self, handler: Callable[[Connection], Awaitable[None]]) -> None:
        """Go on in an event loop, to the end."""

        async def connected() -> None:
            connection = await Connection.over(self._wire)
            try:
                await handler(connection)
            except anyio.EndOfStream:
                if not connection.ended:
                    raise

        anyio.run(connected)


def decoder(messages: Any, between: str) -> Callable[[bytes], Any]:
    """A function from a frame to a message of these types (a struct or a union of structs); MessageError, which names
    `between` whom it was sent, for anything else."""
    decode = msgspec.msgpack.Decoder(messages).decode

    def decode_checked(frame: bytes) -> Any:
        try:
            return decode(frame)
        except msgspec.MsgspecError as error:
            raise MessageError(f"a frame of {len(frame)} bytes between {between} is no message: {error}") from None

    return decode_checked
