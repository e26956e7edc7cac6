"""RewardManager: every reward of a group at once, each call with timeout and retries, combined by weights.

A call that raises, hangs or gives NaN makes a *missing* score (None) and an incident, never a 0. Only code that
breaks the convention (wrong length, wrong type, missing column) ends the run. Knows nothing of advantages or channels.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Awaitable, Callable, Sequence, Set
from types import TracebackType
from typing import Annotated, Any

import anyio
import msgspec

from troupe.errors import RewardError
from troupe.messages import Incident, PromptText, RolloutGroup
from troupe.rewards.actor import RewardActor
from troupe.rewards.attempts import Fault, Pace, described
from troupe.rewards.functions import Reward, check_columns, reward_name
from troupe.rewards.runners import ActorRunner, Batch, FunctionRunner, Outcome
from troupe.runtime import together


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
    """Groups with fewer scored samples are quarantined, not trained: one has nothing to be compared with."""


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


class RewardManager:
    """Runs rewards. Actors among them need `start` and `stop`, or `async with`; functions need neither."""

    def __init__(
        self,
        reward_funcs: Reward | Sequence[Reward],
        weights: Sequence[float] | None = None,
        config: RewardsConfig | None = None,
        *,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
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
        pace = Pace(timeout_s=config.timeout_s, retries=config.retries, concurrency=config.concurrency)
        self._runners: list[FunctionRunner | ActorRunner] = [
            ActorRunner(name, reward, pace, sleep, jitter)
            if isinstance(reward, RewardActor)
            else FunctionRunner(name, reward, pace, sleep, jitter)
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
                    f"reward {actor.name} did not start: {described(error)}; correct what its start() needs"
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
        return await self._score(Batch(arguments=arguments, columns=listed, gid=None))

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
        return await self._score(Batch(arguments=arguments, columns=columns, gid=prompt.gid))

    def _actors(self) -> list[ActorRunner]:
        return [runner for runner in self._runners if isinstance(runner, ActorRunner)]

    async def _score(self, batch: Batch) -> GroupScores:
        outcomes: dict[str, Outcome] = {}

        async def play(runner: FunctionRunner | ActorRunner) -> None:
            outcomes[runner.name] = await runner.score(batch)

        await together([functools.partial(play, runner) for runner in self._runners])
        return self._combine(batch, [outcomes[name] for name in self.names])

    def _combine(self, batch: Batch, outcomes: list[Outcome]) -> GroupScores:
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


def _incident(name: str, fault: Fault, gid: int | None) -> Incident:
    return Incident(actor="scorer", kind=fault.kind, message=f"reward {name}: {fault.message}", gid=gid)


def _unique_names(rewards: Sequence[Reward]) -> tuple[str, ...]:
    """TRL's names; of equal ones the second gets `_2`, the third `_3`, leaving out what is taken."""
    wanted = [reward_name(reward) for reward in rewards]
    names: list[str] = []
    for name in wanted:
        candidates = itertools.chain([name], (f"{name}_{n}" for n in itertools.count(2)))
        # A suffixed name must not take one that another reward really has.
        names.append(next(c for c in candidates if c not in names and (c == name or c not in wanted)))
    return tuple(names)


def _checked_weights(weights: Sequence[float] | None, names: Sequence[str]) -> tuple[float, ...]:
    if weights is None:
        return (1.0,) * len(names)
    if len(weights) != len(names):
        raise RewardError(
            f"rewards.weights has {len(weights)} numbers for {len(names)} rewards "
            f"({', '.join(names)}); give one for each"
        )
    for name, weight in zip(names, weights, strict=True):
        if not math.isfinite(weight):
            raise RewardError(f"rewards.weights: {weight} for reward {name}; give a finite number")
    return tuple(float(weight) for weight in weights)
