"""Policy versions through the message server: published by the run, fetched by workers as files.

A version is there whole (`full`) or as its change against a version that is there whole (`delta`, by `deltas.py`); its
head says which, and the digest of the file that it comes to. Where an adapter is trained, the adapter is what a
version is.
"""

from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Annotated

import anyio
import anyio.to_thread
import msgspec

from troupe.cluster.blobs import MAX_BLOB_BYTES, digest_of, drop_blob, in_chunks, put_blob
from troupe.cluster.bus import Bus, FullError, NoAnswer, stored_subject
from troupe.cluster.deltas import are_alike, deltas
from troupe.cluster.wire import PULL_WAIT_S
from troupe.policy import Weights
from troupe.policy.safetensors import safetensors_bytes, safetensors_chunks
from troupe.runtime.board import PolicyBoard
from troupe.runtime.device import DeviceThread
from troupe.runtime.frames import decoder, encode
from troupe.runtime.reporter import Reporter

FULL_EVERY = 32
"""A version so much newer than the base of deltas is put whole."""
_WORTH = 0.6
"""A delta is at most so much of the whole."""
_LOOK_S = 1.0
"""How often it is seen whether the server was started anew."""
_FULL_S = 2.0
"""Before what a full server did not store is put once more."""
_KEPT_FREE = 2

Pieces = Iterable[bytes | memoryview]


