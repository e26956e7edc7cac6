"""Calling a reward: in a time limit, with retries, so many calls at once, and waiting while its service is down.

The n-th call in a row that fails after its retries *opens* the breaker: the reward is down. That call does not fail: it
waits and tries again, as do all that come after it and those that were under way, so that nothing is lost from then on.
They take turns, so that a call that can never succeed does not hide that others would. The first success *closes* the
breaker. Where no call has ever succeeded and all failed by errors of the code, nothing would come of waiting: that is
raised.
"""

import random
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import anyio

from troupe.errors import RewardError
from troupe.rewards.faults import Fault, described, is_own_failure, may_pass
from troupe.rewards.settings import RewardsConfig
from troupe.runtime.backoff import backoff_s

_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 30.0


class Exchanged(Exception):  # noqa: N818 - no error: a call that waited is to be made by another reward
    """The reward was replaced by another one while the call waited for it to be back."""


class Attempt:
    """One attempt at a call, and its outcome: what the call gave, or why it gave nothing."""

    outcome: Any
    timed_out = False


class Tries:
    """Attempts that have failed in a row, those of calls at the same time together: what is waited for."""

    def __init__(self) -> None:
        self.failed = 0
        self.why = ""
        """The newest fault."""
        self.since_s = 0.0
        """When the first of them failed (`time.perf_counter`)."""

    def note(self, outcome: object) -> None:
        """One more attempt has an outcome."""
        if not isinstance(outcome, Fault):
            self.failed = 0
            return
        if not self.failed:
            self.since_s = time.perf_counter()
        self.failed += 1
        self.why = outcome.message


