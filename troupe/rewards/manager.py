"""RewardManager: every reward of a group at once, each call with timeout and retries, combined by weights.

A call that raises, hangs or gives NaN makes a *missing* score (None) and an incident, never a 0: its completion then
has no reward, whatever other functions say, while one for which a function answers None has that of the others. Only
code that breaks the convention (wrong length, wrong type, missing column), or has never worked and cannot, ends the
run. A reward of which one call after the other fails is *down*: its calls then wait (`breaker.py`). Knows nothing of
advantages or channels.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from functools import partial
from types import TracebackType
from typing import Any

import anyio
import msgspec

from troupe.errors import RewardError
from troupe.messages import Incident, PromptText, RolloutGroup
from troupe.rewards.actor import RewardActor
from troupe.rewards.attempts import Attempts, Fault, Pace, in_short
from troupe.rewards.calling import Breaker, BreakerLimits, Exchanged
from troupe.rewards.convention import Reward
from troupe.rewards.exchange import Seat, Sitting
from troupe.rewards.function_runner import MovableRunner
from troupe.rewards.isolation import end_idle_threads
from troupe.rewards.loading import is_code, load_beside, load_reward
from troupe.rewards.processes.runner import ProcessRunner, look_at, process_spec
from troupe.rewards.runners import (
    ActorRunner,
    Batch,
    Outcome,
    Round,
    Runner,
    joined,
    own_pace,
)
from troupe.rewards.settings import RewardsConfig, Run, checked_run, checked_weights, unique_names
from troupe.rewards.watching import begins, ends
from troupe.runtime.reporter import Reporter
from troupe.runtime.roles import together

_LOOK_S = 60.0
"""That the code of a reward may take to load before it is said that it cannot be exchanged for another."""


class GroupScores(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the rewards say about G completions."""

    scores: dict[str, tuple[float | None, ...]]
    """Reward name → (G,) finite scores, None where missing."""
    rewards: tuple[float | None, ...]
    """(G,) Σ weight·score over the scores that are there; None where none is, or one is missing through a fault."""
    incidents: tuple[Incident, ...]
    """Why scores are missing, of kinds reward_timeout, reward_error and reward_nonfinite; and what of that which
    functions logged could not be kept, reward_log."""
    faulted: tuple[int, ...] = ()
    """Samples of which some score is missing through a fault."""
    metrics: dict[str, float] = {}
    """What functions logged by `log_metric`, the mean of each name."""
    extra: dict[str, tuple[Any, ...]] = {}
    """What functions logged by `log_extra`: column → (G,) values."""


class Wait(msgspec.Struct, frozen=True, kw_only=True):
    """Calls of a reward are under way, and the newest tries have all failed."""

    why: str
    """The newest fault, in a few words."""
    tries: int
    """That have failed in a row."""
    for_s: float
    """Seconds since the first of them failed."""


