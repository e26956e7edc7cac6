"""One reward at work: a function called once a group, an actor called once a sample, both within their limits.

What comes out are finite scores, None where missing, and the faults that say why. Knows nothing of other rewards and
weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import anyio
import msgspec

from troupe.errors import RewardError
from troupe.messages import Slot
from troupe.rewards.actor import RewardActor, RewardSample
from troupe.rewards.attempts import Attempts, Fault, Pace, Tries, described, is_own_failure
from troupe.rewards.calling import Breaker, NeverWorked
from troupe.rewards.convention import (
    Reward,
    RewardFunction,
    Scope,
    call_function,
    check_columns,
    check_signature,
    checked_score,
    own_copy,
    reward_code,
    reward_scope,
    unwrapped,
)
from troupe.rewards.isolation import end_tasks, in_own_task
from troupe.rewards.reward_log import RewardLog
from troupe.rewards.watching import Watch, tasks_of
from troupe.runtime.guarding import under_way
from troupe.runtime.roles import together

_LARGEST = 1e18
"""Of a score's size: advantages square it in float32, which ends at 3.4e38."""

Fuse: TypeAlias = Callable[[anyio.CapacityLimiter], Breaker]
"""Makes a runner's breaker from its places for calls at once."""


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """Which groups are decoded together: those of one step and attempt."""

    step: int
    attempt: int
    size: int
    """Groups in it."""


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """Completions in TRL's shape: G of one prompt, or those of several prompts one after the other."""

    arguments: dict[str, Any]
    """`prompts`, `completions`, `trainer_state` and so on, without the columns."""
    columns: dict[str, list[Any]]
    gid: int | None = None
    slot: Slot | None = None
    round: Round | None = None
    """Of the group, where it is scored in a run."""
    patient: bool = False
    """Whether calls wait while the reward is down, instead of failing."""

    @property
    def size(self) -> int:
        """Number of completions."""
        return len(self.arguments["completions"])

    @property
    def given(self) -> dict[str, Any]:
        """What a function may take."""
        return {"trainer_state": None, **self.columns, **self.arguments}

    def part(self, index: int) -> Batch:
        """One sample by itself."""
        cut = slice(index, index + 1)
        arguments = {k: v[cut] if isinstance(v, list) else v for k, v in self.arguments.items()}
        return msgspec.structs.replace(
            self, arguments=arguments, columns={name: values[cut] for name, values in self.columns.items()}
        )


