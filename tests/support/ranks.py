"""Ranks that are threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import mlx.core as mx

from troupe.grpo.ranks import Ranks

T = TypeVar("T")


class Meeting:
    """Where they give each other arrays."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=20)
        self.given: list[list[mx.array]] = [[] for _ in range(size)]
        self.gathered = 0
        """Numbers that rank 0 has given."""


class ThreadRanks:
    """One of them."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank, self.size = meeting, rank, meeting.barrier.parties

    def gather(self, arrays: Sequence[mx.array]) -> list[list[mx.array]]:
        """As `Ranks`; AssertionError where the ranks do not give alike."""
        mx.eval(list(arrays))
        self.meeting.given[self.rank] = list(arrays)
        self.meeting.barrier.wait()
        found = [list(given) for given in self.meeting.given]
        if self.rank == 0:
            self.meeting.gathered += sum(array.size for array in arrays)
        self.meeting.barrier.wait()
        shapes = [[(array.shape, array.dtype) for array in given] for given in found]
        assert all(each == shapes[0] for each in shapes), shapes
        return found


def with_ranks(size: int, work: Callable[[Ranks], T]) -> list[T]:
    """What each of so many ranks comes to, all at once."""
    meeting = Meeting(size)

    def one(rank: int) -> T:
        mx.set_default_stream(mx.new_stream(mx.default_device()))
        try:
            return work(ThreadRanks(meeting, rank))
        except BaseException:
            meeting.barrier.abort()
            raise
        finally:
            mx.clear_streams()

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(one, rank) for rank in range(size)]
        faults = [error for future in futures if (error := future.exception()) is not None]
        for fault in sorted(faults, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise fault
        return [future.result() for future in futures]
