"""Remembered: what is known of groups, for as long as they are open and a while longer."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Remembered(Generic[T]):
    """Gid → what is known of it. Of groups that are not open any more the newest `most` or so are remembered.

    Evaluations complete thousands of groups while one of training is open, so that being old is no reason to forget.
    """

    def __init__(self, most: int, is_open: Callable[[int], bool]) -> None:
        self._most, self._is_open = most, is_open
        self._known: OrderedDict[int, T] = OrderedDict()

    def __contains__(self, gid: int) -> bool:
        return gid in self._known

    def __getitem__(self, gid: int) -> T:
        return self._known[gid]

    def get(self, gid: int) -> T | None:
        """None where nothing is known."""
        return self._known.get(gid)

    def add(self, gid: int, known: T) -> None:
        """It is the newest from now on, in the place of what was known."""
        self._known[gid] = known
        self._known.move_to_end(gid)
        for _ in range(len(self._known) - self._most):
            old, kept = self._known.popitem(last=False)
            if self._is_open(old):
                self._known[old] = kept

    def forget(self, gid: int) -> None:
        """Nothing is known any more."""
        self._known.pop(gid, None)
