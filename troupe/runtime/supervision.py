"""Playing a whole cast: every actor at once, to the end of all, or to the first fault."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

import anyio

from troupe.runtime.actor import Actor


async def play(actors: Sequence[Actor]) -> None:
    """Run all actors concurrently until each has ended.

    There is no order of shutting down: the first actor ends when it has nothing more to say, its channels close,
    and the end travels on. A fault in one cancels the others and is raised as itself, not as a group; those that
    leave last are cancelled when the others have ended.
    """
    audience = anyio.CancelScope(shield=True)

    async def perform() -> None:
        try:
            await together([actor.run for actor in actors if not actor.leaves_last])
        except BaseException:
            audience.cancel()
            raise

    async def listen() -> None:
        with audience:
            await together([actor.run for actor in actors if actor.leaves_last])

    await together([perform, listen])


async def together(works: Iterable[Callable[[], Coroutine[Any, Any, object]]]) -> None:
    """Await all works at once. The first fault cancels the others and is raised as itself, not as a group."""
    try:
        async with anyio.create_task_group() as group:
            for work in works:
                group.start_soon(work)
    except BaseExceptionGroup as faults:
        fault = first_fault(faults)
        if isinstance(fault, GeneratorExit):  # as itself it would mean that this very coroutine is being closed
            raise
    else:
        return
    raise fault  # out here, so that it keeps the cause it was raised from


def first_fault(faults: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first leaf of a tree of exceptions that is a fault and not a mere cancellation."""
    leaves: list[BaseException] = []
    pending: list[BaseException] = [faults]
    while pending:
        fault = pending.pop(0)
        if isinstance(fault, BaseExceptionGroup):
            pending[:0] = fault.exceptions
        else:
            leaves.append(fault)
    cancelled = anyio.get_cancelled_exc_class()
    return next((leaf for leaf in leaves if not isinstance(leaf, cancelled)), leaves[0])
