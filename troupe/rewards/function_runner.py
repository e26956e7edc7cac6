"""A reward function at work in this process as long as that is possible, and in processes of its own from then on.

It moves when it asks for what it may not have here (`watching.py`), or when calls do not end in their time: a thread
cannot be stopped. The call that shows it is made once more, whatever it came to here, so that scores are those of a
process from the first one that could differ. Knows nothing of other rewards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import anyio

from troupe.errors import RewardError
from troupe.rewards.attempts import Attempts, Fault, is_own_failure
from troupe.rewards.calling import Breaker
from troupe.rewards.convention import RewardFunction, reward_place, unwrapped
from troupe.rewards.reward_log import RewardLog
from troupe.rewards.runners import Batch, FunctionRunner, Fuse, Outcome, Runner, as_outcome, ended
from troupe.rewards.watching import Watch, found_in

OVERRUNS = 2
"""Calls left behind in their threads after which a function is moved."""

Elsewhere: TypeAlias = Callable[[Breaker], Runner]
"""Makes what runs a function in processes and shares the breaker; RewardError where it cannot be run there."""


class _MustMove(RewardError):  # noqa: N818 - an error to nobody but those who make the call
    """The call is to be made in a process."""


class MovableRunner(FunctionRunner):
    """A function that is not started is not moved: it is an error there that it would have to be."""

    def __init__(
        self,
        name: str,
        reward: RewardFunction,
        attempts: Attempts,
        fuse: Fuse,
        start_timeout_s: float,
        *,
        elsewhere: Elsewhere,
        moved: Callable[[str], None],
    ) -> None:
        """`moved` is called with why, once."""
        super().__init__(name, reward, attempts, fuse, start_timeout_s)
        self._elsewhere, self._moved = elsewhere, moved
        self._watch = Watch()
        self._watch.found = found_in(getattr(unwrapped(reward), "__module__", None))
        self._started = False
        self._overruns = 0
        self._there: Runner | None = None
        self._moving = anyio.Lock()

    async def start(self) -> None:
        """From here on forks are refused: something may be computed beside the calls."""
        self._started = self._watch.refuses_forks = True

    async def stop(self) -> Fault | None:
        """End the processes, if there are some, and what the function has begun and not ended."""
        self._started = False
        left = await ended(self._watch)
        fault = await self._there.stop() if self._there is not None else None
        self._there, self._watch.refuses_forks = None, False
        return fault or left

    async def score(self, batch: Batch) -> Outcome:
        """(G,) scores; all missing where every attempt failed."""
        if self._there is None:
            answer = await self._here(batch)
            if answer is not None:
                return answer
        there = self._there or await self._move()
        return await there.score(batch)

    async def _here(self, batch: Batch) -> Outcome | None:
        """None where the call is to be made in a process."""
        try:
            outcome = await super().score(batch)
        except _MustMove:
            return None
        if self._must_move:  # the last attempt did not end
            return None
        if self._overruns and any(fault.kind == "reward_timeout" for fault in outcome.faults):
            return as_outcome(Fault("reward_timeout", f"{outcome.faults[0].message}; {self._offer()}"), batch.size)
        return outcome

    async def _once(self, batch: Batch) -> tuple[list[float | None], RewardLog]:
        if self._must_move:
            raise _MustMove
        begun_s = anyio.current_time()
        try:
            with self._watch.watching():
                answer = await super()._once(batch)
        except BaseException as error:
            if is_own_failure(error) and self._must_move:
                raise _MustMove from error
            late = anyio.current_time() - begun_s >= 0.99 * self._attempts.pace.timeout_s
            if late and not is_own_failure(error) and self._in_thread:
                self._overruns += 1
            raise
        if self._must_move:
            raise _MustMove
        return answer

    def _remedy(self, message: str) -> str:
        if self._in_thread and "thread" in message.lower() and self._can_move:
            return (
                'if it wants the main thread, or the one that its file was read in, give it rewards.run = ["process"]; '
                "else correct it and start again"
            )
        return super()._remedy(message)

    @property
    def _in_thread(self) -> bool:
        return not self._signature.is_async and not self._signature.is_quick

    @property
    def _must_move(self) -> bool:
        return self._watch.found is not None or (self._started and self._overruns >= OVERRUNS and self._can_move)

    @property
    def _can_move(self) -> bool:
        try:
            self._elsewhere(self.breaker)
        except RewardError:
            return False
        return True

    def _offer(self) -> str:
        said = f"{self._overruns} of its calls did not end, and threads cannot be stopped"
        if self._can_move:
            return f'{said}; rewards.run = ["process"] has them killed, and after {OVERRUNS} it is moved there'
        return f'{said}; define it at the top of a file or module, for rewards.run = ["process"]'

    async def _move(self) -> Runner:
        async with self._moving:
            if self._there is not None:
                return self._there
            found = self._watch.found
            why = f"{self._overruns} of its calls did not end in time" if found is None else f"it calls {found}"
            if not self._started:
                raise RewardError(
                    f"{reward_place(self.reward)}reward {self.name} needs a process of its own: {why}; give it "
                    'rewards.run = ["process"], and use `async with` on the manager, or await its start()'
                )
            try:
                there = self._elsewhere(self.breaker)
            except RewardError as error:
                raise RewardError(
                    f"reward {self.name} needs a process of its own, since {why}, and cannot be moved to one "
                    f'(rewards.run = ["process"]): {error}'
                ) from None
            await there.start()
            self._there = there
            self._moved(why)
            return there
