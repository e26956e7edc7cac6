"""Settings that a whole process has one of, and that several runs in it may want to hold at once. Quick to
import."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class ProcessWide(Generic[T]):
    """One setting. Who came last has it; whoever leaves, in any order and from any thread, gives it back to the newest
    of those who are still there, and the last of all to what it was before the first."""

    def __init__(self, swap: Callable[[T], T]) -> None:
        """`swap` sets a value and returns the one that was there."""
        self._swap = swap
        self._lock = threading.Lock()
        self._before: T
        self._held: list[list[T]] = []

    @contextmanager
    def at(self, value: T) -> Iterator[None]:
        """Hold it at a value in the body."""
        mine = [value]
        with self._lock:
            before = self._swap(value)
            if not self._held:
                self._before = before
            self._held.append(mine)
        try:
            yield
        finally:
            with self._lock:
                self._held = [held for held in self._held if held is not mine]
                self._swap(self._held[-1][0] if self._held else self._before)
