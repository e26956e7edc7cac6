"""Trying a call that may raise, hang or take too long."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Literal, TypeVar

import anyio
import msgspec

from troupe.errors import RewardError, sayable
from troupe.rewards.faults import may_pass, place_of
from troupe.runtime.backoff import backoff_s

T = TypeVar("T")

FaultKind = Literal["reward_timeout", "reward_error", "reward_nonfinite", "reward_log"]

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
_REFUSED = re.compile(r"connection refused|connect call failed|\[Errno (111|61)\]", re.IGNORECASE)
_PLACE = re.compile(r" \([^()]*:\d+\)$")
_SHORT = 100


class Fault(msgspec.Struct, frozen=True):
    """Why there is no score; of the kind `reward_log`, why something that was logged is not there."""

    kind: FaultKind
    message: str
    by_code: bool = False
    """Whether no service that is away makes such an error."""


class Tries:
    """Tries of one reward that have failed in a row, calls at the same time together; for whoever asks what is waited
    for."""

    def __init__(self) -> None:
        self.failed = 0
        self.why = ""
        """The newest fault."""
        self.since_s = 0.0
        """When the first of them failed (`time.perf_counter`)."""

    def note(self, outcome: object) -> None:
        """One more try has come to something."""
        if not isinstance(outcome, Fault):
            self.failed = 0
            return
        if not self.failed:
            self.since_s = time.perf_counter()
        self.failed += 1
        self.why = outcome.message


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of one reward's calls."""

    timeout_s: Annotated[float, msgspec.Meta(gt=0)]
    """Seconds for one attempt."""
    retries: Annotated[int, msgspec.Meta(ge=0)]
    """Attempts after the first."""
    concurrency: Annotated[int, msgspec.Meta(ge=1)]
    """Calls at once."""


class Attempts(msgspec.Struct, frozen=True, kw_only=True):
    """Calls at a pace, waiting between attempts."""

    pace: Pace
    sleep: Callable[[float], Awaitable[None]]
    jitter: Callable[[], float]
    """Uniform in [0, 1)."""
    tries: Tries | None = None
    """Is told how each ends."""

    async def run(self, call: Callable[[], Awaitable[T]]) -> T | Fault:
        """The first answer, or the last attempt's fault.

        Raises:
            RewardError: at once, for it says that the code is wrong and not that a call failed.
        """
        outcome = await self.once(call)
        for attempt in range(1, self.pace.retries + 1):
            if not isinstance(outcome, Fault):
                return outcome
            await self.wait(attempt)
            outcome = await self.once(call)
        return outcome

    async def wait(self, attempt: int) -> None:
        """The pause before attempt ≥ 1 (attempt 0 is the first)."""
        await self.sleep(backoff_s(attempt, FIRST_WAIT_S, LONGEST_WAIT_S, self.jitter()))

    async def once(self, call: Callable[[], Awaitable[T]]) -> T | Fault:
        """One attempt."""
        outcome = await self._once(call)
        if self.tries is not None:
            self.tries.note(outcome)
        return outcome

    async def _once(self, call: Callable[[], Awaitable[T]]) -> T | Fault:
        late = Fault("reward_timeout", f"no answer within {self.pace.timeout_s:g} s")
        with anyio.move_on_after(self.pace.timeout_s) as scope:
            try:
                return await call()
            except RewardError:
                raise
            except BaseException as error:
                if not is_own_failure(error):
                    raise
                return late if scope.cancel_called else Fault("reward_error", described(error), is_by_code(error))
        return late


def is_own_failure(error: BaseException) -> bool:
    """Whether the called code failed, as opposed to us or the user ending it."""
    if isinstance(error, BaseExceptionGroup):
        return all(is_own_failure(inner) for inner in error.exceptions)
    if isinstance(error, anyio.get_cancelled_exc_class()):
        # Code that awaits a task cancelled elsewhere raises the same class without anybody cancelling us.
        return anyio.current_effective_deadline() != -math.inf
    return not isinstance(error, (KeyboardInterrupt, GeneratorExit))


def is_by_code(error: BaseException) -> bool:
    """Whether an error says that the code, or what it needs here, is wrong: every one that no service makes which is
    away."""
    return not may_pass(error)


def in_short(message: str) -> str:
    """A fault in a few words for a line of a display: without the place in the code, and no longer than that."""
    if _REFUSED.search(message):
        return "connection refused"
    text = _PLACE.sub("", " ".join(message.split()))
    return text if len(text) <= _SHORT else text[: _SHORT - 1] + "…"


def described(error: BaseException) -> str:
    """Class, text and place of an error in one line, as UTF-8 can say it; the place is the user's own line, if there is
    one."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # its __str__ is code like any other
        text = ""
    text = text if len(text) <= 300 else text[:299] + "…"
    place = f" ({place})" if (place := place_of(error)) else ""
    return sayable(f"{type(error).__name__}: {text}{place}" if text else f"{type(error).__name__}{place}")
