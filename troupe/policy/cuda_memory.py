"""Reading arrays out of an NVIDIA card's own memory while the card is at work.

What the processor reads MLX moves, for good, to memory that card and host share, page by page, and a step beside that
takes longer. The card's copy engine reads arrays where they are. MLX has no way to ask it; CUDA's driver has, as plain
C functions, of which these few are called.
"""

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import mlx.core as mx

BLOCK_BYTES = 1 << 24
_FOR_ALL_CONTEXTS = 1
_BESIDE_THE_DEFAULT_STREAM = 1


def bytes_on_card(arrays: Iterable[mx.array]) -> Iterator[memoryview]:
    """The bytes of evaluated arrays, row by row and one array after the other, in blocks that die with the next.

    No array is moved. RuntimeError where the driver refuses, and after the last block where an array was moved
    meanwhile, because somebody else had the processor read it: what came is then not to be relied on.
    """
    whole = [mx.contiguous(array) for array in arrays if array.size]  # kept for as long as they are read
    if not whole:
        return
    addresses = _addresses(whole)
    engine = _idle_engine()
    try:
        parts = [(address, array.nbytes) for address, array in zip(addresses, whole, strict=True)]
        yield from (engine.read(block) for block in _blocks(parts))
    finally:
        _IDLE.append(engine)
    if _addresses(whole) != addresses:
        raise RuntimeError("an array was moved out of the card's memory while it was read; another try reads it there")


Part = tuple[int, int]
"""Address and number of bytes."""


def _blocks(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """The same bytes as parts of blocks, of which all but the last are full."""
    block: list[Part] = []
    room = BLOCK_BYTES
    for address, size in parts:
        while size:
            taken = min(size, room)
            block.append((address, taken))
            address, size, room = address + taken, size - taken, room - taken
            if not room:
                yield block
                block, room = [], BLOCK_BYTES
    if block:
        yield block


class _CopyEngine:
    """The first card's copy engine, and a block of host memory that it writes to."""

    def __init__(self, size: int) -> None:
        """Of `size` bytes, for as long as the process lives."""
        card, self._context = ctypes.c_int(), ctypes.c_void_p()
        self._stream, memory = ctypes.c_void_p(), ctypes.c_void_p()
        _call("cuInit", 0)
        _call("cuDeviceGet", ctypes.byref(card), 0)
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), card)  # MLX's own
        _call("cuCtxSetCurrent", self._context)
        _call("cuStreamCreate", ctypes.byref(self._stream), _BESIDE_THE_DEFAULT_STREAM)
        _call("cuMemHostAlloc", ctypes.byref(memory), ctypes.c_size_t(size), _FOR_ALL_CONTEXTS)
        self._start = int(memory.value or 0)
        self._block = memoryview((ctypes.c_ubyte * size).from_address(self._start)).cast("B")

    def read(self, parts: Sequence[Part]) -> memoryview:
        """Those bytes of the card, until it is asked again."""
        filled = 0
        _call("cuCtxSetCurrent", self._context)  # of this thread
        for address, size in parts:
            place = ctypes.c_void_p(self._start + filled)
            _call("cuMemcpyDtoHAsync_v2", place, ctypes.c_uint64(address), ctypes.c_size_t(size), self._stream)
            filled += size
        _call("cuStreamSynchronize", self._stream)
        return self._block[:filled]


_IDLE: list[_CopyEngine] = []
"""Those that nobody uses now. They are kept: the card stops for whoever has or frees memory that it writes to."""


def _idle_engine() -> _CopyEngine:
    try:
        return _IDLE.pop()
    except IndexError:
        return _CopyEngine(BLOCK_BYTES)


_MULTIPROCESSORS, _MOST_SHARED = 16, 97
"""The driver's numbers for these attributes of a card."""


def multiprocessors() -> int:
    """Of the first card. RuntimeError where the driver refuses."""
    return _attribute(_MULTIPROCESSORS)


def shared_memory_limit() -> int:
    """Bytes that the threads of a block may share on the first card. RuntimeError where the driver refuses."""
    return _attribute(_MOST_SHARED)


@cache
def _attribute(which: int) -> int:
    card, number = ctypes.c_int(), ctypes.c_int()
    _call("cuInit", 0)
    _call("cuDeviceGet", ctypes.byref(card), 0)
    _call("cuDeviceGetAttribute", ctypes.byref(number), which, card)
    return number.value


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the driver, without Python's lock."""
    code = getattr(_driver(), name)(*arguments)
    if code:
        raise RuntimeError(f"{name} of CUDA's driver failed with code {code}")


def _addresses(arrays: Sequence[mx.array]) -> list[int]:
    """Where the card has its contiguous arrays: its own answer, for MLX has none that moves nothing."""
    said = [_ask()(inputs=[array], **_ONE_NUMBER)[0] for array in arrays]
    addresses: Any = mx.concatenate(said).tolist()
    return list(addresses)


_ONE_NUMBER: dict[str, Any] = {
    "output_shapes": [(1,)],
    "output_dtypes": [mx.uint64],
    "grid": (1, 1, 1),
    "threadgroup": (1, 1, 1),
}


@cache
def _ask() -> Any:
    return mx.fast.cuda_kernel(
        name="troupe_address",
        input_names=["data"],
        output_names=["at"],
        source="at[0] = reinterpret_cast<unsigned long long>(data);",
        ensure_row_contiguous=False,  # a copy would be gone by the time it is read
    )