class RewardManager:
    """Runs rewards. Actors and functions in processes need `start` and `stop`, or `async with`; others need neither."""

    def __init__(
        self,
        reward_funcs: Reward | str | Sequence[Reward | str],
        weights: Sequence[float] | None = None,
        config: RewardsConfig | None = None,
        *,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """A text is loaded by `load_reward`. `weights` default to the config's, those to each reward's attribute
        `weight`, that to 1. `sleep` and `jitter` pace the retries.

        Raises:
            RewardError: no reward, one that cannot be called as a reward, or weights of another length.
        """
        self._config = RewardsConfig() if config is None else config
        self._sleep, self._jitter = sleep, jitter
        given = (
            [reward_funcs] if isinstance(reward_funcs, str) or not isinstance(reward_funcs, Sequence) else reward_funcs
        )
        if not given:
            raise RewardError("there is no reward; give at least one function or RewardActor")
        rewards = [load_reward(reward) if isinstance(reward, str) else reward for reward in given]
        self.names = unique_names(rewards)
        self.weights = checked_weights(self._config.weights if weights is None else weights, self.names, rewards)
        run = checked_run(self._config.run, self.names, rewards)
        specs = [reward if isinstance(reward, str) else None for reward in given]
        self._run: dict[str, Run] = dict(zip(self.names, run, strict=True))
        self._seats = {
            name: Seat(self._runner(name, reward, spec), spec)
            for name, reward, spec in zip(self.names, rewards, specs, strict=True)
        }
        self._columns: frozenset[str] | None = None
        self.starting: str | None = None
        """The reward whose start is waited for now."""
        self._started = False
        self._listener: Callable[[Incident], None] | None = None
        self._untold: list[Incident] = []
        """Of rewards that were moved while nobody listened."""
        self._moved = anyio.Event()

    @property
    def down(self) -> Mapping[str, str]:
        """Rewards that are down, by name: why."""
        breakers = {name: seat.now.runner.breaker for name, seat in self._seats.items()}
        return {name: breaker.why for name, breaker in breakers.items() if breaker.why is not None}

    @property
    def waits(self) -> dict[str, Wait]:
        """Rewards that are waited for because what was tried has failed, by name."""
        now_s, found = time.perf_counter(), {}
        for name, seat in self._seats.items():
            tries = seat.now.runner.tries
            if seat.now.calls and tries.failed:
                found[name] = Wait(why=in_short(tries.why), tries=tries.failed, for_s=now_s - tries.since_s)
        return found

    @property
    def rewards(self) -> tuple[Reward, ...]:
        """Those that have the places now, in the order of `names`."""
        return tuple(seat.now.runner.reward for seat in self._seats.values())

    @property
    def versions(self) -> Mapping[str, int]:
        """Reward → how often it was exchanged."""
        return {name: seat.now.version for name, seat in self._seats.items()}

    def standing(self, step: int) -> dict[str, tuple[int, str | None]]:
        """Reward → how often it was exchanged up to a step, and the text that names who has its place then (None where
        that was given in Python)."""
        return {name: seat.standing(step) for name, seat in self._seats.items()}

    def reinstate(self, name: str, spec: str, version: int) -> None:
        """Put a reward that was exchanged in an earlier start into its place again. Only before `start`.

        Raises:
            RewardError: where it cannot be used any more.
        """
        seat = self._seats[name]
        runner = self._checked(seat, self._runner(name, load_reward(spec), spec))
        seat.take(Sitting(runner, spec, version=version))

    @property
    def compares_groups(self) -> bool:
        """Whether a reward is called once for all groups of a round."""
        return any(seat.scope == "batch" for seat in self._seats.values())

    async def changed(self) -> None:
        """Wait until a reward goes down, is back or is exchanged."""
        await self._moved.wait()

    def listen(self, listener: Callable[[Incident], None] | None) -> None:
        """Have one listener called at once, with an incident, whenever `down` changes; it must not raise."""
        self._listener = listener
        while listener is not None and self._untold:
            listener(self._untold.pop(0))

    def trust(self) -> None:
        """Take it that the rewards have worked before: one whose code fails is then waited for, as a service is."""
        for seat in self._seats.values():
            seat.now.runner.breaker.proven = True

    def check_columns(self, columns: Set[str]) -> None:
        """Refuse rewards that require a column which the dataset lacks; to be called before sampling.

        Raises:
            RewardError: naming reward and columns.
        """
        self._columns = frozenset(columns)
        for seat in self._seats.values():
            seat.now.runner.check_columns(self._columns)

    async def start(self) -> None:
        """Start every reward, in order. One that cannot start ends what had started.

        Raises:
            RewardError: naming the reward.
        """
        self._started = True
        begins(self)
        try:
            for seat in self._seats.values():
                self.starting = seat.name
                await seat.now.runner.start()
            self.starting = None
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> tuple[Incident, ...]:
        """Stop every reward that was started, each with its timeout, cancelled or not; what fails is an incident."""
        self._started = False
        incidents: list[Incident] = []
        with anyio.CancelScope(shield=True):
            for seat in reversed(self._seats.values()):
                for sitting in [*seat.before, seat.now]:
                    incidents += await self._stop(sitting)
                seat.before.clear()
        end_idle_threads()
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
        return await self.dismiss(name, await self.replace(name, reward))

    async def examine(self, name: str, spec: str) -> None:
        """See whether a reward that a text names could take the place of one. Its file is loaded in a process first,
        where it may hang or end; it is not started.

        Raises:
            RewardError: as `exchange`, but for what would show at the start only.
        """
        seat = self._seat(name)
        if is_code(spec):
            await look_at(spec, name, min(_LOOK_S, self._config.start_timeout_s))
        self._checked(seat, self._runner(name, await load_beside(spec), spec))

    def _seat(self, name: str) -> Seat:
        if name not in self._seats:
            raise RewardError(f"there is no reward {name!r} to be exchanged; there are: {', '.join(self.names)}")
        return self._seats[name]

    async def replace(
        self, name: str, reward: Reward | str, first_step: Callable[[bool], int] = lambda was_down: 0
    ) -> Sitting:
        """The first half of `exchange`: returns who is to be dismissed.

        `first_step(was_down)` is called when the new one is ready, with whether the old one is down, and says which
        step's groups are the first that the new one scores; it may raise, and then the old one stays.
        """
        seat = self._seat(name)
        async with seat.changing:
            spec = reward if isinstance(reward, str) else None
            runner = await self._successor(seat, reward)
            old = seat.now
            was_down = old.runner.breaker.why is not None
            try:
                step = first_step(was_down)
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await runner.stop()
                raise
            seat.take(Sitting(runner, spec, version=old.version + 1, first_step=step))
            seat.before.append(old)
        old.runner.breaker.retire()
        self._tell(Incident(actor="scorer", kind="reward_exchanged", message=f"reward {name} was exchanged"))
        if was_down:
            self._tell(Incident(actor="scorer", kind="reward_back", message=f"reward {name} is no longer waited for"))
        return old

    async def dismiss(self, name: str, old: Sitting) -> tuple[Incident, ...]:
        """The second half of `exchange`: stop who was replaced when nothing is under way with it."""
        seat = self._seats[name]
        await old.done()
        incidents: list[Incident] = []
        with anyio.CancelScope(shield=True):
            if old in seat.before:  # otherwise the manager was stopped meanwhile
                seat.before.remove(old)
                incidents = await self._stop(old)
        return tuple(incidents)

    async def _successor(self, seat: Seat, reward: Reward | str) -> Runner:
        """Another runner for the seat, checked and started."""
        spec = reward if isinstance(reward, str) else None
        loaded = await load_beside(reward) if isinstance(reward, str) else reward
        runner = self._checked(seat, self._runner(seat.name, loaded, spec))
        if isinstance(runner, ActorRunner):
            runner.watch.refuses_forks = True
        if self._started:
            try:
                await runner.start()
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await runner.stop()
                raise
        return runner

    def _checked(self, seat: Seat, runner: Runner) -> Runner:
        """The runner, if it can have the seat."""
        if runner.scope != seat.scope:
            raise RewardError(
                f"reward {seat.name} is called once a {seat.scope}, and its replacement would be once a "
                f"{runner.scope}; start a run of its own for that"
            )
        if self._columns is not None:
            runner.check_columns(self._columns)
        return runner

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

    async def score_group(
        self, group: RolloutGroup, trainer_state: Any = None, report: Reporter | None = None
    ) -> GroupScores:
        """Score a group of a run as TRL would: a conversation's completions are lists of one assistant message.

        Calls of a reward that is down wait. A reward of scope "batch" is called when all groups of the round are here,
        so they must be scored at the same time, and `settled` be told of each afterwards. `report` gets a span of each
        reward.

        Raises:
            RewardError: for a reward that breaks the convention, or one that has not worked once and whose code is at
                fault when it would be taken to be down.
        """
        return await self._score(_batch(group, trainer_state, in_run=True), report or Reporter("scorer"))

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
        batches = [_batch(group, trainer_state, in_run=False) for group in groups]
        outcomes: dict[tuple[str, int], Outcome] = {}
        silent = Reporter("scorer")

        listener = tell or (lambda incident: None)

        def note(seat: Seat, outcome: Outcome, gid: int | None) -> None:
            for fault in outcome.faults:
                listener(_incident(seat.name, fault, gid))

        async def one(seat: Seat, place: int) -> None:
            outcomes[seat.name, place] = outcome = await seat.now.score(batches[place], silent)
            note(seat, outcome, batches[place].gid)

        async def whole(seat: Seat) -> None:
            outcome = await seat.now.score(joined(batches), silent)
            note(seat, outcome, None)
            for place, part in enumerate(outcome.split([batch.size for batch in batches])):
                outcomes[seat.name, place] = part

        works: list[Callable[[], Any]] = []
        for seat in self._seats.values() if batches else ():
            by_group = [partial(one, seat, place) for place in range(len(batches))]
            works += [partial(whole, seat)] if seat.scope == "batch" else by_group
        await together(works)
        return [
            self._combine(batch, [outcomes[name, place] for name in self.names]) for place, batch in enumerate(batches)
        ]

    def settled(self, group: RolloutGroup) -> None:
        """The group was sent on with its scores and will not be scored again."""
        key = _round(group)
        if key is None:
            return
        for seat in self._seats.values():
            for sitting in (*seat.before, seat.now):
                if sitting.rounds is not None:
                    sitting.rounds.settled(key, group.prompt.gid)
                    sitting.tell()

    async def _score(self, batch: Batch, report: Reporter) -> GroupScores:
        outcomes: dict[str, Outcome] = {}
        step = None if batch.slot is None else batch.slot.step

        async def play(seat: Seat) -> None:
            with report.span(f"score {seat.name}", step=step, gid=batch.gid):
                while True:
                    try:
                        outcomes[seat.name] = await seat.sitting_for(batch.round, step).score(batch, report)
                    except Exchanged:
                        continue
                    return

        first, *others = self._seats.values()
        if others:
            await together([partial(play, seat) for seat in (first, *others)])
        else:
            await play(first)  # a task group costs as much as all the rest
        return self._combine(batch, [outcomes[name] for name in self.names])

    def _combine(self, batch: Batch, outcomes: list[Outcome]) -> GroupScores:
        scores = {name: tuple(o.scores) for name, o in zip(self.names, outcomes, strict=True)}
        faulted = sorted(frozenset[int]().union(*(outcome.faulted for outcome in outcomes)))
        rewards: list[float | None] = []
        for index, sample in enumerate(zip(*scores.values(), strict=True)):
            present = [w * s for w, s in zip(self.weights, sample, strict=True) if s is not None]
            rewards.append(math.fsum(present) if present and index not in faulted else None)
        return GroupScores(
            scores=scores,
            rewards=tuple(rewards),
            faulted=tuple(faulted),
            incidents=tuple(
                _incident(name, fault, batch.gid)
                for name, outcome in zip(self.names, outcomes, strict=True)
                for fault in outcome.faults
            ),
            metrics={name: value for o in outcomes for name, value in o.log.metrics.items()},
            extra={column: values for o in outcomes for column, values in o.log.extra.items()},
        )

    def _runner(self, name: str, reward: Reward, spec: str | None) -> Runner:
        config = self._config
        section = Pace(timeout_s=config.timeout_s, retries=config.retries, concurrency=config.concurrency)
        attempts = Attempts(pace=own_pace(reward, name, section), sleep=self._sleep, jitter=self._jitter)
        limits = BreakerLimits(failures=config.breaker_failures, max_wait_s=config.breaker_max_wait_s)
        fuse = partial(Breaker, limits, changed=partial(self._breaker_moved, name), jitter=self._jitter)
        if self._run[name] == "process":
            spec = process_spec(reward, spec)
            assert not isinstance(reward, RewardActor)
            return ProcessRunner(
                name, reward, attempts, fuse, config.start_timeout_s, spec=spec, processes=config.processes
            )
        if isinstance(reward, RewardActor):
            return ActorRunner(name, reward, attempts, fuse, config.start_timeout_s)

        def elsewhere(breaker: Breaker) -> Runner:
            named = process_spec(reward, spec, "do without what has it moved")
            return ProcessRunner(
                *(name, reward, attempts, lambda _: breaker, config.start_timeout_s),
                spec=named,
                processes=config.processes,
            )

        return MovableRunner(
            *(name, reward, attempts, fuse, config.start_timeout_s),
            elsewhere=elsewhere,
            moved=partial(self._reward_moved, name),
        )

    async def _stop(self, sitting: Sitting) -> list[Incident]:
        fault = await sitting.runner.stop()
        return [] if fault is None else [_incident(sitting.runner.name, fault, None)]

    def _breaker_moved(self, name: str, why: str | None, down_s: float) -> None:
        if why is None:
            self._tell(_event("reward_back", f"reward {name} answers again after {down_s:.1f} s; its calls go on"))
            return
        failures, longest_s = self._config.breaker_failures, self._config.breaker_max_wait_s
        self._tell(
            _event(
                "reward_down",
                f"reward {name} is down, {failures} calls in a row have failed: {why}; its calls wait, no step is "
                f"begun, and it is tried again at least every {longest_s:g} s; to have another in its place: "
                f"troupe set OUT_DIR rewards.{name}=FILE.py:NAME",
            )
        )

    def _reward_moved(self, name: str, why: str) -> None:
        incident = _event(
            "reward_moved",
            f"reward {name} now runs in processes of its own, {self._config.processes} at a time (rewards.processes): "
            f"{why}; what it kept in variables begins anew there; rewards.run has it there from the start",
        )
        if self._listener is None:
            self._untold.append(incident)
        else:
            self._tell(incident)

    def _tell(self, incident: Incident) -> None:
        self._moved.set()
        self._moved = anyio.Event()
        if self._listener is not None:
            self._listener(incident)


def _batch(group: RolloutGroup, trainer_state: Any, *, in_run: bool) -> Batch:
    prompt, size = group.prompt, len(group.rollouts)
    texts = [rollout.text for rollout in group.rollouts]
    is_chat = not isinstance(prompt.prompt, str)
    return Batch(
        arguments={
            "prompts": [prompt.prompt] * size,
            "completions": [[{"role": "assistant", "content": t}] for t in texts] if is_chat else texts,
            "completion_ids": [list(rollout.token_ids) for rollout in group.rollouts],
            "completion_starts": [prompt.opened] * size,
            "trainer_state": trainer_state,
        },
        columns={name: [value] * size for name, value in prompt.columns.items()},
        gid=prompt.gid,
        slot=prompt.slot,
        round=_round(group) if in_run else None,
        patient=in_run,
    )


def _round(group: RolloutGroup) -> Round | None:
    """None for a group that is decoded alone: in the free schedule several of a step and attempt may be."""
    prompt = group.prompt
    if prompt.round_size == 1:
        return None
    return Round(step=prompt.slot.step, attempt=prompt.slot.attempt, size=prompt.round_size)


def _event(kind: str, message: str) -> Incident:
    return Incident(actor="scorer", kind=kind, message=message)


def _incident(name: str, fault: Fault, gid: int | None) -> Incident:
    return Incident(actor="scorer", kind=fault.kind, message=f"reward {name}: {fault.message}", gid=gid)
