"""PartQueue: the parts that nobody has, in the order in which they are to be taken."""

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from typing import NamedTuple

from troupe.actors.generator.parts import Part

MOST_PASSED_OVER = 64
"""Parts of training that are taken before one of an evaluation has its turn, however many there are."""


class _Entry(NamedTuple):
    is_new: bool
    step: int
    order: int
    name: str


class PartQueue:
    """Parts of training go before those of evaluations, which wait for no more than `MOST_PASSED_OVER` of them. Of
    either the oldest step is first, and before it those that came back."""

    def __init__(self, is_there: Callable[[str], bool]) -> None:
        """`is_there`: whether a part is still to be taken: some are done, or taken up again, while they wait here."""
        self._is_there = is_there
        self._training: list[_Entry] = []
        self._rows: list[_Entry] = []
        self._order = count()
        self._passed_over = 0

    def add(self, part: Part, *, is_new: bool) -> None:
        """One more; `is_new`: nobody had it before."""
        entries = self._training if part.set is None else self._rows
        heappush(entries, _Entry(is_new, part.step, next(self._order), part.name))

    def pop(self, *, rows: bool) -> str | None:
        """The next one; None where there is none. `rows`: whether it may be one of an evaluation."""
        for entries in (self._training, self._rows):
            while entries and not self._is_there(entries[0].name):
                heappop(entries)
        if rows and self._rows and (not self._training or self._passed_over >= MOST_PASSED_OVER):
            self._passed_over = 0
            return heappop(self._rows).name
        if not self._training:
            return None
        self._passed_over += bool(self._rows)
        return heappop(self._training).name
