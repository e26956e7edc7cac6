"""Blobs: bytes of any size in the memory of the message server, in chunks with sums.

A blob called SUBJECT has its chunks below SUBJECT.0, SUBJECT.1, …, and below SUBJECT.head, which is put last, what they
are. Who reads looks at the head first: a blob is whole or it is not there.
"""

import hashlib
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing
from itertools import islice
from typing import Annotated, TypeVar

import anyio
import anyio.to_thread
import msgspec

from troupe.cluster.bus import CHUNK_BYTES, Bus, NoAnswer
from troupe.errors import RunError
from troupe.runtime.backoff import backoff_s
from troupe.runtime.frames import MessageError, decoder, encode

T = TypeVar("T")

MAX_BLOB_BYTES = 1024 * 1024 * CHUNK_BYTES
_AT_ONCE = 8
_TRIES = 5
_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 2.0
_ASIDE_BYTES = 128 * 1024
_SUM_BYTES = hashlib.sha256().digest_size


class BlobHead(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """What the chunks of a blob are."""

    size: Annotated[int, msgspec.Meta(ge=0, le=MAX_BLOB_BYTES)]
    """Bytes of all."""
    chunk: Annotated[int, msgspec.Meta(ge=1, le=CHUNK_BYTES)]
    """Bytes of each but the last."""
    sums: bytes
    """SHA-256 of each, one after another."""

    @property
    def count(self) -> int:
        """Chunks that there are."""
        return -(-self.size // self.chunk)

    @property
    def digest(self) -> str:
        """Of the whole: SHA-256 of the sums, as `digest_of` gives it for the bytes."""
        return hashlib.sha256(self.sums).hexdigest()


class BlobMissingError(Exception):
    """A blob is not there, or went while it was read."""


_decode_head: Callable[[bytes], BlobHead] = decoder(BlobHead, "the run and a worker")


def in_chunks(pieces: Iterable[bytes | memoryview], size: int = CHUNK_BYTES) -> Iterator[bytes]:
    """The same bytes in chunks of `size`, the last one shorter; of each piece only what is asked for is looked at."""
    chunk = bytearray()
    for piece in pieces:
        rest = memoryview(piece).cast("B")
        while len(chunk) + len(rest) >= size:
            taken = size - len(chunk)
            chunk += rest[:taken]
            rest = rest[taken:]
            yield bytes(chunk)
            chunk.clear()
        chunk += rest
    if chunk:
        yield bytes(chunk)


class Sums:
    """The sums of bytes that come chunk by chunk."""

    def __init__(self) -> None:
        self._sums = bytearray()
        self._size = self._chunk = 0

    def add(self, chunk: bytes) -> None:
        """Take the next chunk in; all but the last are of one size."""
        self._sums += hashlib.sha256(chunk).digest()
        self._size += len(chunk)
        self._chunk = max(self._chunk, len(chunk))

    @property
    def head(self) -> BlobHead:
        """Of what has come."""
        return BlobHead(size=self._size, chunk=max(1, self._chunk), sums=bytes(self._sums))


def digest_of(pieces: Iterable[bytes | memoryview]) -> str:
    """The digest of bytes, in whatever pieces they come: that of a blob of them in chunks of the usual size."""
    sums = Sums()
    for chunk in in_chunks(pieces):
        sums.add(chunk)
    return sums.head.digest


async def put_blob(bus: Bus, subject: str, chunks: AsyncGenerator[bytes, None]) -> BlobHead:
    """Put chunks, all but the last of one size of at most 4 MB, as they come → the head, which is put last. NoAnswer
    where the connection is lost meanwhile."""
    sums, number = Sums(), 0
    async with aclosing(chunks):
        async for chunk in chunks:
            await aside(sums.add, chunk)
            await bus.put(f"{subject}.{number}", chunk)
            number += 1
    head = sums.head
    await bus.put(f"{subject}.head", encode(head))
    return head


async def put_bytes(bus: Bus, subject: str, data: bytes, *, chunk: int = CHUNK_BYTES) -> BlobHead:
    """Put bytes that are there already."""

    async def chunks() -> AsyncGenerator[bytes, None]:
        for each in in_chunks([data], chunk):
            yield each

    return await put_blob(bus, subject, chunks())


async def drop_blob(bus: Bus, subject: str) -> None:
    """Remove a blob, its head first."""
    await bus.purge(f"{subject}.head")
    await bus.purge(f"{subject}.>")


async def head_of(bus: Bus, subject: str) -> BlobHead:
    """What a blob is. BlobMissingError where it is not there; MessageError where its head is none."""
    data = await get_stored(bus, f"{subject}.head")
    if data is None:
        raise BlobMissingError(subject)
    head = _decode_head(data)
    if len(head.sums) != head.count * _SUM_BYTES:
        raise MessageError(f"{subject}.head: {len(head.sums)} bytes of sums for {head.count} chunks")
    return head


async def get_blob(bus: Bus, subject: str, sink: Callable[[bytes], Awaitable[None]], *, most: int) -> BlobHead:
    """Give the chunks of a blob of at most `most` bytes to `sink` in order, each checked, while the next ones come.

    BlobMissingError where it is not there, or goes meanwhile; MessageError where its head is none; RunError where a
    chunk comes damaged again and again.
    """
    head = await head_of(bus, subject)
    if head.size > most:
        raise MessageError(f"{subject}: {head.size:,} bytes, of which there may be {most:,}")
    coming: deque[_Chunk] = deque()
    fault: Exception | None = None
    async with anyio.create_task_group() as tasks:
        numbers = iter(range(head.count))
        while fault is None:
            for number in islice(numbers, _AT_ONCE - len(coming)):
                coming.append(_Chunk(bus, subject, head, number))
                tasks.start_soon(coming[-1].fetch)
            if not coming:
                break
            chunk = coming.popleft()
            await chunk.ended.wait()
            fault = chunk.fault
            if fault is None:
                await sink(chunk.data)
        tasks.cancel_scope.cancel()
    if fault is not None:
        raise fault
    return head


async def get_bytes(bus: Bus, subject: str, *, most: int) -> bytes:
    """A whole blob; as `get_blob`."""
    data = bytearray()

    async def add(chunk: bytes) -> None:
        data.extend(chunk)

    await get_blob(bus, subject, add, most=most)
    return bytes(data)


class _Chunk:
    """One chunk on its way."""

    def __init__(self, bus: Bus, subject: str, head: BlobHead, number: int) -> None:
        self._bus, self._blob, self._head, self._subject = bus, subject, head, f"{subject}.{number}"
        self._sum = head.sums[number * _SUM_BYTES : (number + 1) * _SUM_BYTES]
        self.data = b""
        self.fault: Exception | None = None
        self.ended = anyio.Event()

    async def fetch(self) -> None:
        """Ask until it is there, or it is known that it will not be."""
        try:
            self.data = await self._fetched()
        except Exception as error:  # raised where the chunk is waited for
            self.fault = error
        self.ended.set()

    async def _fetched(self) -> bytes:
        for nth in range(1, _TRIES + 1):
            data = await get_stored(self._bus, self._subject)
            if data is None:
                raise BlobMissingError(self._subject)
            if await aside(_sum, data) == self._sum:
                return data
            if await head_of(self._bus, self._blob) != self._head:
                raise BlobMissingError(self._blob)  # another is being put there, as when the server has begun anew
            await anyio.sleep(backoff_s(nth, _PAUSE_S, _LONGEST_PAUSE_S))
        raise RunError(f"{self._subject}: came damaged {_TRIES} times; what was put there is not what its head says")


async def get_stored(bus: Bus, subject: str) -> bytes | None:
    """What is stored, however long the connection is lost meanwhile. NoAnswer where this end is not let in."""
    nth = 0
    while True:
        try:
            return await bus.get(subject)
        except NoAnswer as error:
            if error.why == "refused":
                raise
            nth += 1
            await anyio.sleep(backoff_s(nth, _PAUSE_S, _LONGEST_PAUSE_S))


async def aside(function: Callable[[bytes], T], data: bytes) -> T:
    """In a thread, where it takes more than a moment."""
    if len(data) < _ASIDE_BYTES:
        return function(data)
    return await anyio.to_thread.run_sync(function, data)


def _sum(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
