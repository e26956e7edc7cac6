"""Reading arrays from an NVIDIA card: the card itself where MLX has one, else a driver that acts it."""

# ruff: noqa: N802 (CUDA's names)

from __future__ import annotations

import ctypes
import errno
import hashlib
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tests.checkpoint.checkpoints import ARRAYS, assert_same_arrays, made
from troupe.checkpoint import files, load_checkpoint, save_checkpoint
from troupe.checkpoint.files import FileSum, write_file
from troupe.policy import cuda_memory
from troupe.policy.cuda_memory import bytes_on_card
from troupe.policy.decode import cuda_kernels
from troupe.policy.safetensors import bytes_of, safetensors_chunks

with_a_card = pytest.mark.skipif(not cuda_kernels.are_available(), reason="MLX has no NVIDIA card here")
without_a_card = pytest.mark.skipif(cuda_kernels.are_available(), reason="the driver is acted where there is none")


class ActedDriver:
    """Answers as CUDA's driver does, for arrays in the processor's memory. Copies are made when they are waited for."""

    def __init__(self) -> None:
        self.refused: str = ""
        self.held: list[Any] = []
        self.copies: list[tuple[int, int, int]] = []
        self.copied: list[int] = []
        self.calls: list[str] = []
        self.current = threading.local()
        """Whether a thread has the context."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == self.refused:
                return 2
            getattr(self, f"do_{name}")(*arguments)
            return 0

        return call

    def do_cuInit(self, flags: int) -> None:
        assert flags == 0

    def do_cuDeviceGet(self, card: Any, place: int) -> None:
        assert place == 0

    def do_cuDevicePrimaryCtxRetain(self, context: Any, card: Any) -> None:
        context._obj.value = 77

    def do_cuCtxSetCurrent(self, context: Any) -> None:
        assert context.value == 77
        self.current.here = True

    def do_cuStreamCreate(self, stream: Any, flags: int) -> None:
        assert flags == 1, "it does not wait for the default stream"
        assert self.current.here
        stream._obj.value = 5

    def do_cuMemHostAlloc(self, place: Any, size: Any, flags: int) -> None:
        assert flags == 1, "for the threads of all contexts"
        assert self.current.here
        self.held.append(ctypes.create_string_buffer(size.value))
        place._obj.value = ctypes.addressof(self.held[-1])

    def do_cuMemcpyDtoHAsync_v2(self, place: Any, address: Any, size: Any, stream: Any) -> None:
        assert (stream.value, self.current.here) == (5, True)
        self.copies.append((place.value, address.value, size.value))

    def do_cuStreamSynchronize(self, stream: Any) -> None:
        for copy in self.copies:
            ctypes.memmove(*copy)
        self.copied.append(sum(size for *_, size in self.copies))
        self.copies.clear()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> ActedDriver:
    acted = ActedDriver()

    def addresses(arrays: Sequence[mx.array]) -> list[int]:
        mx.eval(list(arrays))
        return [ctypes.addressof(ctypes.c_char.from_buffer(bytes_of(array))) for array in arrays]

    monkeypatch.setattr(cuda_memory, "_IDLE", [])
    monkeypatch.setattr(cuda_memory, "_driver", lambda: acted)
    monkeypatch.setattr(cuda_memory, "_addresses", addresses)
    return acted


@without_a_card
@pytest.mark.parametrize("block", [1, 8, 13, 1 << 24])
def test_the_same_bytes_come_in_full_blocks(driver: ActedDriver, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    plain = b"".join(map(bytes, safetensors_chunks(ARRAYS)))
    monkeypatch.setattr(cuda_memory, "BLOCK_BYTES", block)
    monkeypatch.setattr(cuda_kernels, "are_available", lambda: True)
    assert b"".join(map(bytes, safetensors_chunks(ARRAYS))) == plain
    size = sum(array.nbytes for array in ARRAYS.values())
    assert driver.copied == [block] * (size // block) + [size % block] * (size % block > 0)


@without_a_card
def test_where_nothing_is_to_be_read_the_driver_is_not_asked(driver: ActedDriver) -> None:
    assert list(bytes_on_card([mx.zeros((0, 3))])) == []
    assert driver.calls == []


@without_a_card
def test_memory_that_the_engine_writes_to_is_had_once(driver: ActedDriver) -> None:
    array = mx.arange(9, dtype=mx.float32)
    pieces: Any = bytes_on_card([array])
    first, second = bytes(next(pieces)), b"".join(map(bytes, bytes_on_card([array])))
    assert first == second == bytes(bytes_of(array))
    assert len(driver.held) == 2, "the first was still at it"
    pieces.close()
    for _ in range(5):
        assert b"".join(map(bytes, bytes_on_card([array]))) == first
    assert len(driver.held) == 2


@without_a_card
def test_every_thread_reads_in_the_context_of_the_card(driver: ActedDriver) -> None:
    arrays = [mx.arange(9, dtype=mx.float32)]
    mx.eval(arrays)
    plain = bytes(bytes_of(arrays[0]))

    def read() -> bytes:
        return b"".join(map(bytes, bytes_on_card(arrays)))

    with ThreadPoolExecutor(1) as pool:
        assert read() == pool.submit(read).result() == plain
    assert len(driver.held) == 1, "both used the same engine"


@without_a_card
def test_an_array_that_was_moved_while_it_was_read_is_no_success(
    driver: ActedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = [mx.arange(9, dtype=mx.float32), mx.ones(3)]
    twin = mx.arange(9, dtype=mx.float32) + 0
    places = iter([arrays, [twin, arrays[1]], arrays, arrays])
    addresses = cuda_memory._addresses
    monkeypatch.setattr(cuda_memory, "_addresses", lambda asked: addresses(next(places)))
    with pytest.raises(RuntimeError, match="moved out of the card's memory"):
        list(bytes_on_card(arrays))
    assert sum(map(len, bytes_on_card(arrays))) == 48


@without_a_card
def test_a_checkpoint_with_an_array_that_was_moved_is_not_there(
    tmp_path: Path, driver: ActedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses = cuda_memory._addresses
    moved = itertools.count()

    def wander(asked: Sequence[mx.array]) -> list[int]:
        return [place + (next(moved) == len(asked)) for place in addresses(asked)]

    monkeypatch.setattr(cuda_memory, "_addresses", wander)
    monkeypatch.setattr(cuda_kernels, "are_available", lambda: True)
    with pytest.raises(OSError, match="moved out of the card's memory"):
        save_checkpoint(tmp_path / "step-00000001", made(1))
    assert list(tmp_path.iterdir()) == []
    save_checkpoint(tmp_path / "step-00000001", made(1))
    assert_same_arrays(load_checkpoint(tmp_path / "step-00000001").weights, made(1).weights)


@without_a_card
def test_a_disk_that_is_full_does_not_keep_the_engine(
    tmp_path: Path, driver: ActedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write

    def full(descriptor: int, block: memoryview) -> int:
        if os.fstat(descriptor).st_size >= 200:  # past the header
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, block)

    monkeypatch.setattr(cuda_kernels, "are_available", lambda: True)
    monkeypatch.setattr(cuda_memory, "BLOCK_BYTES", 8)
    monkeypatch.setattr(files, "BLOCK_BYTES", 8)
    faults = []
    with monkeypatch.context() as on_the_disk:
        on_the_disk.setattr(os, "write", full)
        for n in range(3):
            with pytest.raises(OSError, match="No space") as fault:
                write_file(tmp_path / f"{n}", safetensors_chunks({"a": mx.arange(99)}))
            faults.append(fault)  # and with it the frames that it went through
    assert len(driver.held) == 1


@without_a_card
@pytest.mark.parametrize(
    "function",
    [
        *("cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuStreamCreate", "cuMemHostAlloc"),
        *("cuMemcpyDtoHAsync_v2", "cuStreamSynchronize"),
    ],
)
def test_what_the_driver_refuses_is_named_and_the_next_try_succeeds(driver: ActedDriver, function: str) -> None:
    array = mx.arange(9, dtype=mx.float32)
    driver.refused = function
    with pytest.raises(RuntimeError, match=f"{function} of CUDA's driver failed with code 2"):
        list(bytes_on_card([array]))
    driver.refused = ""
    assert b"".join(map(bytes, bytes_on_card([array]))) == bytes(bytes_of(array))
    assert len(driver.held) == 1


@with_a_card
def test_a_card_gives_the_same_bytes_and_keeps_its_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {name: array + mx.zeros((), array.dtype) for name, array in ARRAYS.items()}
    arrays |= {"part": mx.repeat(arrays["f32"], 3, axis=0)[1:4], "as it came": ARRAYS["bf16"]}
    mx.eval(list(arrays.values()))
    contiguous = [mx.contiguous(array) for array in arrays.values() if array.size]
    before = cuda_memory._addresses(contiguous)
    got = b"".join(map(bytes, safetensors_chunks(arrays)))
    assert cuda_memory._addresses(contiguous) == before
    monkeypatch.setattr(cuda_kernels, "are_available", lambda: False)
    assert got == b"".join(map(bytes, safetensors_chunks(arrays)))


@with_a_card
def test_a_card_is_read_beside_its_work(tmp_path: Path) -> None:
    snapshot = [mx.random.normal((1024, 1024 + n), key=mx.random.key(n)) for n in range(20)]
    mx.eval(snapshot)
    sums = [float(array.sum().item()) for array in snapshot]  # type: ignore[arg-type]
    work = mx.random.normal((4096, 4096), key=mx.random.key(100))
    ends = threading.Event()

    def write() -> FileSum:
        mx.set_default_stream(mx.new_stream(mx.gpu))
        chunks = safetensors_chunks({str(n): array for n, array in enumerate(snapshot)})
        try:
            return write_file(tmp_path / "a.safetensors", chunks)
        finally:
            mx.clear_streams()
            ends.set()

    with ThreadPoolExecutor(1) as pool:
        written, rounds = pool.submit(write), 0
        while not ends.is_set():
            work = (work @ work) * 1e-4
            mx.eval(work, [array + 1 for array in snapshot])
            rounds += 1
        entry = written.result()
    assert rounds > 0
    assert entry.sha256 == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    loaded: Any = mx.load(str(tmp_path / "a.safetensors"))
    assert all(mx.array_equal(loaded[str(n)], array) for n, array in enumerate(snapshot))
    assert [float(array.sum().item()) for array in snapshot] == sums  # type: ignore[arg-type]


def test_parts_of_blocks_are_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_memory, "BLOCK_BYTES", 10)

    def blocks(*parts: tuple[int, int]) -> Iterator[list[tuple[int, int]]]:
        return cuda_memory._blocks(parts)

    assert list(blocks((100, 4), (200, 6), (300, 25), (400, 1))) == [
        [(100, 4), (200, 6)],
        [(300, 10)],
        [(310, 10)],
        [(320, 5), (400, 1)],
    ]
    assert list(blocks()) == []
