"""What runs a reward: an actor in the event loop; a function in this process as long as that is possible, and in
processes of its own (`processes/runner.py`) from then on.

A function moves when it asks for what it may not have here (`watching.py`), or when calls do not end in their time: a
thread cannot be stopped. The call that shows it is made once more, whatever it came to here, so that scores are those
of a process from the first one that could differ.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import anyio

from troupe.errors import RewardError
from troupe.rewards.actor import RewardActor, RewardSample
from troupe.rewards.calling import Attempt, Caller
from troupe.rewards.convention import (
    Reward,
    RewardFunction,
    Scope,
    call_function,
    check_signature,
    checked_score,
    own_copy,
    reward_code,
    reward_place,
    reward_scope,
    unwrapped,
)
from troupe.rewards.extras import RewardLog
from troupe.rewards.faults import Fault, described, is_own_failure
from troupe.rewards.outcomes import Batch, Outcome, as_outcome, finite, summed
from troupe.rewards.watching import Watch, found_in, tasks_of
from troupe.runtime.guarding import under_way
from troupe.runtime.isolation import end_tasks, in_own_task
from troupe.runtime.roles import together

OVERRUNS = 2
"""Calls left behind in their threads after which a function is moved."""


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
        left, outcome = await _ended(self.watch), attempt.outcome
        return Fault(outcome.kind, f"did not stop: {outcome.message}") if isinstance(outcome, Fault) else left

    async def score(self, batch: Batch) -> Outcome:
        """(G,) scores; missing those of which every attempt failed."""
        if not self._started:
            raise not_started(self.name)
        newest: dict[int, Attempt] = {}
        calls = [
            partial(
                self.caller.run,
                partial(in_own_task, partial(self._actor.score, _sample(batch, index))),
                partial(self._attempting, index, newest),
                patient=batch.patient,
            )
            for index in range(batch.size)
        ]
        await together(calls)
        outcomes = {index: attempt.outcome for index, attempt in newest.items()}
        faults = {index: outcome for index, outcome in outcomes.items() if isinstance(outcome, Fault)}
        scores = [None if index in faults else outcomes[index] for index in range(batch.size)]
        return finite(scores, summed(faults, batch.size), RewardLog(batch.size), frozenset(faults))

    @contextmanager
    def _attempting(self, index: int, newest: dict[int, Attempt]) -> Iterator[Attempt]:
        """`newest` keeps the sample's newest attempt: the last one's outcome is what came of the sample."""
        try:
            code = reward_code(self._actor)
            with self.caller.limited() as attempt, self.watch.watching(), under_way(self.name, code, in_turns=True):
                newest[index] = attempt
                yield attempt
                attempt.outcome = checked_score(attempt.outcome, self.name, index)
        finally:
            if self.watch.found is not None:
                raise RewardError(
                    f"reward {self.name} calls {self.watch.found}, which works in a process of its own only, and a "
                    'RewardActor lives in the event loop; write it as a function, with rewards.run = ["process"]'
                )


class _MustMove(RewardError):  # noqa: N818 - an error to nobody but those who make the call
    """The call is to be made in a process."""


class FunctionRunner(Runner):
    """A reward function: a call a group, in the event loop or in a thread. One that is not started is not moved: it is
    an error there that it would have to be."""

    def __init__(
        self,
        reward: RewardFunction,
        caller: Caller,
        *,
        elsewhere: Callable[[], Runner],
        moved: Callable[[str], None],
    ) -> None:
        """`elsewhere` makes what runs the function in processes, with the same caller; RewardError where it cannot be
        run there. `moved` is called with why, once."""
        super().__init__(reward, caller)
        caller.remedy = partial(self._remedy, caller.remedy)
        self._function = reward
        self._signature = check_signature(reward)
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
        left = await _ended(self._watch)
        fault = await self._there.stop() if self._there is not None else None
        self._there, self._watch.refuses_forks = None, False
        return fault or left

    async def score(self, batch: Batch) -> Outcome:
        """(G,) scores; all missing where every attempt failed."""
        if self._there is None:
            call = partial(call_function, self._function, self.name, batch.given, batch.size, self._signature)
            try:
                answer = await self.caller.run(call, self._attempting, patient=batch.patient)
            except _MustMove:
                pass
            else:
                if not self._must_move:  # otherwise the last attempt did not end
                    return self._with_offer(as_outcome(answer, batch.size))
        there = self._there or await self._move()
        return await there.score(batch)

    @contextmanager
    def _attempting(self) -> Iterator[Attempt]:
        if self._must_move:
            raise _MustMove
        try:
            with self.caller.limited() as attempt, self._watch.watching():
                yield attempt
        except RewardError:
            if self._must_move:
                raise _MustMove from None
            raise
        if not attempt.timed_out:
            if self._must_move:
                raise _MustMove
        elif self._in_thread:
            self._overruns += 1

    def _with_offer(self, outcome: Outcome) -> Outcome:
        if self._overruns and any(fault.kind == "reward_timeout" for fault in outcome.faults):
            return as_outcome(
                Fault("reward_timeout", f"{outcome.faults[0].message}; {self._offer()}"), len(outcome.scores)
            )
        return outcome

    def _remedy(self, otherwise: Callable[[str], str], message: str) -> str:
        if self._there is None and self._in_thread and "thread" in message.lower() and self._can_move:
            return (
                'if it wants the main thread, or the one that its file was read in, give it rewards.run = ["process"]; '
                "else correct it and start again"
            )
        return otherwise(message)

    @property
    def _in_thread(self) -> bool:
        return not self._signature.is_async and not self._signature.is_quick

    @property
    def _must_move(self) -> bool:
        return self._watch.found is not None or (self._started and self._overruns >= OVERRUNS and self._can_move)

    @property
    def _can_move(self) -> bool:
        try:
            self._elsewhere()
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
                there = self._elsewhere()
            except RewardError as error:
                raise RewardError(
                    f"reward {self.name} needs a process of its own, since {why}, and cannot be moved to one "
                    f'(rewards.run = ["process"]): {error}'
                ) from None
            await there.start()
            self._there = there
            self._moved(why)
            return there


def not_started(name: str) -> RewardError:
    """For a reward that works between `start` and `stop` only."""
    return RewardError(f"reward {name} has not been started; use `async with` on the manager, or await its start()")


async def _ended(watch: Watch) -> Fault | None:
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
        index=batch.place(index),
        environment=arguments["environments"][index] if "environments" in arguments else None,
    )