class Caller:
    """Makes all calls of one reward, within the limits of its config.

    `changed(why, down_s)` is called when the breaker opens, and with None when it closes after `down_s` seconds;
    `jitter` is uniform in [0, 1).
    """

    def __init__(
        self,
        name: str,
        config: RewardsConfig,
        changed: Callable[[str | None, float], None],
        *,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.name, self.config = name, config
        self._changed, self._sleep, self._jitter = changed, sleep, jitter
        self._places = anyio.CapacityLimiter(config.concurrency)
        self.tries = Tries()
        self.why: str | None = None
        """The newest fault while the breaker is open; None: the service is taken to be up."""
        self.proven = False
        """Whether the reward has worked, or calls are to wait even if it never has."""
        self.machines_changed: Callable[[str | None], None] = lambda why: None
        """Called when `awaited` begins, with why, and when it ends."""
        self.remedy: Callable[[str], str] = lambda message: "correct it and start again"
        """What to do about code that has never worked and failed by such a fault."""
        self._failures = 0
        self._only_code = True
        """Whether all of these failed by errors of the code."""
        self._waited = 0
        """Tries in vain since the breaker has opened."""
        self._turn = anyio.Lock()
        self._moved = anyio.Event()
        self._since_s = 0.0
        self._retired = False
        self.awaited: str | None = None
        """Why no machine can make a call now; None: one can, or calls are made on this one."""
        self._waits_end = set[anyio.CancelScope]()

    @property
    def down(self) -> str | None:
        """Why calls wait, where they do: the breaker is open, or no machine is there."""
        return self.awaited if self.why is None else self.why

    def waits_for_machines(self, why: str | None) -> None:
        """No machine that could make a call is there, and why; or with None, one is. What was retired stays as it
        was: nothing is to be made by it."""
        if self._retired:
            return
        was_awaited, self.awaited = self.awaited is not None, why
        if was_awaited != (why is not None):
            self.machines_changed(why)

    @contextmanager
    def until_retired(self) -> Iterator[None]:
        """A wait within ends with Exchanged when the reward is retired."""
        if self._retired:
            raise Exchanged
        with anyio.CancelScope() as scope:
            self._waits_end.add(scope)
            try:
                yield
            finally:
                self._waits_end.discard(scope)
        if scope.cancelled_caught:
            raise Exchanged

    @contextmanager
    def limited(self) -> Iterator[Attempt]:
        """`with caller.limited() as attempt: attempt.outcome = await call()`: where that fails or takes too long, the
        outcome is a Fault. A RewardError comes through, for it says that the code is wrong and not that a call failed.
        """
        attempt = Attempt()
        attempt.outcome = late = Fault("reward_timeout", f"no answer within {self.config.timeout_s:g} s")
        with anyio.move_on_after(self.config.timeout_s) as scope:
            try:
                yield attempt
            except RewardError:
                raise
            except BaseException as error:
                if not is_own_failure(error):
                    raise
                if not scope.cancel_called:
                    attempt.outcome = Fault("reward_error", described(error), not may_pass(error))
        attempt.timed_out = scope.cancelled_caught and attempt.outcome is late

    async def run(
        self,
        call: Callable[[], Awaitable[Any]],
        attempting: Callable[[], AbstractContextManager[Attempt]],
        *,
        patient: bool,
    ) -> Any:
        """What the call gave, or the last attempt's fault; each attempt is made within an `attempting()`.

        A `patient` call waits while the reward is down, and holds no place among the calls at once meanwhile.

        Raises:
            Exchanged: where the reward was retired while the call waited.
            RewardError: for code that has never worked and is wrong, in place of opening.
            Whatever the attempt raises, and then nothing is counted.
        """
        while True:
            async with self._places:
                if not patient or self.why is None:
                    for retry in range(self.config.retries + 1):
                        if retry:
                            await self._sleep(backoff_s(retry, _FIRST_WAIT_S, _LONGEST_WAIT_S, self._jitter()))
                        with attempting() as attempt:
                            attempt.outcome = await call()
                        self.tries.note(attempt.outcome)
                        if not isinstance(attempt.outcome, Fault):
                            break
                    if not patient or self._counts(attempt.outcome):
                        return attempt.outcome
            async with self._turn:  # in order of arrival; who has tried in vain goes to the end
                tried = await self._try(call, attempting)
            if tried is not None:
                return tried.outcome

    def wait_s(self, tries: int) -> float:
        """Seconds until it is tried again whether the service is back, after so many tries in vain."""
        return backoff_s(tries + 1, _FIRST_WAIT_S, self.config.breaker_max_wait_s, self._jitter())

    def retire(self) -> None:
        """Another reward takes over: calls that wait end with Exchanged."""
        self._retired = True
        self._moved.set()
        for scope in self._waits_end:
            scope.cancel()

    async def _try(
        self, call: Callable[[], Awaitable[Any]], attempting: Callable[[], AbstractContextManager[Attempt]]
    ) -> Attempt | None:
        """Wait, then try once, unless the service is back before; None where nothing came of it."""
        if not self._waits():
            return None
        with anyio.move_on_after(self.wait_s(self._waited)):
            await self._moved.wait()
        if not self._waits():
            return None
        async with self._places:
            with attempting() as attempt:
                attempt.outcome = await call()
        self.tries.note(attempt.outcome)
        if isinstance(attempt.outcome, Fault):
            self._waited += 1
            if self.why is not None:
                self.why = attempt.outcome.message
            return None
        self._succeeded()
        return attempt

    def _waits(self) -> bool:
        if self._retired:
            raise Exchanged
        return self.why is not None

    def _succeeded(self) -> None:
        self._failures, self._only_code, self.proven = 0, True, True
        if self.why is not None:
            self.why = None
            self._moved.set()
            self._changed(None, time.perf_counter() - self._since_s)

    def _counts(self, outcome: object) -> bool:
        """Count a call; whether this is its outcome, as opposed to having to wait."""
        if not isinstance(outcome, Fault):
            self._succeeded()
            return True
        if self.why is not None:
            return False
        self._failures += 1
        self._only_code = self._only_code and outcome.by_code
        if not self.config.breaker_failures or self._failures < self.config.breaker_failures:
            return True
        if self._only_code and not self.proven:
            raise RewardError(
                f"reward {self.name} has not worked once, and its first {self._failures} calls failed by errors of "
                f"its code, the last one by {outcome.message}; {self.remedy(outcome.message)}"
            )
        self.why, self._since_s, self._waited, self._failures = outcome.message, time.perf_counter(), 0, 0
        self._moved = anyio.Event()
        if self._retired:
            self._moved.set()
        self._changed(self.why, 0.0)
        return False
