"""Breaker: while a reward's service is down, calls wait instead of failing, and one at a time tries whether it is back.

The n-th call in a row that fails after its retries *opens* the breaker. It does not fail itself: it waits and tries
again, as do all that come after it and those that were under way, so that nothing is lost from then on. They take
turns, so that a call that can never succeed does not hide that others would. The first success *closes* the breaker.
Where no call has ever succeeded and all failed by errors of the code, nothing would come of waiting: that is raised.
Knows nothing of what is called.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import anyio
import msgspec

from troupe.rewards.attempts import FIRST_WAIT_S, Fault
from troupe.runtime.backoff import backoff_s

T = TypeVar("T")


class BreakerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """When to open, and how often to try."""

    failures: Annotated[int, msgspec.Meta(ge=0)]
    """Calls in a row that fail; 0: never open."""
    max_wait_s: Annotated[float, msgspec.Meta(gt=0)]
    """Longest time between two tries."""


class Exchanged(Exception):  # noqa: N818 - no error: a call that waited is to be made by another reward
    """The reward was replaced by another one while the call waited for it to be back."""


class NeverWorked(Exception):  # noqa: N818 - said with the reward's name by who knows it
    """No call has ever succeeded, and those that would open the breaker all failed by errors of the code."""

    def __init__(self, calls: int, fault: Fault) -> None:
        super().__init__(fault.message)
        self.calls, self.fault = calls, fault


class Breaker:
    """Shared by all calls of one reward, of which `places` says how many are made at once.

    `changed(why, down_s)` is called when it opens, and with None when it closes after `down_s` seconds; `jitter` is
    uniform in [0, 1).
    """

    def __init__(
        self,
        limits: BreakerLimits,
        places: anyio.CapacityLimiter,
        changed: Callable[[str | None, float], None],
        jitter: Callable[[], float],
    ) -> None:
        self._limits = limits
        self._places = places
        self._changed = changed
        self._jitter = jitter
        self._failures = 0
        self._only_code = True
        """Whether all of these failed by errors of the code."""
        self._tries = 0
        self._turn = anyio.Lock()
        self._moved = anyio.Event()
        self._since_s = 0.0
        self._retired = False
        self.why: str | None = None
        """The newest fault while it is open; None: the service is taken to be up."""
        self.proven = False
        """Whether it has worked, or calls are to wait even if it never has."""

    async def run(
        self, call: Callable[[], Awaitable[T | Fault]], attempt: Callable[[], Awaitable[T | Fault]]
    ) -> T | Fault:
        """Make a call, or wait until it can be made. `call` has its retries, `attempt` is one try.

        Who waits for the reward to be back holds no place among the calls at once.

        Raises:
            Exchanged: where the reward was retired while the call waited.
            NeverWorked: in place of opening.
            Whatever the call raises, and then nothing is counted.
        """
        while True:
            made = await self._make(call)
            if made is not None:
                return made[0]
            async with self._turn:  # in order of arrival; who has tried in vain goes to the end
                tried = await self._try(attempt)
            if tried is not None:
                return tried[0]

    def retire(self) -> None:
        """Another reward takes over: calls that wait end with Exchanged."""
        self._retired = True
        self._moved.set()

    async def _make(self, call: Callable[[], Awaitable[T | Fault]]) -> tuple[T | Fault] | None:
        """The outcome of the call, None where it has to wait."""
        async with self._places:
            if self.why is not None:
                return None
            outcome = await call()
            if isinstance(outcome, Fault):
                return (outcome,) if self._failed(outcome) else None
            self._succeeded()
            return (outcome,)

    async def _try(self, attempt: Callable[[], Awaitable[T | Fault]]) -> tuple[T] | None:
        """Wait, then try once, unless the service is back before."""
        if not self._waits():
            return None
        with anyio.move_on_after(self._wait_s()):
            await self._moved.wait()
        if not self._waits():
            return None
        async with self._places:
            outcome = await attempt()
        if isinstance(outcome, Fault):
            self._tries += 1
            if self.why is not None:
                self.why = outcome.message
            return None
        self._succeeded()
        return (outcome,)

    def _waits(self) -> bool:
        if self._retired:
            raise Exchanged
        return self.why is not None

    def _wait_s(self) -> float:
        return backoff_s(self._tries + 1, FIRST_WAIT_S, self._limits.max_wait_s, self._jitter())

    def _succeeded(self) -> None:
        self._failures, self._only_code, self.proven = 0, True, True
        if self.why is not None:
            self.why = None
            self._moved.set()
            self._changed(None, time.perf_counter() - self._since_s)

    def _failed(self, fault: Fault) -> bool:
        """Count it; whether the call has failed, as opposed to having to wait."""
        if self.why is None:
            self._failures += 1
            self._only_code = self._only_code and fault.by_code
            if not self._limits.failures or self._failures < self._limits.failures:
                return True
            if self._only_code and not self.proven:
                raise NeverWorked(self._failures, fault)
            self.why, self._since_s, self._tries, self._failures = fault.message, time.perf_counter(), 0, 0
            self._moved = anyio.Event()
            if self._retired:
                self._moved.set()
            self._changed(self.why, 0.0)
        return False
