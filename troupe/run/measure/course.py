"""The course of measurements: one after the other, each within its share of the time; what fails is told of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

import anyio
import mlx.core as mx
import msgspec

from troupe.errors import TroupeError
from troupe.policy import Policy, is_on_cpu, random_policy
from troupe.run.measure.child import Begin, Beside
from troupe.run.measure.figures import LONGEST_S, Figures, Overlap
from troupe.run.measure.work import LEARN_ROWS, Decoding, Learning, Size, copier, digest
from troupe.runtime import linux_cpu
from troupe.runtime.device import DeviceThread
from troupe.runtime.frames import FrameError, MessageError
from troupe.runtime.process import ChildEnded

ROWS = (1, 8, 32, 64)
_OVERLAP_ROWS = 32
_TIMES = 4
_DECODE_SHARE, _LEARN_SHARE, _COPY_SHARE, _OVERLAP_SHARE = 0.07, 0.12, 0.01, 0.2
"""Of the whole time, for each measurement of the kind."""
_FAULTS = (RuntimeError, ValueError, MemoryError, OSError, TroupeError, ChildEnded, FrameError, MessageError)
"""What a measurement may fail by on a machine that lacks memory or a kernel: the others are made all the same."""

Tell = Callable[[str], None]


class OutOfTimeError(RuntimeError):
    """What is left of the time does not suffice."""


class Course:
    """All measurements of one size on this machine."""

    def __init__(
        self,
        size: Size,
        *,
        longest_s: float = LONGEST_S,
        tell: Tell = lambda line: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`tell` is given a line on what is measured next; `clock` counts seconds."""
        self._size, self._tell, self._clock = size, tell, clock
        self._longest_s, self._begun_s = longest_s, clock()
        self._lacking: list[str] = []
        self._seconds: dict[int, float] = {}
        """Rows → of a round."""
        self._learn_s: float | None = None

    async def run(self) -> Figures:
        """Measure all; takes about `longest_s` at the most."""
        size = self._size
        async with DeviceThread("decoder") as decoder, DeviceThread("learner") as learner:
            policy = await decoder.run(partial(random_policy, size.policy, dtype=size.dtype), plain=True)
            copy_s = await self._tried("copies", self._copies(decoder))
            for rows in ROWS:
                what = f"decoding of {rows} row{'s' if rows > 1 else ''}"
                await self._tried(what, self._decoding(decoder, policy, rows))
            await self._tried("the learner", self._learning(learner, policy))
            same_decode = await self._tried("decoding twice", self._decoding_twice(decoder, policy))
            same_learner = await self._tried("learning twice", self._learning_twice(learner, policy))
            overlap = await self._overlap(decoder, learner, policy)
        tokens = LEARN_ROWS * size.learn_tokens
        return Figures(
            model=size.name,
            parameters=size.parameters,
            dtype=size.dtype,
            prompt_tokens=size.prompt_tokens,
            new_tokens=size.new_tokens,
            decode={rows: round(rows * size.new_tokens / took, 1) for rows, took in self._seconds.items()},
            learner=None if self._learn_s is None else round(tokens / self._learn_s, 1),
            overlap=overlap,
            copy_gb_per_s=None if copy_s is None else round(2 * size.copy_bytes / copy_s / 1e9, 1),
            same_decode=same_decode,
            same_learner=same_learner,
            lacking=tuple(self._lacking),
        )

    async def _tried(self, what: str, measuring: Awaitable[Any]) -> Any:
        """What a measurement comes to; None where it fails, which is told of."""
        self._tell(what)
        try:
            return await measuring
        except (*_FAULTS, ExceptionGroup) as error:
            cause: BaseException = error
            while isinstance(cause, ExceptionGroup):
                cause = cause.exceptions[0]
            said = (str(cause).strip() or type(cause).__name__).splitlines()[0]
            self._lacking.append(f"{what}: {said}")
            return None

    async def _copies(self, device: DeviceThread) -> float:
        copy = await device.run(copier, self._size, plain=True)
        return await self._timed(device, copy, _COPY_SHARE)

    async def _decoding(self, device: DeviceThread, policy: Policy, rows: int) -> None:
        self._check_time(2 * max(self._seconds.values(), default=0.0))
        decoding = await device.run(Decoding, self._size, policy, rows, plain=True)
        self._seconds[rows] = await self._timed(device, decoding.round, _DECODE_SHARE)

    async def _learning(self, device: DeviceThread, policy: Policy) -> None:
        self._check_time(0.0)
        learning = await device.run(Learning, self._size, policy.weights, plain=True)
        self._learn_s = await self._timed(device, learning.step, _LEARN_SHARE)

    async def _decoding_twice(self, device: DeviceThread, policy: Policy) -> bool:
        self._check_time(2 * max(self._seconds.values(), default=0.0))
        decoding = await device.run(Decoding, self._size, policy, _OVERLAP_ROWS, plain=True)
        first, second = [await device.run(decoding.round, plain=True) for _ in range(2)]
        return bool(first == second)

    async def _learning_twice(self, device: DeviceThread, policy: Policy) -> bool:
        self._check_time(2 * (self._learn_s or 0.0))

        def once() -> str:
            return digest(Learning(self._size, policy.weights).step())

        first, second = [await device.run(once, plain=True) for _ in range(2)]
        return first == second

    async def _overlap(self, decoder: DeviceThread, learner: DeviceThread, policy: Policy) -> Overlap:
        if self._learn_s is None or (decode_s := self._seconds.get(_OVERLAP_ROWS)) is None:
            self._lacking.append("overlap: decoding or learning could not be measured")
            return Overlap()
        size = msgspec.structs.replace(self._size, learn_tokens=self._size.overlap_tokens)
        learn_s = self._learn_s * size.learn_tokens / self._size.learn_tokens
        # as much of either as makes both sides about as long
        rounds, steps = max(1, round(learn_s / decode_s)), max(1, round(decode_s / learn_s))
        pair = _Pair(size, policy, decoder, learner, rounds, steps)
        expected_s = rounds * decode_s + steps * learn_s
        threads = await self._tried("overlap of two threads", self._threads(pair, expected_s))
        processes = await self._tried("overlap of two processes", self._processes(pair, expected_s))
        return Overlap(threads=threads, processes=processes)

    async def _threads(self, pair: _Pair, expected_s: float) -> float:
        self._check_time(3 * expected_s)
        await pair.prepare()
        return await self._compared(pair, pair.decode, expected_s)

    async def _processes(self, pair: _Pair, expected_s: float) -> float:
        self._check_time(3 * expected_s)
        on_cpu, cores = is_on_cpu(), linux_cpu.blas_threads()
        threads = max(1, cores // 2) if on_cpu and cores else None  # as a run shares them out
        await pair.prepare()
        mx.clear_cache()  # of which the other process may need the memory
        begin = Begin(size=self._size, rows=_OVERLAP_ROWS, on_cpu=on_cpu, blas_threads=threads)
        async with Beside.started(begin) as beside:
            await beside.decode(1)
            return await self._compared(pair, partial(beside.decode, pair.rounds), expected_s, threads)

    async def _compared(
        self,
        pair: _Pair,
        decode: Callable[[], Coroutine[Any, Any, None]],
        expected_s: float,
        threads: int | None = None,
    ) -> float:
        """Seconds of both in turns, in this process, over those of both at once, medians of a few times. `threads`: of
        OpenBLAS, while both are at work."""
        in_turns: list[float] = []
        at_once: list[float] = []
        until_s = self._clock() + _OVERLAP_SHARE * self._longest_s
        while not at_once or (len(at_once) < _TIMES - 1 and self._clock() + 2 * expected_s < until_s):
            start_s = self._clock()
            await pair.decode()
            await pair.learn()
            in_turns.append(self._clock() - start_s)
            with linux_cpu.blas_limited(threads):
                start_s = self._clock()
                async with anyio.create_task_group() as both:
                    both.start_soon(decode)
                    both.start_soon(pair.learn)
                at_once.append(self._clock() - start_s)
        return round(statistics.median(in_turns) / statistics.median(at_once), 2)

    async def _timed(self, device: DeviceThread, work: Callable[[], Any], share: float) -> float:
        """Median seconds of some times within a share of the time; the first, which compiles, counts only alone."""

        def once() -> float:
            start_s = self._clock()
            work()
            mx.synchronize()
            return self._clock() - start_s

        seconds: list[float] = []
        until_s = self._clock() + share * self._longest_s
        while not seconds or (len(seconds) < _TIMES and self._clock() + seconds[-1] < until_s):
            seconds.append(await device.run(once, plain=True))
        return statistics.median(seconds[1:] or seconds)

    def _check_time(self, expected_s: float) -> None:
        left_s = self._begun_s + self._longest_s - self._clock()
        if left_s <= expected_s:
            raise OutOfTimeError(f"it would take longer than what is left of {self._longest_s:g} s")


class _Pair(msgspec.Struct):
    """Decoding and learning of the same policy, which are to go on beside each other."""

    size: Size
    policy: Policy
    decoder: DeviceThread
    learner: DeviceThread
    rounds: int
    steps: int
    decoding: Decoding | None = None
    learning: Learning | None = None

    async def prepare(self) -> None:
        """Make both, each on its thread. Safe to call twice."""
        if self.learning is not None:
            return
        self.decoding = await self.decoder.run(Decoding, self.size, self.policy, _OVERLAP_ROWS, plain=True)
        self.learning = await self.learner.run(Learning, self.size, self.policy.weights, plain=True)

    async def decode(self) -> None:
        """All rounds."""
        assert self.decoding is not None
        for number in range(self.rounds):
            await self.decoder.run(self.decoding.round, number, on_cancel=self.decoding.engine.abort, plain=True)

    async def learn(self) -> None:
        """All steps."""
        assert self.learning is not None
        for _ in range(self.steps):
            await self.learner.run(self.learning.step, plain=True)
