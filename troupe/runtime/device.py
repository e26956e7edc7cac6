"""DeviceThread: the one thread on which an actor's MLX work runs.

MLX streams belong to the thread that made them, and a lazy array made in one thread cannot be evaluated in another.
So an actor that computes owns one pinned thread with its own stream, and nothing unevaluated ever leaves it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import anyio
import mlx.core as mx
import msgspec

T = TypeVar("T")
_PLAIN = {int, float, str}


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


class DeviceThread:
    """A single worker thread with its own MLX stream on the default device.

    Use as an async context manager, or call `close` when done: the thread's streams are cleared before it ends,
    otherwise the process could abort at exit.
    """

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix=f"troupe-{name}", initializer=_open_stream
        )

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
