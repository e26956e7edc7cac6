"""RewardManager: every reward of a group at once, each call with timeout and retries, combined by weights.

A call that raises, hangs or gives NaN makes a *missing* score (None) and an incident, never a 0. Only code that breaks
the convention (wrong length, wrong type, missing column) ends the run. Knows nothing of advantages or channels.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from types import TracebackType
from typing import Annotated, Any, TypeAlias

import anyio
import msgspec

from troupe.errors import RewardError
from troupe.messages import Incident, PromptText, RolloutGroup
from troupe.rewards.actor import RewardActor, RewardSample
from troupe.rewards.attempts import Attempts, Fault
from troupe.rewards.functions import (
    Reward,
    RewardFunction,
    RewardLog,
    call_function,
    check_columns,
    check_signature,
    checked_score,
    reward_name,
)

Sleep: TypeAlias = Callable[[float], Awaitable[None]]


class RewardsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[rewards]` section."""

    functions: tuple[str, ...] = ()
    """What `load_reward` takes: "length", "exact_answer", "format:REGEX", "FILE.py:NAME", …"""
    weights: tuple[float, ...] | None = None
    """One a function; None: all 1."""
    timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    """Seconds that one attempt at one group may take."""
    retries: Annotated[int, msgspec.Meta(ge=0)] = 1
    """Further attempts after the first fails."""
    concurrency: Annotated[int, msgspec.Meta(ge=1)] = 16
    """Groups that one function scores at once."""
    min_scored: Annotated[int, msgspec.Meta(ge=1)] = 2
    """Groups with fewer scored samples are quarantined and not trained: one sample has nothing to be compared with."""


