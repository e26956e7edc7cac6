"""Files that are summed while they are written, and put on the disk for good before anybody relies on them.

Arrays go from their own memory by way of a block to the disk, past the system's cache where that can be. While one
block is summed and written, each in a thread of its own, the next is filled; for arrays all of it lets go of Python's
lock, so that other threads go on. Knows the safetensors format, and nothing of checkpoints.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import math
import mmap
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import mlx.core as mx
import msgspec

from troupe.policy.cuda_memory import bytes_on_card
from troupe.policy.decode import cuda_kernels

BLOCK_BYTES = 1 << 24
Chunks: TypeAlias = Iterable[bytes | memoryview]
"""The content of a file, in pieces."""
_ALIGNMENT = 8
_DTYPES = {
    mx.bool_: "BOOL",
    mx.uint8: "U8",
    mx.int8: "I8",
    mx.uint16: "U16",
    mx.int16: "I16",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.int32: "I32",
    mx.float32: "F32",
    mx.uint64: "U64",
    mx.int64: "I64",
}
_SIZES = {name: dtype.size for dtype, name in _DTYPES.items()}
"""Bytes of a number."""
_LENGTH_BYTES = 8
"""At the beginning of a safetensors file: how long its header is."""


class FileSum(msgspec.Struct, frozen=True, kw_only=True):
    """What a manifest says of a file."""

    bytes: int
    sha256: str


class _Entry(msgspec.Struct, frozen=True):
    """What the header of a safetensors file says of an array."""

    dtype: str
    shape: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    data_offsets: tuple[Annotated[int, msgspec.Meta(ge=0)], int]

    @property
    def is_sound(self) -> bool:
        """Whether it is of a type that we write, and takes the place that it should."""
        start, end = self.data_offsets
        return self.dtype in _SIZES and end - start == _SIZES[self.dtype] * math.prod(self.shape)


def write_file(path: Path, chunks: Chunks, before_block: Callable[[], None] = lambda: None) -> FileSum:
    """Write a file that was not there, and have it on the disk. OSError where that fails.

    `before_block` is called again and again meanwhile; what it raises ends the writing.
    """
    digest, size = hashlib.sha256(), 0
    under_way: list[Future[None]] = []
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with ThreadPoolExecutor(2) as pool:
            for block in _blocks(chunks):
                _finish(under_way)
                before_block()
                _go_past_the_cache(descriptor, len(block) == BLOCK_BYTES)
                under_way += pool.submit(digest.update, block), pool.submit(_write_all, descriptor, block)
                size += len(block)
            _finish(under_way)
        _flush(descriptor)
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


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _flush(descriptor)
    finally:
        os.close(descriptor)


def make_folders(path: Path) -> None:
    """Make a folder and those above it that are missing, and have their names on the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    if missing:
        for folder in reversed(missing):
            sync(folder.parent)
        with suppress(OSError):  # the folder that was there may be as new, but the one above it may be closed to us
            sync(missing[-1].parent.parent)


def safetensors_bytes(arrays: Mapping[str, mx.array]) -> int:
    """Size of the file, or a little more."""
    return sum(array.nbytes + 128 + 2 * len(name) for name, array in arrays.items()) + 128


def safetensors_chunks(arrays: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None) -> Chunks:
    """A safetensors file of evaluated arrays, piece by piece; the pieces are the arrays' own memory where the processor
    shares it with the device, and die with the next piece where not."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": _DTYPES[array.dtype], "shape": array.shape, "data_offsets": (start, end)}
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % _ALIGNMENT)
    yield len(text).to_bytes(_LENGTH_BYTES, "little") + text
    if cuda_kernels.are_here():  # the card has a memory of its own
        yield from bytes_on_card(arrays.values())
    else:
        yield from (_memory(array) for array in arrays.values() if array.size)


def has_sound_header(file: Path) -> bool:
    """Whether a file begins as a safetensors file whose arrays lie within it. OSError where it cannot be read."""
    with file.open("rb") as stored:
        size = os.fstat(stored.fileno()).st_size
        length = int.from_bytes(stored.read(_LENGTH_BYTES), "little")
        start = _LENGTH_BYTES + length
        text = stored.read(length) if start <= size else b""
    try:
        entries = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        entries.pop("__metadata__", None)
        arrays = [msgspec.json.decode(entry, type=_Entry) for entry in entries.values()]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return all(array.is_sound and start + array.data_offsets[1] <= size for array in arrays)


def _memory(array: mx.array) -> memoryview:
    """The bytes of an array, row by row."""
    if array.dtype in (mx.bfloat16, mx.bool_):  # Python's buffers have no such type
        array = array.view(mx.uint16 if array.dtype == mx.bfloat16 else mx.uint8)
    buffer: Any = array  # its type stub does not say so
    memory = memoryview(buffer)
    if not memory.c_contiguous:
        buffer = mx.contiguous(array)
        memory = memoryview(buffer)
    return memory.cast("B")


def _blocks(chunks: Chunks) -> Iterator[memoryview]:
    """What comes, in blocks of one size but the last; each may be used until the one after the next is asked for."""
    block, other = (memoryview(mmap.mmap(-1, BLOCK_BYTES)) for _ in range(2))
    filled = 0
    for chunk in chunks:
        rest = memoryview(chunk).cast("B")
        while rest:
            taken = min(len(rest), BLOCK_BYTES - filled)
            _copy(block[filled : filled + taken], rest[:taken])
            filled, rest = filled + taken, rest[taken:]
            if filled == BLOCK_BYTES:
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


def _flush(descriptor: int) -> None:
    full = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: its fsync leaves data in the drive's cache
    if full is not None:
        with suppress(OSError):  # a file system that has no such thing
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)