def joined(batches: list[Batch]) -> Batch:
    """Several groups as one batch; a column that a group lacks is None for its completions."""
    names = dict.fromkeys(name for batch in batches for name in batch.columns)
    return Batch(
        arguments={
            key: [item for batch in batches for item in batch.arguments[key]] if isinstance(value, list) else value
            for key, value in batches[0].arguments.items()
        },
        columns={
            name: [item for batch in batches for item in batch.columns.get(name, [None] * batch.size)] for name in names
        },
        patient=batches[0].patient,
    )


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What one reward says about a batch."""

    scores: list[float | None]
    """(G,) finite, None where missing."""
    faults: list[Fault]
    log: RewardLog
    faulted: frozenset[int] = frozenset()
    """Completions whose score is missing through a fault, and not because the reward says None."""

    def split(self, sizes: list[int]) -> list[Outcome]:
        """The outcomes of the batches that were joined. Each has the whole batch's metrics, the first one its faults,
        told once."""
        outcomes: list[Outcome] = []
        start = 0
        for size in sizes:
            cut = slice(start, start + size)
            log = RewardLog(size)
            log.extra = {column: values[cut] for column, values in self.log.extra.items()}
            log.logged = self.log.logged
            faulted = frozenset(index - start for index in self.faulted if start <= index < start + size)
            faults = [] if outcomes else self.faults
            outcomes.append(Outcome(scores=self.scores[cut], faults=faults, log=log, faulted=faulted))
            start += size
        return outcomes


class Runner(ABC):
    """One reward with its limits and its breaker."""

    def __init__(
        self,
        name: str,
        reward: Reward,
        attempts: Attempts,
        fuse: Fuse,
        start_timeout_s: float,
        places: int | None = None,
    ) -> None:
        """`places`: calls at once, where that is not what the pace says."""
        self.name, self.reward = name, reward
        self.scope: Scope = reward_scope(reward)
        self._places = anyio.CapacityLimiter(attempts.pace.concurrency if places is None else places)
        self.breaker = fuse(self._places)
        self.tries = Tries()
        self._attempts = msgspec.structs.replace(attempts, tries=self.tries)
        self._start = msgspec.structs.replace(
            attempts, pace=msgspec.structs.replace(attempts.pace, timeout_s=start_timeout_s)
        )

    def check_columns(self, columns: frozenset[str]) -> None:
        """RewardError where the reward requires a column that is not among these."""
        check_columns(self.reward, columns)

    async def start(self) -> None:
        """Get ready; RewardError where that fails or takes too long."""

    async def stop(self) -> Fault | None:
        """Undo `start`, if that was called."""
        return None

    @abstractmethod
    async def score(self, batch: Batch) -> Outcome:
        """Scores for every completion; missing where every attempt failed."""

    def _remedy(self, message: str) -> str:
        """What to do about code that has never worked."""
        return "correct it and start again"

    async def _call(
        self, batch: Batch, call: Callable[[], Awaitable[Any]], attempt: Callable[[], Awaitable[Any]]
    ) -> Any:
        if batch.patient:
            try:
                return await self.breaker.run(call, attempt)
            except NeverWorked as never:
                raise RewardError(
                    f"reward {self.name} has not worked once, and its first {never.calls} calls failed by errors of "
                    f"its code, the last one by {never.fault.message}; {self._remedy(never.fault.message)}"
                ) from None
        async with self._places:
            return await call()


class FunctionRunner(Runner):
    """One reward function: a call a group, in the event loop or in a thread."""

    def __init__(
        self, name: str, reward: RewardFunction, attempts: Attempts, fuse: Fuse, start_timeout_s: float
    ) -> None:
        super().__init__(name, reward, attempts, fuse, start_timeout_s)
        self._function = reward
        self._signature = check_signature(reward)

    async def score(self, batch: Batch) -> Outcome:
        """(G,) scores; all missing where every attempt failed."""
        once = partial(self._once, batch)
        answer = await self._call(batch, partial(self._attempts.run, once), partial(self._attempts.once, once))
        return as_outcome(answer, batch.size)

    async def _once(self, batch: Batch) -> tuple[list[float | None], RewardLog]:
        return await call_function(self._function, self.name, batch.given, batch.size, self._signature)


class ActorRunner(Runner):
    """One reward actor: a call a sample."""

    def __init__(self, name: str, reward: RewardActor, attempts: Attempts, fuse: Fuse, start_timeout_s: float) -> None:
        super().__init__(name, reward, attempts, fuse, start_timeout_s)
        self._actor, self._started = reward, False
        self.watch = Watch()

    async def start(self) -> None:
        """Start the actor. What it forks now, before anything is computed, is its own affair; later it may not."""
        self._started = True
        with anyio.move_on_after(self._start.pace.timeout_s) as scope:
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
                f"reward {self.name} did not start within {self._start.pace.timeout_s:g} s; correct what its start() "
                "waits for, or raise rewards.start_timeout_s"
            )
        self.watch.refuses_forks = True

    async def stop(self) -> Fault | None:
        """Stop the actor if it was started."""
        if not self._started:
            return None
        self._started = False
        with self.watch.watching():
            outcome = await self._attempts.once(partial(in_own_task, self._actor.stop))
        left = await ended(self.watch)
        return Fault(outcome.kind, f"did not stop: {outcome.message}") if isinstance(outcome, Fault) else left

    async def score(self, batch: Batch) -> Outcome:
        """(G,) scores; missing those of which every attempt failed."""
        if not self._started:
            raise RewardError(
                f"reward {self.name} has not been started; use `async with` on the manager, or await its start()"
            )
        scores: list[float | None] = [None] * batch.size
        faults: dict[int, Fault] = {}

        async def play(index: int) -> None:
            once = partial(self._one, _sample(batch, index))
            answer = await self._call(batch, partial(self._attempts.run, once), partial(self._attempts.once, once))
            if isinstance(answer, Fault):
                faults[index] = answer
            else:
                scores[index] = answer

        await together([partial(play, index) for index in range(batch.size)])
        return finite(scores, summed(faults, batch.size), RewardLog(batch.size), frozenset(faults))

    async def _one(self, sample: RewardSample) -> float | None:
        try:
            with self.watch.watching(), under_way(self.name, reward_code(self._actor), in_turns=True):
                return checked_score(await in_own_task(partial(self._actor.score, sample)), self.name, sample.index)
        finally:
            if self.watch.found is not None:
                raise RewardError(
                    f"reward {self.name} calls {self.watch.found}, which works in a process of its own only, and a "
                    'RewardActor lives in the event loop; write it as a function, with rewards.run = ["process"]'
                )


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


def as_outcome(answer: tuple[list[float | None], RewardLog] | Fault, size: int) -> Outcome:
    """A function's answer, or that there is none."""
    if isinstance(answer, Fault):
        return Outcome(scores=[None] * size, faults=[answer], log=RewardLog(size), faulted=frozenset(range(size)))
    scores, log = answer
    return finite(scores, [Fault("reward_log", message) for message in log.faults], log)


def summed(faults: Mapping[int, Fault], size: int) -> list[Fault]:
    """One fault a kind, naming the samples that had it; its text is the first one's."""
    summed = []
    for kind in sorted({fault.kind for fault in faults.values()}):
        samples = sorted(index for index, fault in faults.items() if fault.kind == kind)
        shown = ", ".join(map(str, samples))
        summed.append(Fault(kind, f"samples {shown} of {size}: {faults[samples[0]].message}"))
    return summed


def finite(
    scores: list[float | None], faults: list[Fault], log: RewardLog, faulted: frozenset[int] = frozenset()
) -> Outcome:
    """NaN, infinities and what float32 arithmetic would turn into them become missing scores and one more fault."""
    bad = {index: score for index, score in enumerate(scores) if score is not None and not abs(score) <= _LARGEST}
    told = {index: Fault("reward_timeout", log.why[index]) for index in bad if index in log.why}
    faults = [*faults, *summed(told, len(scores))]
    scores = [None if index in told else score for index, score in enumerate(scores)]
    bad = {index: score for index, score in bad.items() if index not in told}
    if bad:
        shown = ", ".join(f"{score} for sample {index}" for index, score in bad.items())
        faults = [*faults, Fault("reward_nonfinite", f"returned {shown}; scores must be finite, {_LARGEST:g} at most")]
        scores = [None if index in bad else score for index, score in enumerate(scores)]
    return Outcome(scores=scores, faults=faults, log=log, faulted=faulted | bad.keys() | told.keys())


def own_pace(reward: Reward, name: str, section: Pace) -> Pace:
    """The section's pace, overruled by the attributes of a function or an actor's class."""
    given = unwrapped(reward)
    own = {key: getattr(given, key, None) for key in ("timeout_s", "retries", "concurrency")}
    own = {key: value for key, value in own.items() if value is not None}
    try:
        return msgspec.convert({**msgspec.structs.asdict(section), **own}, Pace)
    except msgspec.ValidationError as error:
        raise RewardError(f"reward {name}: {error}; correct the attribute of its class") from None
