"""Asking an environment while it may be away.

The n-th answer in a row that fails by what a service makes which is away (a connection, a time limit, a process that
cannot be started) *closes the gate*: the environment is down. An opening then waits and is tried again, as are all that
come after it, in turns; what may not be asked twice waits, and is asked once in its turn. The first success opens the
gate. As long as it is closed, one opening is always being tried, so that it is noticed when the environment is back.

Errors of the code itself close nothing, for waiting mends nothing. Where no answer of a kind has ever been given, and
those of as many groups have failed so, that is raised.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any, Literal, TypeAlias, TypeVar

import anyio

from troupe.environments.convention import EnvironmentFault
from troupe.environments.settings import EnvironmentConfig
from troupe.errors import WorldError
from troupe.runtime.backoff import backoff_s

T = TypeVar("T")

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0

Kind: TypeAlias = Literal["open", "answer", "end"]


class Missing(EnvironmentFault):
    """Why an episode is missing, and of which kind that is."""

    def __init__(self, message: str, kind: str = "environment_error", *, passing: bool = False) -> None:
        """`kind`: of the incident; `passing`: whether it may be otherwise later."""
        super().__init__(message)
        self.kind, self.passing = kind, passing


class Gate:
    """Whether an environment is taken to be up. `changed(why, down_s)` is called when it goes down, and with None when
    it is back after `down_s` seconds; `jitter` is uniform in [0, 1)."""

    def __init__(
        self,
        label: str,
        config: EnvironmentConfig,
        changed: Callable[[str | None, float], None],
        *,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.label, self._config, self._changed = label, config, changed
        self._sleep, self._jitter = sleep, jitter
        self.why: str | None = None
        """The newest fault while it is down."""
        self.proven: set[Kind] = set()
        """What has succeeded before."""
        self._wrong: dict[Kind, set[int]] = defaultdict(set)
        """Groups of which it has failed by errors of the code, as long as it has never succeeded."""
        self._failures = self._waited = 0
        self._turn = anyio.Lock()
        self._moved = anyio.Event()
        self._since_s = 0.0

    async def run(self, call: Callable[[], Awaitable[T]], kind: Kind, gid: int, *, again: bool = False) -> T:
        """What the call gives. Missing where it fails, and may not be tried again or it is not down.

        Raises:
            WorldError: for code that has never worked and is wrong.
        """
        while True:
            if self.why is None:
                try:
                    result = await call()
                except Missing as fault:
                    if not self._count(fault, kind, gid) or not again:
                        raise
                else:
                    self._succeeded(kind)
                    return result
            async with self._turn:  # in order of arrival; who has tried in vain goes to the end
                if not await self._is_due():
                    continue
                try:
                    result = await call()
                except Missing as fault:
                    self._waited += 1
                    self.why = str(fault)
                    if not again:
                        raise
                else:
                    self._succeeded(kind)
                    return result

    async def pause(self, retry: int) -> None:
        """Wait before the `retry`-th further attempt at the same thing."""
        await self._sleep(backoff_s(retry, FIRST_WAIT_S, LONGEST_WAIT_S, self._jitter()))

    async def _is_due(self) -> bool:
        """Wait for the next try whether it is back; False where it is back before."""
        if self.why is not None:
            pause_s = backoff_s(self._waited + 1, FIRST_WAIT_S, self._config.breaker_max_wait_s, self._jitter())
            with anyio.move_on_after(pause_s):
                await self._moved.wait()
        return self.why is not None

    def _succeeded(self, kind: Kind) -> None:
        self.proven.add(kind)
        self._wrong.pop(kind, None)
        self._failures = 0
        if self.why is not None:
            self.why = None
            self._moved.set()
            self._changed(None, anyio.current_time() - self._since_s)

    def _count(self, fault: Missing, kind: Kind, gid: int) -> bool:
        """Count one more that has failed; whether the environment is down."""
        if self.why is not None or not self._config.breaker_failures:
            return self.why is not None
        if not fault.passing:
            self._check_code(fault, kind, gid)
            return False
        self._failures += 1
        if self._failures < self._config.breaker_failures:
            return False
        self.why, self._since_s = str(fault), anyio.current_time()
        self._failures = self._waited = 0
        self._moved = anyio.Event()
        self._changed(self.why, 0.0)
        return True

    def _check_code(self, fault: Missing, kind: Kind, gid: int) -> None:
        if kind in self.proven:
            return
        self._wrong[kind].add(gid)
        if len(self._wrong[kind]) >= self._config.breaker_failures:
            what: Any = {"open": "been reset", "answer": "answered", "end": "given a reward"}[kind]
            raise WorldError(
                f"environment {self.label} has not {what} once, and has failed in {len(self._wrong[kind])} groups by "
                f"errors of its code, the last time by {fault}; correct it and start again"
            )
