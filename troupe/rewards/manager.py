"""RewardManager: every reward of a group at once, each call with timeout and retries, combined by weights.

A call that raises, hangs or gives NaN makes a *missing* score (None) and an incident, never a 0: its completion then
has no reward, whatever other functions say, while one for which a function answers None has that of the others. Only
code that breaks the convention (wrong length, wrong type, missing column), or has never worked and cannot, ends the
run. A reward of which one call after the other fails is *down*: its calls then wait (`calling.py`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence, Set
from functools import partial
from types import TracebackType
from typing import Any

import anyio

from troupe.errors import RewardError
from troupe.messages import Incident, PromptText, RolloutGroup
from troupe.rewards.convention import OF_ENVIRONMENTS, Reward
from troupe.rewards.episodes import environments_of
from troupe.rewards.exchange import NamedReward, RewardVersion
from troupe.rewards.faults import in_short
from troupe.rewards.loading import load_reward
from troupe.rewards.making import RunnerMaker
from troupe.rewards.outcomes import Batch, GroupScores, Outcome, RewardEvents, Wait, incident_of, joined, round_of
from troupe.rewards.settings import RewardsConfig, checked_run, checked_weights, unique_names
from troupe.rewards.watching import begins, ends
from troupe.runtime.elsewhere import Elsewhere
from troupe.runtime.isolation import THREADS
from troupe.runtime.reporter import Reporter
from troupe.runtime.roles import together


class RewardManager:
    """Runs rewards. Actors and functions in processes need `start` and `stop`, or `async with`; others need neither."""

    def __init__(
        self,
        reward_funcs: Reward | str | Sequence[Reward | str],
        weights: Sequence[float] | None = None,
        config: RewardsConfig | None = None,
        *,
        environments: Callable[[int], Sequence[Any] | None] | None = None,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
        jitter: Callable[[], float] = random.random,
        look_s: float = 60.0,
        elsewhere: Elsewhere | None = None,
        needed: bool = True,
    ) -> None:
        """A text is loaded by `load_reward`. `weights` default to the config's, those to each reward's attribute
        `weight`, that to 1. `environments`: gid → the (G,) environments of a group, None for those that are not here;
        to be given where there are any. `sleep` and `jitter` pace the retries. `look_s`: that the code of a reward may
        take to load before it is said that it cannot be exchanged for another. `elsewhere`: where other machines are
        that may run rewards. `needed`: there must be one.

        Raises:
            RewardError: no reward, one that cannot be called as a reward, or weights of another length.
        """
        self._config = RewardsConfig() if config is None else config
        self._environments = environments
        self._look_s = look_s
        given = (
            [reward_funcs] if isinstance(reward_funcs, str) or not isinstance(reward_funcs, Sequence) else reward_funcs
        )
        if not given and needed:
            raise RewardError("there is no reward; give at least one function or RewardActor")
        rewards = [load_reward(reward) if isinstance(reward, str) else reward for reward in given]
        self.names = unique_names(rewards)
        self.weights = checked_weights(self._config.weights if weights is None else weights, self.names, rewards)
        self._events = RewardEvents(self._config)
        runs = checked_run(self._config.run, self.names, rewards)
        makers = RunnerMaker(self._config, self._events, sleep, jitter, elsewhere)
        self._named = {
            name: NamedReward(name, reward, text if isinstance(text, str) else None, partial(makers.runner, name, run))
            for name, reward, text, run in zip(self.names, rewards, given, runs, strict=True)
        }
        self.starting: str | None = None
        """The reward whose start is waited for now."""

    @property
    def down(self) -> Mapping[str, str]:
        """Rewards that are down, by name: why."""
        whys = {name: reward.now.runner.caller.down for name, reward in self._named.items()}
        return {name: why for name, why in whys.items() if why is not None}

    @property
    def waits(self) -> dict[str, Wait]:
        """Rewards that are waited for because what was tried has failed, by name."""
        now_s, found = time.perf_counter(), {}
        for name, reward in self._named.items():
            tries = reward.now.runner.caller.tries
            if reward.now.calls and tries.failed:
                found[name] = Wait(why=in_short(tries.why), tries=tries.failed, for_s=now_s - tries.since_s)
        return found

    @property
    def rewards(self) -> tuple[Reward, ...]:
        """The versions that score now, in the order of `names`."""
        return tuple(reward.now.runner.reward for reward in self._named.values())

    @property
    def versions(self) -> Mapping[str, int]:
        """Reward → how often it was exchanged."""
        return {name: reward.now.number for name, reward in self._named.items()}

    def standing(self, step: int) -> dict[str, tuple[int, str | None]]:
        """Reward → how often it was exchanged up to a step, and the text that names the version then (None where that
        was given in Python)."""
        return {name: reward.standing(step) for name, reward in self._named.items()}

    def reinstate(self, name: str, spec: str, version: int) -> None:
        """Go on with a reward that was exchanged in an earlier start. Only before `start`.

        Raises:
            RewardError: where it cannot be used any more.
        """
        self._named[name].reinstate(spec, version)

    @property
    def compares_groups(self) -> bool:
        """Whether a reward is called once for all groups of a round."""
        return any(reward.scope == "batch" for reward in self._named.values())

    @property
    def has_open_rounds(self) -> bool:
        """Whether there is a round of which not all groups are settled."""
        return any(version.rounds.open for version in self._versions())

    def _versions(self) -> list[RewardVersion]:
        return [version for reward in self._named.values() for version in (*reward.before, reward.now)]

    def listen(self, listener: Callable[[Incident], None] | None) -> None:
        """Have one listener called at once, with an incident, whenever `down` changes; it must not raise."""
        self._events.listen(listener)

    def trust(self) -> None:
        """Take it that the rewards have worked before: one whose code fails is then waited for, as a service is."""
        for reward in self._named.values():
            reward.now.runner.caller.proven = True

    def check_columns(self, columns: Set[str]) -> None:
        """Refuse rewards that require a column which the dataset lacks; to be called before sampling.

        Raises:
            RewardError: naming reward and columns.
        """
        provided = frozenset() if self._environments is None else OF_ENVIRONMENTS
        for reward in self._named.values():
            reward.check_columns(provided | columns)

    async def start(self) -> None:
        """Start every reward, in order. One that cannot start ends what had started.

        Raises:
            RewardError: naming the reward.
        """
        for reward in self._named.values():
            reward.is_started = True
        begins(self)
        try:
            for name, reward in self._named.items():
                self.starting = name
                await reward.now.runner.start()
            self.starting = None
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> tuple[Incident, ...]:
        """Stop every reward that was started, each with its timeout, cancelled or not; what fails is an incident."""
        incidents: list[Incident] = []
        with anyio.CancelScope(shield=True):
            for name, reward in reversed(self._named.items()):
                incidents += [incident_of(name, fault, None) for fault in await reward.stop()]
        THREADS.end_idle()
        ends(self)
        return tuple(incidents)

    async def __aenter__(self) -> RewardManager:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def exchange(self, name: str, reward: Reward | str) -> tuple[Incident, ...]:
        """Put another reward in the place of one, under its name and with its weight, while groups are being scored.

        The new one is checked and started first; where that fails the old one stays. Groups that come afterwards are
        scored by the new one, those under way by the old one, which is stopped when its last group is done; of that
        tell the incidents. Only calls that wait because the old one is down are made by the new one, so that a group is
        never scored by both. Returns when the old one has stopped.

        Raises:
            RewardError: for a name that is not there, a reward that cannot be used or started, or one of another scope.
        """
        return await self.stop_replaced(name, await self.replace(name, reward))

    async def examine(self, name: str, spec: str) -> None:
        """See whether a reward that a text names could take the place of one, without starting it.

        Raises:
            RewardError: as `exchange`, but for what would show at the start only.
        """
        await self._existing(name).examine(spec, min(self._look_s, self._config.start_timeout_s))

    async def replace(
        self, name: str, reward: Reward | str, first_step: Callable[[bool], int] = lambda was_down: 0
    ) -> RewardVersion:
        """The first half of `exchange`, with `first_step` as `NamedReward.replace` has it → what is to be stopped."""
        old, was_down = await self._existing(name).replace(reward, first_step)
        self._events.exchanged(name, was_down)
        return old

    async def stop_replaced(self, name: str, old: RewardVersion) -> tuple[Incident, ...]:
        """The second half of `exchange`: stop what was replaced when nothing is under way with it."""
        fault = await self._named[name].stop_replaced(old)
        return () if fault is None else (incident_of(name, fault, None),)

    def _existing(self, name: str) -> NamedReward:
        if name not in self._named:
            raise RewardError(f"there is no reward {name!r} to be exchanged; there are: {', '.join(self.names)}")
        return self._named[name]

    async def compute_rewards(
        self,
        prompts: Sequence[PromptText],
        completions: Sequence[Any],
        *,
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Sequence[Any],
    ) -> GroupScores:
        """Score completions, each a text or a message list, with all rewards at once, each in one call.

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
        return await self._score(Batch(arguments=arguments, columns=listed), Reporter("scorer"))

    def score_group(
        self, group: RolloutGroup, trainer_state: Any = None, report: Reporter | None = None
    ) -> Coroutine[Any, Any, GroupScores]:
        """Score a group of a run as TRL would: a conversation's completions are lists of messages. Completions whose
        episodes have failed are not scored; all their scores are missing.

        Calls of a reward that is down wait. A reward of scope "batch" is called when all groups of the round are here,
        so they must be scored at the same time, and `settled` be called for each afterwards. `report` gets a span of
        each reward.

        Raises:
            RewardError: for a reward that breaks the convention, or one that has not worked once and whose code is at
                fault when it would be taken to be down.
        """
        return self._score(self._batch(group, trainer_state, in_run=True), report or Reporter("scorer"))

    async def score_groups(
        self,
        groups: Sequence[RolloutGroup],
        trainer_state: Any = None,
        tell: Callable[[Incident], None] | None = None,
    ) -> list[GroupScores]:
        """Score groups outside of a run, all at once as far as each reward allows; those of scope "batch" get them in
        one call. A reward that is down makes missing scores. `tell` gets each incident when it is known, and not only
        when all groups are scored.

        Raises:
            RewardError: for a reward that breaks the convention.
        """
        batches = [self._batch(group, trainer_state, in_run=False) for group in groups]
        outcomes: dict[str, list[Outcome | None]] = {name: [None] * len(batches) for name in self.names}
        silent = Reporter("scorer")

        async def score(name: str, batch: Batch, places: slice) -> None:
            outcome = await self._named[name].score(batch, silent)
            for fault in outcome.faults:
                if tell is not None:
                    tell(incident_of(name, fault, batch.gid))
            outcomes[name][places] = outcome.split([each.size for each in batches[places]])

        calls = []
        for name, reward in self._named.items() if batches else ():
            if reward.scope == "batch":
                calls.append(partial(score, name, joined(batches), slice(None)))
            else:
                calls += [partial(score, name, each, slice(place, place + 1)) for place, each in enumerate(batches)]
        await together(calls)
        return [self._combined(batch, parts) for batch, *parts in zip(batches, *outcomes.values(), strict=True)]

    def settled(self, group: RolloutGroup) -> None:
        """The group was sent on with its scores and will not be scored again."""
        key = round_of(group)
        if key is not None:
            for version in self._versions():
                version.settled(key, group.prompt.gid)

    def _batch(self, group: RolloutGroup, trainer_state: Any, *, in_run: bool) -> Batch:
        environments = None
        if self._environments is not None and group.episodes:
            environments = environments_of(group, self._environments(group.prompt.gid))
        return Batch.of(group, trainer_state, in_run=in_run, environments=environments)

    async def _score(self, batch: Batch, report: Reporter) -> GroupScores:
        first, *others = self._named.values()
        if not others:  # a task group costs as much as all the rest
            return self._combined(batch, [await first.score(batch, report)])
        outcomes: dict[str, Outcome] = {}

        async def score(reward: NamedReward) -> None:
            outcomes[reward.name] = await reward.score(batch, report)

        await together([partial(score, reward) for reward in (first, *others)])
        return self._combined(batch, [outcomes[name] for name in self.names])

    def _combined(self, batch: Batch, outcomes: Sequence[Outcome]) -> GroupScores:
        of_all = [outcome.of_group(batch) for outcome in outcomes]
        return GroupScores.combined(dict(zip(self.names, of_all, strict=True)), self.weights, batch.gid)
