"""One reward at work: a function called once a group, an actor called once a sample, both within their limits.

What comes out are finite scores, None where missing, and the faults that say why. Knows nothing of other rewards and
weights.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

import anyio
import msgspec

from troupe.errors import RewardError
from troupe.rewards.actor import RewardActor, RewardSample
from troupe.rewards.attempts import Attempts, Fault, Pace
from troupe.rewards.functions import (
    RewardFunction,
    RewardLog,
    call_function,
    check_signature,
    checked_score,
    own_copy,
)

_LARGEST = 1e18
"""Of a score's size: advantages square it in float32, which ends at 3.4e38."""

Sleep: TypeAlias = Callable[[float], Awaitable[None]]


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """G completions in TRL's shape."""

    arguments: dict[str, Any]
    """`prompts`, `completions` and so on, without the columns."""
    columns: dict[str, list[Any]]
    gid: int | None

    @property
    def size(self) -> int:
        """G."""
        return len(self.arguments["completions"])


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What one reward says about a batch."""

    scores: list[float | None]
    """(G,) finite, None where missing."""
    faults: list[Fault]
    log: RewardLog


class FunctionRunner:
    """One reward function: a call a group."""

    def __init__(
        self, name: str, reward: RewardFunction, pace: Pace, sleep: Sleep, jitter: Callable[[], float]
    ) -> None:
        check_signature(reward)
        self.name, self.reward = name, reward
        self._attempts = Attempts(pace=pace, sleep=sleep, jitter=jitter)
        self._limiter = anyio.CapacityLimiter(pace.concurrency)

    async def score(self, batch: Batch) -> Outcome:
        """(G,) scores; all missing where every attempt failed."""
        arguments = {"trainer_state": None, **batch.columns, **batch.arguments}
        async with self._limiter:
            answer = await self._attempts.run(lambda: call_function(self.reward, self.name, arguments, batch.size))
        if isinstance(answer, Fault):
            return Outcome(scores=[None] * batch.size, faults=[answer], log=RewardLog(batch.size))
        scores, log = answer
        return _finite(scores, [], log)


class ActorRunner:
    """One reward actor: a call a sample."""

    def __init__(self, name: str, reward: RewardActor, pace: Pace, sleep: Sleep, jitter: Callable[[], float]) -> None:
        own = _own_pace(reward, name, pace)
        self.name, self.reward, self._started = name, reward, False
        self._attempts = Attempts(pace=own, sleep=sleep, jitter=jitter)
        self._limiter = anyio.CapacityLimiter(own.concurrency)

    async def start(self) -> None:
        """Start the actor; whatever it raises comes through."""
        self._started = True
        await self.reward.start()

    async def stop(self) -> Fault | None:
        """Stop the actor if it was started."""
        if not self._started:
            return None
        self._started = False
        outcome = await self._attempts.once(self.reward.stop)
        return Fault(outcome.kind, f"did not stop: {outcome.message}") if isinstance(outcome, Fault) else None

    async def score(self, batch: Batch) -> Outcome:
        """(G,) scores; missing those of which every attempt failed."""
        if not self._started:
            raise RewardError(
                f"reward {self.name} has not been started; use `async with` on the manager, or await its start()"
            )
        scores: list[float | None] = [None] * batch.size
        faults: dict[int, Fault] = {}

        async def play(index: int) -> None:
            sample = _sample(batch, index)
            async with self._limiter:
                answer = await self._attempts.run(lambda: self._one(sample))
            if isinstance(answer, Fault):
                faults[index] = answer
            else:
                scores[index] = answer

        async with anyio.create_task_group() as tasks:
            for index in range(batch.size):
                tasks.start_soon(play, index)
        return _finite(scores, _summed(faults, batch.size), RewardLog(batch.size))

    async def _one(self, sample: RewardSample) -> float | None:
        return checked_score(await self.reward.score(sample), self.name, sample.index)


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


def _summed(faults: Mapping[int, Fault], size: int) -> list[Fault]:
    """One fault a kind, naming the samples that had it; its text is the first one's."""
    summed = []
    for kind in sorted({fault.kind for fault in faults.values()}):
        samples = sorted(index for index, fault in faults.items() if fault.kind == kind)
        shown = ", ".join(map(str, samples))
        summed.append(Fault(kind, f"samples {shown} of {size}: {faults[samples[0]].message}"))
    return summed


def _finite(scores: list[float | None], faults: list[Fault], log: RewardLog) -> Outcome:
    """NaN, infinities and what float32 arithmetic would turn into them become missing scores and one more fault."""
    bad = {index: score for index, score in enumerate(scores) if score is not None and not abs(score) <= _LARGEST}
    if bad:
        shown = ", ".join(f"{score} for sample {index}" for index, score in bad.items())
        faults = [*faults, Fault("reward_nonfinite", f"returned {shown}; scores must be finite, {_LARGEST:g} at most")]
        scores = [None if index in bad else score for index, score in enumerate(scores)]
    return Outcome(scores=scores, faults=faults, log=log)


def _own_pace(reward: RewardActor, name: str, section: Pace) -> Pace:
    """The section's pace, overruled by what the actor's class attributes set."""
    own = {key: getattr(reward, key) for key in ("timeout_s", "retries", "concurrency")}
    own = {key: value for key, value in own.items() if value is not None}
    try:
        return msgspec.convert({**msgspec.structs.asdict(section), **own}, Pace)
    except msgspec.ValidationError as error:
        raise RewardError(f"reward {name}: {error}; correct the attribute of its class") from None
