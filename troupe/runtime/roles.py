"""Running all actors of a run at once, to the end of all, or to the first fault that a new actor does not mend.

A *role* is what the run needs; an actor has it. When an actor fails, a new one takes over its mailbox, its channels
and what it had in hand, after a while that grows with every failure, and an incident tells of it.
"""

import random
import traceback
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import msgspec

from troupe.errors import RunError, TroupeError
from troupe.messages import Incident
from troupe.runtime.actor import Actor
from troupe.runtime.backoff import backoff_s


class Restarts(msgspec.Struct, frozen=True, kw_only=True):
    """How often, and how soon, a role is given to a new actor."""

    limit: int = 3
    """Restarts of one role within `window_s`; one more failure ends the run."""
    window_s: float = 60.0
    in_vain: int = 20
    """Failures of one role in a row, however far apart, between which it was done with no message: the last one ends
    the run, or one whose actor takes longer than the window to fail would be restarted for ever."""
    first_s: float = 0.1
    """Seconds before the first restart; each further one within the window waits twice as long."""
    most_s: float = 10.0
    clock: Callable[[], float] = anyio.current_time
    sleep: Callable[[float], Awaitable[None]] = anyio.sleep
    jitter: Callable[[], float] = random.random
    """A random number from 0 to 1: pauses are between half and the whole of what is said above, so that roles that
    failed together are not restarted together."""

    def pause_s(self, nth: int) -> float:
        """Seconds before the `nth` restart within the window, counted from 1."""
        return backoff_s(nth, self.first_s, self.most_s, self.jitter())


class Role:
    """One role of a run, and the actor that has it now.

    `make` gives an actor with the same mailbox, channels, device thread and outliving ledgers each time. Exceptions
    that are no TroupeError are mended by a new actor where the role is `restartable`; TroupeErrors are final.
    """

    def __init__(self, make: Callable[[], Actor], *, restartable: bool = True) -> None:
        self.actor = make()
        self.restartable = restartable
        self.restarts = 0
        """New actors so far."""
        self._make = make
        self._failures: deque[float] = deque()
        self._in_vain = self._finished = 0  # failures since messages were finished, and how many by then

    @property
    def name(self) -> str:
        """The name of the actor."""
        return self.actor.name

    async def run(self, restarts: Restarts) -> None:
        """Run the role to its end, with as many actors as it takes."""
        work = self.actor.run
        while True:
            try:
                await work()
            except Exception as error:
                fault = decisive_fault(error)
            else:
                return
            if isinstance(fault, TroupeError) or not self.restartable:
                raise fault
            self.actor.inbox.take_back()
            await self._wait(fault, restarts)
            del fault  # its traceback holds what the actor had: weights, caches, a snapshot
            work = self._begin_again

    async def _begin_again(self) -> None:
        self.actor = self._make()
        await self.actor.run()

    async def _wait(self, fault: Exception, restarts: Restarts) -> None:
        now_s = restarts.clock()
        self._failures.append(now_s)
        while now_s - self._failures[0] > restarts.window_s:
            self._failures.popleft()
        what = f"{self.name} failed: {type(fault).__name__}: {fault} ({_place(fault)})"
        finished = self.actor.inbox.finished
        self._in_vain = self._in_vain + 1 if finished == self._finished else 1
        self._finished = finished
        if self._in_vain >= restarts.in_vain:
            raise RunError(
                f"{what}; it has failed {self._in_vain} times in a row without being done with a single message; mend "
                "the cause, then go on with --resume"
            ) from fault
        if len(self._failures) > restarts.limit:
            raise RunError(
                f"{what}; it was restarted {restarts.limit} times within {restarts.window_s:g} s before, which is the "
                "limit; mend the cause, then go on with --resume"
            ) from fault
        pause_s = restarts.pause_s(len(self._failures))
        self.restarts += 1
        message = f"{what}; a new one takes over in {pause_s:.2g} s (restart {self.restarts}), with all it had in hand"
        self.actor.report.incident_nowait(Incident(actor=self.name, kind="actor_restarted", message=message))
        await restarts.sleep(pause_s)


async def run_roles(members: Sequence[Role | Actor], restarts: Restarts | None = None) -> None:
    """Run all roles concurrently until each has ended. An actor that is given itself is not restarted.

    Who receives is started before who sends: they are given in the order in which work flows. There is no order of
    shutting down: the first actor ends when it has nothing more to say, its channels close, and the end travels on. A
    fault that no restart mends cancels the others and is raised as itself, not as a group; those that leave last then
    read what is left in their mailboxes, and end.
    """
    restarts = restarts or Restarts()
    roles = [member if isinstance(member, Role) else _once(member) for member in reversed(members)]
    first, last = ([role for role in roles if role.actor.leaves_last is is_last] for is_last in (False, True))

    async def run_first() -> None:
        try:
            await together([partial(role.run, restarts) for role in first])
        except BaseException:
            for role in last:
                role.actor.inbox.end()
            raise

    async def run_last() -> None:
        with anyio.CancelScope(shield=True):
            await together([partial(role.run, restarts) for role in last])

    await together([run_last, run_first])


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


@asynccontextmanager
async def finishing(limit_s: float) -> AsyncIterator[None]:
    """The body is done to its end; where it is stopped, it may take `limit_s` from then on."""
    async with anyio.create_task_group() as tasks:
        with anyio.CancelScope(shield=True) as work:

            async def watch() -> None:
                try:
                    await anyio.sleep_forever()
                finally:
                    work.deadline = anyio.current_time() + limit_s

            tasks.start_soon(watch)
            yield
        tasks.cancel_scope.cancel()


def first_fault(faults: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first leaf of a tree of exceptions that is a fault and not a mere cancellation."""
    leaves = _leaves(faults)
    cancelled = anyio.get_cancelled_exc_class()
    return next((leaf for leaf in leaves if not isinstance(leaf, cancelled)), leaves[0])


def decisive_fault(error: Exception) -> Exception:
    """What made an actor fail: of several faults at once one that is final, else the first."""
    leaves = [leaf for leaf in _leaves(error) if isinstance(leaf, Exception)]
    return next((leaf for leaf in leaves if isinstance(leaf, TroupeError)), leaves[0])


def _leaves(error: BaseException) -> list[BaseException]:
    leaves: list[BaseException] = []
    pending: list[BaseException] = [error]
    while pending:
        fault = pending.pop(0)
        if isinstance(fault, BaseExceptionGroup):
            pending[:0] = fault.exceptions
        else:
            leaves.append(fault)
    return leaves


def _once(actor: Actor) -> Role:
    return Role(lambda: actor, restartable=False)


def _place(fault: Exception) -> str:
    """File and line where a fault was raised."""
    frames = traceback.extract_tb(fault.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "place unknown"
