"""What runs a reward, and how actors are run; functions are by `function_runner.py` or `processes/runner.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import anyio

from troupe.errors import RewardError
from troupe.rewards.actor import RewardActor, RewardSample
from troupe.rewards.calling import Attempt, Caller
from troupe.rewards.convention import Reward, Scope, checked_score, own_copy, reward_code, reward_scope
from troupe.rewards.extras import RewardLog
from troupe.rewards.faults import Fault, described, is_own_failure
from troupe.rewards.outcomes import Batch, Outcome, finite, summed
from troupe.rewards.watching import Watch, tasks_of
from troupe.runtime.guarding import under_way
from troupe.runtime.isolation import end_tasks, in_own_task
from troupe.runtime.roles import together


class Runner(ABC):
    """One reward, and what makes its calls."""

    def __init__(self, reward: Reward, caller: Caller) -> None:
        self.name, self.reward, self.caller = caller.name, reward, caller
        self.scope: Scope = reward_scope(reward)

    @abstractmethod
    async def start(self) -> None:
        """Get ready; RewardError where that fails or takes too long."""

    @abstractmethod
    async def stop(self) -> Fault | None:
        """Undo `start`, if that was called."""

    @abstractmethod
    async def score(self, batch: Batch) -> Outcome:
        """Scores for every completion; missing where every attempt failed."""


class ActorRunner(Runner):
    """One reward actor: a call a sample."""

    def __init__(self, reward: RewardActor, caller: Caller) -> None:
        super().__init__(reward, caller)
        self._actor, self._started = reward, False
        self.watch = Watch()

    async def start(self) -> None:
        """Start the actor. What it forks now, before anything is computed, is its own affair; later it may not."""
        self._started = True
        limit_s = self.caller.config.start_timeout_s
        with anyio.move_on_after(limit_s) as scope:
            try:
                with self.watch.watching():
                    await in_own_task(self._actor.start)
            except BaseException as error:
                if not is_own_failure(error):
                    raise
                raise RewardError(
                    f"reward {self.name} did not start: {described(error)}; correct what its start() needs"
                ) from error
        if scope.cancelled_caught:
            raise RewardError(
                f"reward {self.name} did not start within {limit_s:g} s; correct what its start() "
                "waits for, or raise rewards.start_timeout_s"
            )
        self.watch.refuses_forks = True

    async def stop(self) -> Fault | None:
        """Stop the actor if it was started."""
        if not self._started:
            return None
        self._started = False
        with self.watch.watching(), self.caller.limited() as attempt:
            attempt.outcome = await in_own_task(self._actor.stop)
        left, outcome = await ended(self.watch), attempt.outcome
        return Fault(outcome.kind, f"did not stop: {outcome.message}") if isinstance(outcome, Fault) else left

    async def score(self, batch: Batch) -> Outcome:
        """(G,) scores; missing those of which every attempt failed."""
        if not self._started:
            raise not_started(self.name)
        scores: list[float | None] = [None] * batch.size
        faults: dict[int, Fault] = {}

        async def score_one(index: int) -> None:
            call = partial(in_own_task, partial(self._actor.score, _sample(batch, index)))
            answer = await self.caller.run(call, partial(self._attempting, index), patient=batch.patient)
            if isinstance(answer, Fault):
                faults[index] = answer
            else:
                scores[index] = answer

        await together([partial(score_one, index) for index in range(batch.size)])
        return finite(scores, summed(faults, batch.size), RewardLog(batch.size), frozenset(faults))

    @contextmanager
    def _attempting(self, index: int) -> Iterator[Attempt]:
        try:
            code = reward_code(self._actor)
            with self.caller.limited() as attempt, self.watch.watching(), under_way(self.name, code, in_turns=True):
                yield attempt
                attempt.outcome = checked_score(attempt.outcome, self.name, index)
        finally:
            if self.watch.found is not None:
                raise RewardError(
                    f"reward {self.name} calls {self.watch.found}, which works in a process of its own only, and a "
                    'RewardActor lives in the event loop; write it as a function, with rewards.run = ["process"]'
                )


def not_started(name: str) -> RewardError:
    """For a reward that works between `start` and `stop` only."""
    return RewardError(f"reward {name} has not been started; use `async with` on the manager, or await its start()")


async def ended(watch: Watch) -> Fault | None:
    """End what watched code has begun and not ended; what does not end is left behind, and a fault."""
    counted = Counter(await end_tasks(tasks_of(watch)))
    left = ", ".join(what if count == 1 else f"{what}, {count} times" for what, count in counted.items())
    return Fault("reward_error", f"left a task behind that ignores its cancellation: {left}") if left else None


def _sample(batch: Batch, index: int) -> RewardSample:
    arguments = batch.arguments
    return RewardSample(
        prompt=own_copy(arguments["prompts"][index]),
        completion=own_copy(arguments["completions"][index]),
        completion_ids=tuple(arguments["completion_ids"][index]) if "completion_ids" in arguments else (),
        columns={name: own_copy(values[index]) for name, values in batch.columns.items()},
        gid=batch.gid,
        index=index,
    )
