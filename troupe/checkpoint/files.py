"""Files that are summed while they are written, and put on the disk for good before anybody relies on them.

Arrays go from their own memory by way of a block to the disk, past the system's cache where that can be. While one
block is summed and written, each in a thread of its own, the next is filled; for arrays all of it lets go of Python's
lock, so that other threads go on.
"""

import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import msgspec

from troupe.runtime.files import flush, sync

BLOCK_BYTES = 1 << 24
Chunks: TypeAlias = Iterable[bytes | memoryview]
"""The content of a file, in pieces."""


class FileSum(msgspec.Struct, frozen=True, kw_only=True):
    """What a manifest says of a file."""

    bytes: int
    sha256: str


def write_file(
    path: Path, chunks: Chunks, before_block: Callable[[], None] = lambda: None, *, block_bytes: int | None = None
) -> FileSum:
    """Write a file that was not there, and have it on the disk. OSError where that fails.

    `before_block` is called before each block of `block_bytes`; what it raises ends the writing.
    """
    block_bytes = block_bytes or BLOCK_BYTES
    digest, size = hashlib.sha256(), 0
    under_way: list[Future[None]] = []
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with ThreadPoolExecutor(2) as pool:
            for block in _blocks(chunks, block_bytes):
                _finish(under_way)
                before_block()
                _go_past_the_cache(descriptor, len(block) == block_bytes)
                under_way += pool.submit(digest.update, block), pool.submit(_write_all, descriptor, block)
                size += len(block)
            _finish(under_way)
        flush(descriptor)
    finally:
        wait(under_way)  # who writes must not meet another file of this number
        os.close(descriptor)
        if isinstance(chunks, Generator):
            chunks.close()  # what it holds must not wait until nobody looks at an error any more
    return FileSum(bytes=size, sha256=digest.hexdigest())


def sum_file(path: Path) -> FileSum:
    """Size and sum of what is in a file."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
        return FileSum(bytes=stream.tell(), sha256=digest.hexdigest())


def make_folders(path: Path, sync: Callable[[Path], None] = sync) -> None:
    """Make a folder and those above it that are missing, and have their names on the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    if missing:
        for folder in reversed(missing):
            sync(folder.parent)
        with suppress(OSError):  # the folder that was there may be as new, but the one above it may be closed to us
            sync(missing[-1].parent.parent)


def _blocks(chunks: Chunks, block_bytes: int) -> Iterator[memoryview]:
    """What comes, in blocks of one size but the last; each may be used until the one after the next is asked for."""
    block, other = (memoryview(mmap.mmap(-1, block_bytes)) for _ in range(2))
    filled = 0
    for chunk in chunks:
        rest = memoryview(chunk).cast("B")
        while rest:
            taken = min(len(rest), block_bytes - filled)
            _copy(block[filled : filled + taken], rest[:taken])
            filled, rest = filled + taken, rest[taken:]
            if filled == block_bytes:
                yield block
                block, other, filled = other, block, 0
    if filled:
        yield block[:filled]


def _copy(target: memoryview, source: memoryview) -> None:
    """As an assignment would, which keeps Python's lock, and long where pages must first come from a device."""
    if source.readonly:
        target[:] = source
    else:
        to, start = (ctypes.addressof(ctypes.c_char.from_buffer(x)) for x in (target, source))
        ctypes.memmove(to, start, len(source))


def _finish(under_way: list[Future[None]]) -> None:
    """Wait for the block under way; raise what it met."""
    wait(under_way)
    for future in under_way:
        future.result()
    under_way.clear()


def _write_all(descriptor: int, block: memoryview) -> None:
    while block:
        try:
            written = os.write(descriptor, block)
        except OSError as error:
            if error.errno != errno.EINVAL or not _goes_past_the_cache(descriptor):
                raise
            written = 0  # this file system wants it otherwise
        if written < len(block):
            _go_past_the_cache(descriptor, False)  # what is left is no whole block
        block = block[written:]


def _go_past_the_cache(descriptor: int, past: bool) -> None:
    """Write straight to the disk, where the system can: filling its cache with gigabytes that nobody reads costs the
    processor several times as much, and pushes out what others need."""
    if hasattr(fcntl, "F_NOCACHE"):  # macOS
        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, int(past))
    elif hasattr(os, "O_DIRECT") and past != _goes_past_the_cache(descriptor):
        with suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_DIRECT if past else 0)


def _goes_past_the_cache(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))
