"""Watchdog: says when nothing has moved for too long, and again each time that much has passed. It never interferes.

What counts as movement, and what is told, is its owner's to say.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

import anyio


class Watchdog:
    """The rule: pure, for a clock that the caller reads. Times are seconds on one clock."""

    def __init__(self, limit_s: float) -> None:
        if limit_s <= 0:
            raise ValueError(f"a watchdog that waits {limit_s:g} s would never be silent; give more than 0")
        self.limit_s = limit_s
        self._told_s = -math.inf

    def due_s(self, moved_s: float) -> float:
        """When to speak next, if nothing moves after `moved_s`."""
        return max(moved_s, self._told_s) + self.limit_s

    def speaks(self, now_s: float, moved_s: float) -> bool:
        """Whether it is time to speak now; what is told counts from here."""
        if now_s < self.due_s(moved_s):
            return False
        self._told_s = now_s
        return True


async def watch(
    limit_s: float,
    moved_s: Callable[[], float],
    tell: Callable[[float], None],
    *,
    clock: Callable[[], float],
    sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
) -> None:
    """Call `tell(seconds without movement)` whenever a watchdog of `limit_s` would speak, until cancelled.

    `moved_s` says when something moved last, on `clock`.
    """
    dog = Watchdog(limit_s)
    while True:
        await sleep(max(dog.due_s(moved_s()) - clock(), 0.0))
        now_s, last_s = clock(), moved_s()
        if dog.speaks(now_s, last_s):
            tell(now_s - last_s)