class VersionHead(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """How a version can be had."""

    version: Annotated[int, msgspec.Meta(ge=0)]
    digest: str
    """Of its file, as `blobs.digest_of`."""
    size: Annotated[int, msgspec.Meta(ge=0, le=MAX_BLOB_BYTES)]
    """Bytes of its file, or a little more."""
    base: int | None = None
    """The version that it is told as a change of; None: it is there whole."""


class Newest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`newest`: the newest version that the worker knows of; answered with the run's, when that is newer, or after
    a while."""

    version: int


decode_newest: Callable[[bytes], Newest] = decoder(Newest, "the run and a worker")
decode_version_head: Callable[[bytes], VersionHead] = decoder(VersionHead, "the run and a worker")


def version_subject(run: str, version: int, form: str = "") -> str:
    """Where a version is: its head (`head`), the blob of it whole (`full`), of its change (`delta`)."""
    return stored_subject(run, f"v{version}", *([form] if form else []))


class WeightsPublisher:
    """Puts versions, and other blobs that workers need, where workers find them; anew when the server was started anew.

    Belongs to one event loop. Arrays are read on the device thread given; nobody waits for it but who asks.
    """

    def __init__(
        self,
        bus: Bus,
        run: str,
        device: DeviceThread,
        *,
        full_every: int = FULL_EVERY,
        report: Reporter | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`full_every`: of so many versions one is put whole. `tell`: of a server that is full, and no more."""
        self._bus, self._run, self._device, self._full_every = bus, run, device, full_every
        self._report, self._tell = report or Reporter("publisher"), tell
        self._full = False
        self._shelf: dict[str, Callable[[], Pieces]] = {}
        self._shelved: set[str] = set()
        self._there: dict[int, VersionHead] = {}
        self._base: tuple[int, Weights] | None = None
        self._epoch = -1
        self._putting = anyio.Lock()
        self._published = anyio.Event()
        self.sent_bytes = 0
        """That versions took on their way to the server, so far."""

    @property
    def newest(self) -> int:
        """The newest version that workers can have; −1 before there is any."""
        return max(self._there, default=-1)

    @property
    def there(self) -> Mapping[int, VersionHead]:
        """All versions that workers can have."""
        return dict(self._there)

    def shelve(self, name: str, pieces: Callable[[], Pieces]) -> None:
        """Have a blob put at `RUN.w.NAME`, of what `pieces()` gives in a thread, now and whenever it is lost."""
        self._shelf[name] = pieces
        self._shelved.discard(name)

    async def follow(self, board: PolicyBoard[Weights], *, every: bool) -> None:
        """Publish what is on the board until cancelled: every version that it keeps (`every`), or always the newest
        that there is when the one before is done, and what it holds. What the server has no room for is put again and
        again."""
        while True:
            seen = board.version
            try:
                await self._catch_up(board, every=every)
            except NoAnswer:
                await anyio.sleep(_LOOK_S)
                continue
            except FullError as error:
                await self._make_room(error, board.kept if every else [self.newest, *board.held])
                continue
            if self._full:
                self._full = False
                self._tell("the message server stores what workers need again")
            with anyio.move_on_after(_LOOK_S):
                await board.newer_than(seen)

    async def until_there(self, version: int) -> None:
        """Wait until workers can have a version, or a newer one."""
        while self.newest < version:
            await self._published.wait()

    async def tell_newest(self, worker: str, body: bytes) -> bytes:
        """The handler of the verb `newest`."""
        known = decode_newest(body).version
        with anyio.move_on_after(PULL_WAIT_S - 2.0):
            while self.newest <= known:
                await self._published.wait()
        return encode(Newest(version=self.newest))

    async def publish(self, version: int, weights: Weights) -> None:
        """Put a version, unless it is there: as a change where that is less, else whole. NoAnswer, FullError."""
        async with self._putting:
            self._notice_epoch()
            if version in self._there:
                return
            epoch = self._bus.epoch
            with self._report.span("publish weights", step=version):
                try:
                    head = await self._as_delta(version, weights) or await self._whole(version, weights)
                except FullError:
                    with suppress(NoAnswer, FullError):
                        await self._bus.purge(version_subject(self._run, version, ">"))
                    raise
            if self._bus.epoch != epoch:
                raise NoAnswer(version_subject(self._run, version), "lost", "the server was started anew")
            if head.base is None and self._full_every > 1 and (self._base is None or self._base[0] < version):
                self._base = version, weights
            self._there[version] = head
            self._published.set()
            self._published = anyio.Event()

    async def full(self, version: int, weights: Weights) -> None:
        """Put a version whole that is there as a change: a worker cannot make it of that. NoAnswer, FullError."""
        async with self._putting:
            head = self._there.get(version)
            if head is not None and head.base is not None:
                self._there[version] = await self._whole(version, weights)

    async def keep(self, versions: Iterable[int]) -> None:
        """Forget all versions but these and what they are told as changes of. NoAnswer."""
        async with self._putting:
            kept = set(versions)
            kept |= {head.base for v, head in self._there.items() if v in kept and head.base is not None}
            if self._base is not None:
                kept.add(self._base[0])
            for version in [v for v in self._there if v not in kept]:
                del self._there[version]
                await self._bus.purge(version_subject(self._run, version, "head"))
                await self._bus.purge(version_subject(self._run, version, ">"))

    async def _make_room(self, error: FullError, kept: Iterable[int]) -> None:
        if not self._full:
            self._full = True
            self._tell(f"{error}; it is tried again, and workers wait for what they do not have")
        with suppress(NoAnswer, FullError):
            await self.keep(kept)
        await anyio.sleep(_FULL_S)

    async def _catch_up(self, board: PolicyBoard[Weights], *, every: bool) -> None:
        self._notice_epoch()
        for name in [name for name in self._shelf if name not in self._shelved]:
            pieces = await anyio.to_thread.run_sync(self._shelf[name])
            await put_blob(self._bus, stored_subject(self._run, name), _aside(in_chunks(pieces)))
            self._shelved.add(name)
        kept, held = dict(board.kept), board.held
        for version in sorted(kept if every else {*sorted(kept)[-1:], *held}):
            if version not in self._there:
                await self.publish(version, kept[version])
        await self.keep(kept if every else {*sorted(self._there)[-_KEPT_FREE:], *held})

    def _notice_epoch(self) -> None:
        if self._bus.epoch != self._epoch:
            self._epoch = self._bus.epoch
            self._there.clear()
            self._shelved.clear()
            self._base = None

    async def _whole(self, version: int, weights: Weights) -> VersionHead:
        blob = version_subject(self._run, version, "full")
        head = await put_blob(self._bus, blob, self._from_device(in_chunks(safetensors_chunks(weights))))
        self.sent_bytes += head.size
        told = VersionHead(version=version, digest=head.digest, size=head.size)
        await self._bus.put(version_subject(self._run, version, "head"), encode(told))
        return told

    async def _as_delta(self, version: int, weights: Weights) -> VersionHead | None:
        """None where it has to be told whole."""
        if self._base is None:
            return None
        base, old = self._base
        if not 0 < version - base < self._full_every or not are_alike(old, weights):
            return None
        size, blob = safetensors_bytes(weights), version_subject(self._run, version, "delta")
        changes = self._from_device(in_chunks(deltas(old, weights)), int(_WORTH * size))
        try:
            put = await put_blob(self._bus, blob, changes)
        except _TooMuch:
            await drop_blob(self._bus, blob)
            return None
        self.sent_bytes += put.size
        digest = await self._device.run(lambda: digest_of(safetensors_chunks(weights)), plain=True)
        told = VersionHead(version=version, digest=digest, size=size, base=base)
        await self._bus.put(version_subject(self._run, version, "head"), encode(told))
        return told

    async def _from_device(self, chunks: Iterator[bytes], most: int = MAX_BLOB_BYTES) -> AsyncGenerator[bytes, None]:
        size = 0
        async with self._device.iterate(chunks, on_leave=lambda: None) as items:
            while (chunk := await items.next()) is not None:
                size += len(chunk)
                if size > most:
                    raise _TooMuch
                yield chunk


class _TooMuch(Exception):  # noqa: N818 - nobody outside sees it
    """A delta is hardly less than the whole."""


async def _aside(chunks: Iterator[bytes]) -> AsyncGenerator[bytes, None]:
    """What an iterator gives, made in threads."""
    while (chunk := await anyio.to_thread.run_sync(next, chunks, None)) is not None:
        yield chunk
