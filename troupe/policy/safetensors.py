"""The safetensors format: what the header of a file says, and a file made of arrays, chunk by chunk.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name → type, shape and place of a tensor)
and the bytes of all tensors, without gaps.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import mlx.core as mx
import msgspec

from troupe.errors import ModelError
from troupe.policy.cuda_memory import bytes_on_card
from troupe.policy.decode import cuda_kernels

_WRITTEN = {
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
_BITS = {name: 8 * dtype.size for dtype, name in _WRITTEN.items()} | {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F64": 64,
    "C64": 64,
}
"""Of a number of each type that the format has."""
_LENGTH_BYTES = 8
_ALIGNMENT = 8
_LONGEST_HEADER = 100_000_000
"""Bytes; what the format allows."""
_LFS_POINTER = b"version https://git-lfs"

_Count = Annotated[int, msgspec.Meta(ge=0)]


class StoredTensor(msgspec.Struct, frozen=True):
    """What a header says of a tensor."""

    dtype: str
    shape: tuple[_Count, ...]
    data_offsets: tuple[_Count, _Count]
    """Its bytes, counted from the end of the header."""

    @property
    def bytes_each(self) -> int:
        """Of one of its numbers, where that is whole bytes."""
        return _BITS[self.dtype] // 8


def read_header(file: Path) -> list[tuple[str, StoredTensor]]:
    """The tensors of a file by name, in the order of the header, where one may stand twice; their data are not read.

    Raises ModelError where the file is truncated, damaged or of another format, OSError where it cannot be read.
    """
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        start = read_start(stream)
    try:
        return _parse(start, size)
    except (ValueError, msgspec.ValidationError, RecursionError) as error:
        if start.startswith(_LFS_POINTER):
            raise ModelError(f"{file}: a pointer of Git LFS, not the file itself; fetch it with git lfs pull") from None
        raise ModelError(f"{file}: truncated, damaged or no safetensors file ({error}); copy it again") from None


def read_start(stream: BinaryIO) -> bytes:
    """The length of the header and the header, as far as there are so many bytes."""
    length = stream.read(_LENGTH_BYTES)
    return length + stream.read(min(int.from_bytes(length, "little"), _LONGEST_HEADER))


def safetensors_bytes(arrays: Mapping[str, mx.array]) -> int:
    """Size of the file, or a little more."""
    return sum(array.nbytes + 128 + 2 * len(name) for name, array in arrays.items()) + 128


def safetensors_chunks(
    arrays: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """A file of evaluated arrays, chunk by chunk; the chunks are the arrays' own memory where the processor shares it
    with the device, and die with the next chunk where not. Tensors lie in the order of their names, so that equal
    arrays are equal files, in whatever order they came."""
    arrays = dict(sorted(arrays.items()))
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        header[name] = StoredTensor(_WRITTEN[array.dtype], array.shape, (start, end))
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % _ALIGNMENT)
    yield len(text).to_bytes(_LENGTH_BYTES, "little") + text
    if cuda_kernels.are_available():  # the card has a memory of its own
        yield from bytes_on_card(arrays.values())
    else:
        yield from (bytes_of(array) for array in arrays.values() if array.size)


def bytes_of(array: mx.array) -> memoryview:
    """The bytes of an array in the processor's memory, row by row."""
    if array.dtype in (mx.bfloat16, mx.bool_):  # Python's buffers have no such type
        array = array.view(mx.uint16 if array.dtype == mx.bfloat16 else mx.uint8)
    buffer: Any = array  # its type stub does not say so
    memory = memoryview(buffer)
    if not memory.c_contiguous:
        buffer = mx.contiguous(array)
        memory = memoryview(buffer)
    return memory.cast("B")


def _parse(start: bytes, size: int) -> list[tuple[str, StoredTensor]]:
    """The tensors of a file of `size` bytes, from what `read_start` gave. Raises what tells that it is unsound."""
    length, text = int.from_bytes(start[:_LENGTH_BYTES], "little"), start[_LENGTH_BYTES:]
    if len(start) < _LENGTH_BYTES or length > len(text):
        raise ValueError(f"a header of {length} bytes is not in a file of {size}")
    tensors = []
    for name, entry in _pairs(text):
        if name == "__metadata__":
            msgspec.convert(entry, dict[str, str] | None)  # MLX writes null for none
        else:
            tensors.append((name, msgspec.convert(entry, StoredTensor)))
    end = 0
    for name, tensor in sorted(dict(tensors).items(), key=lambda pair: pair[1].data_offsets):
        begin, stop = tensor.data_offsets
        if tensor.dtype not in _BITS:
            raise ValueError(f"{name}: dtype {tensor.dtype} is not known")
        if begin != end or 8 * (stop - begin) != _BITS[tensor.dtype] * math.prod(tensor.shape):
            raise ValueError(f"{name}: bytes {begin} to {stop} are not where it lies")
        end = stop
    if len(start) + end != size:
        raise ValueError(f"its header tells of {len(start) + end} bytes, there are {size}")
    return tensors


def _pairs(text: bytes) -> list[tuple[str, Any]]:
    """The members of a JSON object, a name as often as it stands there."""
    members: list[tuple[str, Any]] = []

    def note(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members[:] = pairs  # the outermost object is closed last
        return dict(pairs)

    if not isinstance(json.loads(text, object_pairs_hook=note), dict):
        raise ValueError("its header is no JSON object")  # noqa: TRY004 - it is a value of the file
    return members