class GroupScores(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the rewards say about G completions."""

    scores: dict[str, tuple[float | None, ...]]
    """Reward name → (G,) finite scores, None where missing."""
    rewards: tuple[float | None, ...]
    """(G,) Σ weight·score over the scores that are there; None where none is."""
    incidents: tuple[Incident, ...]
    """Why scores are missing, of kinds reward_timeout, reward_error and reward_nonfinite."""
    metrics: dict[str, float] = {}
    """What functions logged by `log_metric`, the mean of each name."""
    extra: dict[str, tuple[Any, ...]] = {}
    """What functions logged by `log_extra`: column → (G,) values."""


class _Batch(msgspec.Struct, frozen=True, kw_only=True):
    """G completions in TRL's shape."""

    arguments: dict[str, Any]
    """`prompts`, `completions` and so on, and the columns."""
    columns: dict[str, list[Any]]
    gid: int | None

    @property
    def size(self) -> int:
        return len(self.arguments["completions"])


class _Outcome(msgspec.Struct, frozen=True, kw_only=True):
    scores: list[float | None]
    faults: list[Fault]
    log: RewardLog


class RewardManager:
    """Runs rewards. Actors among them need `start` and `stop`, or `async with`; functions need neither."""

    def __init__(
        self,
        reward_funcs: Reward | Sequence[Reward],
        weights: Sequence[float] | None = None,
        config: RewardsConfig | None = None,
        *,
        sleep: Sleep = anyio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """`weights` default to the config's, those to 1. `sleep` and `jitter` pace the retries.

        Raises:
            RewardError: no reward, one that cannot be called as a reward, or weights of another length.
        """
        config = RewardsConfig() if config is None else config
        rewards = list(reward_funcs) if isinstance(reward_funcs, Sequence) else [reward_funcs]
        if not rewards:
            raise RewardError("there is no reward; give at least one function or RewardActor")
        self.names = _unique_names(rewards)
        self.weights = _checked_weights(config.weights if weights is None else weights, self.names)
        self._runners: list[_FunctionRunner | _ActorRunner] = [
            _ActorRunner(name, reward, config, sleep, jitter)
            if isinstance(reward, RewardActor)
            else _FunctionRunner(name, reward, config, sleep, jitter)
            for name, reward in zip(self.names, rewards, strict=True)
        ]

    def check_columns(self, columns: Set[str]) -> None:
        """Refuse rewards that require a column which the dataset lacks; to be called before sampling.

        Raises:
            RewardError: naming reward and columns.
        """
        for runner in self._runners:
            check_columns(runner.reward, columns)

    async def start(self) -> None:
        """Start every actor, in order. A reward that cannot start ends what had started.

        Raises:
            RewardError: naming the reward.
        """
        for actor in self._actors():
            try:
                await actor.start()
            except Exception as error:
                await self.stop()
                raise RewardError(
                    f"reward {actor.name} did not start: {type(error.__cause__ or error).__name__}: {error}"
                ) from error
            except BaseException:
                await self.stop()
                raise

    async def stop(self) -> tuple[Incident, ...]:
        """Stop every actor that was started, each with its timeout, cancelled or not; what fails is an incident."""
        faults: list[tuple[str, Fault]] = []
        with anyio.CancelScope(shield=True):
            for actor in reversed(self._actors()):
                fault = await actor.stop()
                if fault is not None:
                    faults.append((actor.name, fault))
        return tuple(_incident(name, fault, None) for name, fault in faults)

    async def __aenter__(self) -> RewardManager:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def compute_rewards(
        self,
        prompts: Sequence[PromptText],
        completions: Sequence[Any],
        *,
        completion_ids: Sequence[Sequence[int]] | None = None,
        gid: int | None = None,
        **columns: Sequence[Any],
    ) -> GroupScores:
        """Score G completions, each a text or a message list, with all rewards at once.

        Raises:
            RewardError: lists of different lengths, or a reward that breaks the convention.
        """
        arguments: dict[str, Any] = {"prompts": list(prompts), "completions": list(completions)}
        if completion_ids is not None:
            arguments["completion_ids"] = [list(ids) for ids in completion_ids]
        listed = {name: list(values) for name, values in columns.items()}
        for name, values in {**arguments, **listed}.items():
            if len(values) != len(completions):
                raise RewardError(
                    f"compute_rewards: {len(values)} {name} for {len(completions)} completions; give one for each"
                )
        return await self._score(_Batch(arguments=arguments, columns=listed, gid=gid))

    async def score_group(self, group: RolloutGroup, trainer_state: Any = None) -> GroupScores:
        """Score a group as TRL would: a conversation's completions are lists of one assistant message.

        Raises:
            RewardError: for a reward that breaks the convention.
        """
        prompt, size = group.prompt, len(group.rollouts)
        texts = [rollout.text for rollout in group.rollouts]
        is_chat = not isinstance(prompt.prompt, str)
        arguments = {
            "prompts": [prompt.prompt] * size,
            "completions": [[{"role": "assistant", "content": t}] for t in texts] if is_chat else texts,
            "completion_ids": [list(rollout.token_ids) for rollout in group.rollouts],
            "trainer_state": trainer_state,
        }
        columns = {name: [value] * size for name, value in prompt.columns.items()}
        return await self._score(_Batch(arguments=arguments, columns=columns, gid=prompt.gid))

    def _actors(self) -> list[_ActorRunner]:
        return [runner for runner in self._runners if isinstance(runner, _ActorRunner)]

    async def _score(self, batch: _Batch) -> GroupScores:
        outcomes: dict[str, _Outcome] = {}

        async def play(runner: _FunctionRunner | _ActorRunner) -> None:
            outcomes[runner.name] = _without_nonfinite(await runner.score(batch))

        try:
            async with anyio.create_task_group() as tasks:
                for runner in self._runners:
                    tasks.start_soon(play, runner)
        except BaseExceptionGroup as group:
            broken = _first_reward_error(group)
            if broken is None:
                raise
            raise broken from broken.__cause__
        return self._combine(batch, [outcomes[name] for name in self.names])

    def _combine(self, batch: _Batch, outcomes: list[_Outcome]) -> GroupScores:
        scores = {name: tuple(o.scores) for name, o in zip(self.names, outcomes, strict=True)}
        rewards: list[float | None] = []
        for sample in zip(*scores.values(), strict=True):
            present = [w * s for w, s in zip(self.weights, sample, strict=True) if s is not None]
            rewards.append(math.fsum(present) if present else None)
        return GroupScores(
            scores=scores,
            rewards=tuple(rewards),
            incidents=tuple(
                _incident(name, fault, batch.gid)
                for name, outcome in zip(self.names, outcomes, strict=True)
                for fault in outcome.faults
            ),
            metrics={name: value for o in outcomes for name, value in o.log.metrics.items()},
            extra={column: values for o in outcomes for column, values in o.log.extra.items()},
        )


class _FunctionRunner:
    """One reward function: a call a group."""

    def __init__(
        self,
        name: str,
        reward: RewardFunction,
        config: RewardsConfig,
        sleep: Sleep,
        jitter: Callable[[], float],
    ) -> None:
        check_signature(reward)
        self.name, self.reward = name, reward
        self._attempts = Attempts(timeout_s=config.timeout_s, retries=config.retries, sleep=sleep, jitter=jitter)
        self._limiter = anyio.CapacityLimiter(config.concurrency)

    async def score(self, batch: _Batch) -> _Outcome:
        arguments = {"trainer_state": None, **batch.columns, **batch.arguments}
        async with self._limiter:
            answer = await self._attempts.run(lambda: call_function(self.reward, self.name, arguments, batch.size))
        if isinstance(answer, Fault):
            return _Outcome(scores=[None] * batch.size, faults=[answer], log=RewardLog(batch.size))
        scores, log = answer
        return _Outcome(scores=scores, faults=[], log=log)


class _ActorRunner:
    """One reward actor: a call a sample."""

    def __init__(
        self,
        name: str,
        reward: RewardActor,
        config: RewardsConfig,
        sleep: Sleep,
        jitter: Callable[[], float],
    ) -> None:
        concurrency = _setting(name, "concurrency", reward.concurrency, config.concurrency, 1)
        self.name, self.reward, self._started = name, reward, False
        self._attempts = Attempts(
            timeout_s=_setting(name, "timeout_s", reward.timeout_s, config.timeout_s, None),
            retries=int(_setting(name, "retries", reward.retries, config.retries, 0)),
            sleep=sleep,
            jitter=jitter,
        )
        self._limiter = anyio.CapacityLimiter(int(concurrency))

    async def start(self) -> None:
        self._started = True
        await self.reward.start()

    async def stop(self) -> Fault | None:
        if not self._started:
            return None
        self._started = False
        once = msgspec.structs.replace(self._attempts, retries=0)
        outcome = await once.run(self.reward.stop)
        if not isinstance(outcome, Fault):
            return None
        return msgspec.structs.replace(outcome, message=f"did not stop: {outcome.message}")

    async def score(self, batch: _Batch) -> _Outcome:
        if not self._started:
            raise RewardError(
                f"reward {self.name} has not been started; use `async with` the manager, or await its start()"
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
        return _Outcome(scores=scores, faults=_summed(faults, batch.size), log=RewardLog(batch.size))

    async def _one(self, sample: RewardSample) -> float | None:
        return checked_score(await self.reward.score(sample), self.name, sample.index)


def _sample(batch: _Batch, index: int) -> RewardSample:
    arguments = batch.arguments
    return RewardSample(
        prompt=arguments["prompts"][index],
        completion=arguments["completions"][index],
        completion_ids=tuple(arguments["completion_ids"][index]) if "completion_ids" in arguments else (),
        columns={name: values[index] for name, values in batch.columns.items()},
        gid=batch.gid,
        index=index,
    )


def _summed(faults: Mapping[int, Fault], size: int) -> list[Fault]:
    """One fault a kind, for the samples that had it; its message is the first one's."""
    kinds = sorted({fault.kind for fault in faults.values()})
    summed = []
    for kind in kinds:
        samples = sorted(index for index, fault in faults.items() if fault.kind == kind)
        shown = ", ".join(map(str, samples))
        summed.append(Fault(kind, f"samples {shown} of {size}: {faults[samples[0]].message}"))
    return summed


def _without_nonfinite(outcome: _Outcome) -> _Outcome:
    bad = {i: s for i, s in enumerate(outcome.scores) if s is not None and not math.isfinite(s)}
    if not bad:
        return outcome
    shown = ", ".join(f"{score} for sample {index}" for index, score in bad.items())
    return _Outcome(
        scores=[None if index in bad else score for index, score in enumerate(outcome.scores)],
        faults=[*outcome.faults, Fault("reward_nonfinite", f"returned {shown}; scores must be finite")],
        log=outcome.log,
    )


def _incident(name: str, fault: Fault, gid: int | None) -> Incident:
    return Incident(actor="scorer", kind=fault.kind, message=f"reward {name}: {fault.message}", gid=gid)


def _first_reward_error(group: BaseExceptionGroup[BaseException]) -> RewardError | None:
    for error in group.exceptions:
        found = _first_reward_error(error) if isinstance(error, BaseExceptionGroup) else error
        if isinstance(found, RewardError):
            return found
    return None


def _unique_names(rewards: Sequence[Reward]) -> tuple[str, ...]:
    """TRL's names; of equal ones the second gets `_2`, the third `_3`, past names that are taken."""
    wanted = [reward_name(reward) for reward in rewards]
    taken = set(wanted)
    seen: Counter[str] = Counter()
    names = []
    for name in wanted:
        seen[name] += 1
        unique = name
        while seen[name] > 1 and unique in taken:
            unique = f"{name}_{seen[name]}"
            if unique in taken:
                seen[name] += 1
        taken.add(unique)
        names.append(unique)
    return tuple(names)


def _checked_weights(weights: Sequence[float] | None, names: Sequence[str]) -> tuple[float, ...]:
    if weights is None:
        return (1.0,) * len(names)
    if len(weights) != len(names):
        raise RewardError(
            f"rewards.weights has {len(weights)} numbers for {len(names)} rewards ({', '.join(names)}); give one for each"
        )
    for name, weight in zip(names, weights, strict=True):
        if not math.isfinite(weight):
            raise RewardError(f"rewards.weights: {weight} for reward {name}; give a finite number")
    return tuple(float(weight) for weight in weights)
