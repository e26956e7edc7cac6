"""DeviceThread: the one thread on which an actor's MLX work runs.

MLX streams belong to the thread that made them, and a lazy array made in one thread cannot be evaluated in another.
So an actor that computes owns one pinned thread with its own stream, and nothing unevaluated ever leaves it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext
from typing import Any, Generic, TypeVar

import anyio
import mlx.core as mx
import msgspec

from troupe.runtime.reporter import Reporter

T = TypeVar("T")
_PLAIN = {int, float, str}
_AHEAD = 2
"""Items of an iterator that are asked for before they are needed: one that is made, and one to go on with at once."""


def arrays_in(tree: Any) -> Iterator[mx.array]:
    """Every array in a tree of mappings, sequences, msgspec structs and dataclasses."""
    if isinstance(tree, mx.array):
        yield tree
    elif type(tree) in _PLAIN or (type(tree) is tuple and set(map(type, tree)) <= _PLAIN):
        return  # most of what there is: asking these about everything else would take longest
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from arrays_in(value)
    elif isinstance(tree, msgspec.Struct):
        for field in tree.__struct_fields__:
            yield from arrays_in(getattr(tree, field))
    elif hasattr(tree, "__dataclass_fields__") and not isinstance(tree, type):
        for field in tree.__dataclass_fields__:
            yield from arrays_in(getattr(tree, field))
    elif isinstance(tree, list | tuple) and not set(map(type, tree)) <= _PLAIN:  # token ids come by the thousand
        for value in tree:
            yield from arrays_in(value)


class Items(Generic[T]):
    """What an iterator on a device thread comes to, item by item. Made by `DeviceThread.iterate`."""

    def __init__(self, executor: ThreadPoolExecutor, iterator: Iterator[T]) -> None:
        self._executor = executor
        self._iterator = iterator
        self._asked: deque[asyncio.Future[T | None]] = deque()
        self.ended = False
        """Whether the last item was given."""

    async def next(self) -> T | None:
        """The next item; None after the last."""
        while len(self._asked) < _AHEAD:
            future = self._executor.submit(_evaluated, next, (self._iterator, None), True)
            self._asked.append(asyncio.wrap_future(future))
        item = await asyncio.shield(self._asked[0])
        self._asked.popleft()
        self.ended = item is None
        return item

    async def end(self) -> None:
        """Wait until nothing is computed any more."""
        if self._asked:
            await asyncio.wait(self._asked)
        for future in self._asked:
            if not future.cancelled():
                future.exception()  # retrieved: nobody asks for these items


class Turns:
    """Who may work at a device for a while, where several would: one at a time, in the order of asking, but those in no
    hurry after all others."""

    def __init__(self) -> None:
        self.is_taken = False
        self._waiting: tuple[deque[anyio.Event], deque[anyio.Event]] = (deque(), deque())

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for a turn."""
        return any(self._waiting)

    async def take(self, *, hurried: bool = True) -> None:
        """Wait for a turn; `give` ends it."""
        if not self.is_taken:
            self.is_taken = True
            return
        waiting, mine = self._waiting[0 if hurried else 1], anyio.Event()
        waiting.append(mine)
        try:
            await mine.wait()
        except BaseException:
            if mine.is_set():  # cancelled with the turn in hand
                self.give()
            else:
                waiting.remove(mine)
            raise

    def give(self) -> None:
        """The turn is over."""
        for waiting in self._waiting:
            if waiting:
                waiting.popleft().set()
                return
        self.is_taken = False


class DeviceThread:
    """A single worker thread with its own MLX stream on the default device.

    Use as an async context manager, or call `close` when done: the thread's streams are cleared before it ends,
    otherwise the process could abort at exit.
    """

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix=f"troupe-{name}", initializer=_open_stream
        )
        self.turns = Turns()

    async def run(
        self, function: Callable[..., T], *args: Any, on_cancel: Callable[[], None] | None = None, plain: bool = False
    ) -> T:
        """Run `function(*args)` on the device thread and return its result with every array in it evaluated.

        `plain`: there is no array in it, and nobody needs to look.

        A call cannot be interrupted from outside. When the caller is cancelled, `on_cancel` (called on the event
        loop) may ask the work to end early; the cancellation is delivered after the work has ended.
        """
        future = asyncio.wrap_future(self._executor.submit(_evaluated, function, args, plain))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if on_cancel is not None:
                on_cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([future])
            if not future.cancelled():
                future.exception()  # retrieved: the cancellation is what counts now
            raise

    @asynccontextmanager
    async def iterate(self, iterator: Iterator[T], *, on_leave: Callable[[], None]) -> AsyncIterator[Items[T]]:
        """Have an iterator go on by itself on the device thread while what it gave already is looked at.

        Its items have no arrays in them, and none is None. Who leaves before the last item calls `on_leave` (on the
        event loop), which asks the iterator to end early, and waits until it has.
        """
        items = Items(self._executor, iterator)
        try:
            yield items
        finally:
            if not items.ended:
                on_leave()
            with anyio.CancelScope(shield=True):
                await items.end()

    @asynccontextmanager
    async def turn(
        self, report: Reporter | None = None, *, hurried: bool = True, step: int | None = None
    ) -> AsyncIterator[None]:
        """Have the device for a decode, where others decode on it, too; `report` is told of a wait. Who is not
        `hurried` lets others first. Calls are taken from anybody at any time."""
        waits = report is not None and self.turns.is_taken
        with report.span("wait for device", step=step, kind="wait") if report and waits else nullcontext():
            await self.turns.take(hurried=hurried)
        try:
            yield
        finally:
            self.turns.give()

    async def close(self) -> None:
        """Clear the thread's streams and end it. Safe to call twice."""
        try:
            future = self._executor.submit(mx.clear_streams)
        except RuntimeError:  # already shut down
            return
        await asyncio.wrap_future(future)
        self._executor.shutdown(wait=True)

    async def __aenter__(self) -> DeviceThread:
        return self

    async def __aexit__(self, *exc: object) -> None:
        with anyio.CancelScope(shield=True):
            await self.close()


def _open_stream() -> None:
    mx.set_default_stream(mx.new_stream(mx.default_device()))


def _evaluated(function: Callable[..., T], args: tuple[Any, ...], plain: bool) -> T:
    try:
        result = function(*args)
    except StopIteration as error:  # no future can carry one: who waits for it would wait for ever
        raise RuntimeError("the work on the device thread ended in StopIteration; give next() a default") from error
    if not plain:
        mx.eval(list(arrays_in(result)))
    return result
