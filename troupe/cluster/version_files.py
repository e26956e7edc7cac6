"""A worker's policy versions: files that are whole, made of what the run has published."""

from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import anyio

from troupe.cluster.blobs import BlobHead, BlobMissingError, Sums, aside, get_blob, get_stored, in_chunks
from troupe.cluster.bus import Bus
from troupe.cluster.deltas import applied
from troupe.cluster.versions import VersionHead, decode_version_head, version_subject
from troupe.errors import RunError
from troupe.runtime.device import DeviceThread
from troupe.runtime.files import drafted
from troupe.runtime.frames import MessageError

_HEADER_BYTES = 100_000_000
"""More than a file's header takes beside the tensors."""
_TRIES = 3


class VersionFiles:
    """Fetches versions into a folder, one at a time, and removes those that are not kept."""

    def __init__(
        self, bus: Bus, run: str, folder: Path, device: DeviceThread, *, damaged: Callable[[int], Awaitable[None]]
    ) -> None:
        """`device`: the thread in which changes are applied. `damaged`: asks the run to put a version whole."""
        self._bus, self._run, self._folder, self._device = bus, run, folder, device
        self._damaged = damaged
        self._digests: dict[int, str] = {}
        self._kept: frozenset[int] = frozenset()
        self._bases: dict[int, int] = {}
        self._fetching = anyio.Lock()

    async def fetch(self, version: int) -> Path:
        """The file of a version, as the run has it now.

        BlobMissingError where the run has it not, or not any more; RunError where what it has comes damaged however
        often it is asked for.
        """
        async with self._fetching:
            for _ in range(_TRIES):
                head = await self._head(version)
                try:
                    return await self._made(head)
                except MessageError:
                    if head.base is not None:
                        self._forget(head.base)
                        await self._damaged(version)
            raise RunError(f"version {version} of the policy came damaged {_TRIES} times; restart the run's server")

    def keep(self, versions: Iterable[int]) -> None:
        """Remove the files of all other versions, but what those are made of."""
        self._kept = frozenset(versions)
        kept = self._kept | {self._bases[version] for version in self._kept if version in self._bases}
        if self._bases:
            kept |= {self._bases[max(self._bases)]}  # what the next one is likely to be made of
        for version in [version for version in self._digests if version not in kept]:
            self._forget(version)

    async def _head(self, version: int) -> VersionHead:
        subject = version_subject(self._run, version, "head")
        data = await get_stored(self._bus, subject)
        if data is None:
            raise BlobMissingError(subject)
        head = decode_version_head(data)
        if head.version != version or (head.base is not None and head.base >= version):
            raise RunError(f"{subject}: the head of another version is there")
        return head

    async def _made(self, head: VersionHead) -> Path:
        path = self._path(head.version)
        if self._digests.get(head.version) == head.digest:
            return path
        self._forget(head.version)
        if head.base is None:
            digest = await self._whole(head, path)
        else:
            base = await self._head(head.base)
            if base.base is not None:
                raise BlobMissingError(f"version {head.base}, whole")  # all is being put there anew
            digest = await self._changed(head, await self._made(base), path)
        if digest != head.digest:
            path.unlink(missing_ok=True)
            raise MessageError(f"version {head.version} does not come to what its head says")
        self._digests[head.version] = digest
        if head.base is not None:
            self._bases[head.version] = head.base
        return path

    async def _whole(self, head: VersionHead, path: Path) -> str:
        blob = version_subject(self._run, head.version, "full")
        return (await self._saved(blob, path, head.size + _HEADER_BYTES)).digest

    async def _changed(self, head: VersionHead, base: Path, path: Path) -> str:
        delta = path.with_suffix(".delta")
        await self._saved(version_subject(self._run, head.version, "delta"), delta, head.size + _HEADER_BYTES)
        try:
            return await self._device.run(_write_changed, base, delta, path, plain=True)
        finally:
            delta.unlink(missing_ok=True)

    async def _saved(self, blob: str, path: Path, most: int) -> BlobHead:
        """Write a blob to a file, whole or not at all."""
        with drafted(path) as draft, draft.open("wb") as file:

            async def write(chunk: bytes) -> None:
                await aside(file.write, chunk)

            head = await get_blob(self._bus, blob, write, most=most)
            file.flush()
            return head

    def _path(self, version: int) -> Path:
        return self._folder / f"{version:08d}.safetensors"

    def _forget(self, version: int) -> None:
        self._digests.pop(version, None)
        self._bases.pop(version, None)
        self._path(version).unlink(missing_ok=True)


def _write_changed(base: Path, delta: Path, path: Path) -> str:
    """Write what a change makes of a base → its digest. MessageError where it is no change of it."""
    sums = Sums()
    with drafted(path) as draft, draft.open("wb") as file, delta.open("rb") as changes:
        for chunk in in_chunks(applied(base, changes)):
            sums.add(chunk)
            file.write(chunk)
    return sums.head.digest
