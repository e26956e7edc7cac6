"""What has changed between two policy versions, without loss: XOR of their numbers, byte by byte of each, deflated.

An update moves few bits of most numbers, so the high bytes of the XOR are mostly zeros; side by side they deflate well.
Of a file in the safetensors format only the tensors' bytes differ: names, types and shapes are the base's.

The tensors follow each other in the order of their names, in pieces of at most `PIECE_BYTES`; a piece is one plane for
each byte of a number, and a plane is its length (4 bytes, little-endian) and its bytes: none where all are zeros, with
the highest bit of the length set where deflating would not shorten it.
"""

import os
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx

from troupe.policy import Weights
from troupe.policy.safetensors import bytes_of, read_header
from troupe.runtime.frames import MessageError

PIECE_BYTES = 4 * 1024 * 1024
_LEVEL = 1
_LENGTH_BYTES = 4
_AS_IT_IS = 1 << 31
_THREADS = 4
_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


def are_alike(base: Weights, weights: Weights) -> bool:
    """Whether one can be told as a change of the other: the same names, shapes and types."""
    return base.keys() == weights.keys() and all(
        array.shape == base[name].shape and array.dtype == base[name].dtype for name, array in weights.items()
    )


def deltas(base: Weights, weights: Weights) -> Iterator[bytes]:
    """What makes `weights` of `base`, piece by piece. Computed on the default stream, deflated in threads."""
    threads = min(_THREADS, os.cpu_count() or 1)
    waiting: deque[list[Future[bytes]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="troupe-deflate") as pool:
        for planes in _planes(base, weights):
            waiting.append([pool.submit(_deflated, plane) for plane in planes])
            if len(waiting) > threads:
                yield b"".join(plane.result() for plane in waiting.popleft())
        for piece in waiting:
            yield b"".join(plane.result() for plane in piece)


def applied(base: Path, delta: BinaryIO) -> Iterator[bytes]:
    """The bytes of the file that a base's file and what `deltas` gave make. MessageError where it is no such thing."""
    tensors = sorted(read_header(base), key=lambda pair: pair[1].data_offsets)
    with base.open("rb") as file:
        start = os.fstat(file.fileno()).st_size - max((tensor.data_offsets[1] for _, tensor in tensors), default=0)
        yield file.read(start)
        for _, tensor in tensors:
            begin, end = tensor.data_offsets
            size = tensor.bytes_each
            for begun in range(begin, end, PIECE_BYTES):
                piece = file.read(min(PIECE_BYTES, end - begun))
                yield _changed(piece, [_inflated(delta, len(piece) // size) for _ in range(size)])
    if delta.read(1):
        raise MessageError("a delta of weights is longer than its base")


def _planes(base: Weights, weights: Weights) -> Iterator[list[bytes]]:
    for name in sorted(weights):
        size = weights[name].dtype.size
        kind = _UNSIGNED[size]
        old, new = (arrays[name].reshape(-1).view(kind) for arrays in (base, weights))
        step = PIECE_BYTES // size
        for begin in range(0, new.size, step):
            changed = mx.bitwise_xor(old[begin : begin + step], new[begin : begin + step])
            planes = mx.contiguous(changed.view(mx.uint8).reshape(-1, size).T)
            mx.eval(planes)
            data = bytes_of(planes)
            count = planes.shape[1]
            yield [bytes(data[i * count : (i + 1) * count]) for i in range(size)]


def _deflated(plane: bytes) -> bytes:
    if not any(plane) if len(plane) < _LENGTH_BYTES else plane.count(0) == len(plane):
        return bytes(_LENGTH_BYTES)
    data = zlib.compress(plane, _LEVEL)
    if len(data) < len(plane):
        return len(data).to_bytes(_LENGTH_BYTES, "little") + data
    return (len(plane) | _AS_IT_IS).to_bytes(_LENGTH_BYTES, "little") + plane


def _inflated(delta: BinaryIO, count: int) -> bytes | None:
    """The next plane; None where all of it are zeros."""
    length = int.from_bytes(_exactly(delta, _LENGTH_BYTES), "little")
    if not length:
        return None
    if length & _AS_IT_IS:
        if length ^ _AS_IT_IS != count:
            raise MessageError(f"a delta of weights has {length ^ _AS_IT_IS} bytes where {count} belong")
        return _exactly(delta, count)
    if length > count:
        raise MessageError(f"a delta of weights has {length} bytes for {count}")
    inflate = zlib.decompressobj()
    try:
        plane = inflate.decompress(_exactly(delta, length), count)
    except zlib.error as error:
        raise MessageError(f"a delta of weights is damaged: {error}") from None
    if len(plane) != count or not inflate.eof:
        raise MessageError(f"a delta of weights does not come to {count} bytes")
    return plane


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise MessageError("a delta of weights ends too early")
    return data


def _changed(piece: bytes, planes: list[bytes | None]) -> bytes:
    if not any(planes):
        return piece
    size = len(planes)
    zeros = bytes(len(piece) // size)
    laid = _bytes_array(b"".join(plane or zeros for plane in planes)).reshape(size, -1)
    return bytes(bytes_of(mx.bitwise_xor(_bytes_array(piece), mx.contiguous(laid.T).reshape(-1))))


def _bytes_array(data: bytes) -> mx.array:
    buffer: Any = memoryview(data)  # its type stub knows no buffers
    return mx.array(buffer)
