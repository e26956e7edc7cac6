"""An asyncio event loop whose clock jumps: what would wait for an hour waits for no time at all.

When nothing is ready the clock is set to the next timer, so a drive with seconds of delay takes milliseconds, and the
same program takes the same turns every time. Where there is no timer either, nobody can ever wake up again: that is a
deadlock, and `StuckError` says where every task waits. Knows nothing of actors but that they have a `name`.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import anyio

T = TypeVar("T")

HORIZON_S = 1e5
"""Virtual seconds after which a drive that only waits for timers (of a watchdog, say) counts as stuck."""
TURNS = 1_000_000
"""Turns of the loop in which the clock may stand still."""
PATIENCE_S = 20.0
"""Real seconds to wait for a thread that works for the loop."""


class StuckError(AssertionError):
    """Nothing can go on. The text has a line for every task: who, and the place in the code where it waits."""


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Its `time()` starts at 0 and moves only when everybody waits."""

    def __init__(self, horizon_s: float = HORIZON_S) -> None:
        self.now_s = 0.0
        self.horizon_s = horizon_s
        self.threads_at_work = 0
        """Threads that will call `call_soon_threadsafe`: while there are any, real time passes and the clock stands."""
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self.now_s

    def waits(self) -> str:
        """A line for every task: who, and where it waits."""
        return "\n".join(sorted(_described(task) for task in asyncio.all_tasks(self)))


class _JumpingSelector(selectors.DefaultSelector):
    """Asked to wait, it looks once and moves the loop's clock instead."""

    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop
        self._turns = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        loop = self._loop
        events = super().select(0)
        self._turns += 1
        if self._turns > TURNS:
            self._turns = 0  # the loop turns once more to cancel everybody
            raise StuckError(f"the clock stands at {loop.now_s:g} s for {TURNS} turns:\n{loop.waits()}")
        if events or (timeout is not None and timeout <= 0):
            return events
        if loop.threads_at_work:
            events = super().select(PATIENCE_S)
            if not events:
                raise StuckError(f"{loop.threads_at_work} threads gave nothing for {PATIENCE_S:g} s:\n{loop.waits()}")
            return events
        if timeout is None:
            raise StuckError(f"deadlock at {loop.now_s:g} s, nobody can go on:\n{loop.waits()}")
        self._turns = 0
        loop.now_s += timeout
        if loop.now_s > loop.horizon_s:
            loop.horizon_s *= 2
            raise StuckError(f"nothing but timers before {loop.now_s:g} s:\n{loop.waits()}")
        return []


def run(function: Callable[..., Awaitable[T]], *args: Any, horizon_s: float = HORIZON_S) -> T:
    """`anyio.run` in virtual time."""
    return anyio.run(function, *args, backend_options={"loop_factory": lambda: VirtualTimeLoop(horizon_s)})


def _described(task: asyncio.Task[Any]) -> str:
    frames = list(_frames(task.get_coro()))
    who = next((name for frame in frames if (name := _name_of(frame))), task.get_name())
    ours = [frame for frame in frames if "site-packages" not in frame.f_code.co_filename] or frames
    places = [f"{Path(f.f_code.co_filename).name}:{f.f_lineno} {f.f_code.co_qualname}" for f in ours[-3:]]
    return f"  {who}: {' > '.join(places)}"


def _frames(coroutine: Any) -> Iterator[FrameType]:
    """From the outermost call to the innermost await."""
    while coroutine is not None:
        for kind in ("cr", "gi", "ag"):
            frame = getattr(coroutine, f"{kind}_frame", None)
            if frame is not None:
                yield frame
                coroutine = getattr(coroutine, f"{kind}_await", None) or getattr(coroutine, "gi_yieldfrom", None)
                break
        else:
            return


def _name_of(frame: FrameType) -> str | None:
    """The name of the actor whose method this is."""
    name = getattr(frame.f_locals.get("self"), "name", None)
    return name if isinstance(name, str) and frame.f_code.co_name in {"run", "handle", "start", "stop"} else None
