"""What a reward is asked and what comes of it: batches of completions, their outcomes, and what a run is told."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from troupe.messages import Incident, RolloutGroup, Slot
from troupe.rewards.episodes import EnvironmentView, messages_of, prompt_of, view_of
from troupe.rewards.extras import RewardLog
from troupe.rewards.faults import Fault
from troupe.rewards.settings import RewardsConfig

_LARGEST = 1e18
"""Of a score's size: advantages square it in float32, which ends at 3.4e38."""


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """Which groups are decoded together: those of one step and attempt."""

    step: int
    attempt: int
    size: int
    """Groups in it."""


def round_of(group: RolloutGroup) -> Round | None:
    """None for a group that is decoded alone: in the free schedule several of a step and attempt may be."""
    size, slot = group.prompt.round_size, group.prompt.slot
    return None if size == 1 else Round(step=slot.step, attempt=slot.attempt, size=size)


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
    places: tuple[int, ...] | None = None
    """Which completions of a group these are; None: all. Those whose episodes have failed are not scored."""
    group_size: int | None = None
    """G, where these are not all."""
    views: tuple[EnvironmentView, ...] = ()
    """Where there are environments: what is known of each that is plain data."""

    @property
    def size(self) -> int:
        """Number of completions."""
        return len(self.arguments["completions"])

    @property
    def given(self) -> dict[str, Any]:
        """What a function may take."""
        return {"trainer_state": None, **self.columns, **self.arguments}

    @classmethod
    def of(
        cls, group: RolloutGroup, trainer_state: Any, *, in_run: bool, environments: Sequence[Any] | None = None
    ) -> Batch:
        """A group; in a run, it is scored with the others of its round where the reward compares them, and waits.

        `environments` (G,): where the group acted in some.
        """
        prompt, size = group.prompt, len(group.rollouts)
        texts = [rollout.text for rollout in group.rollouts]
        is_chat = not isinstance(prompt.prompt, str)
        whole = cls(
            arguments={
                "prompts": [prompt.prompt] * size,
                "completions": [[{"role": "assistant", "content": t}] for t in texts] if is_chat else texts,
                "completion_ids": [list(rollout.token_ids) for rollout in group.rollouts],
                "completion_starts": [prompt.opened] * size,
                "trainer_state": trainer_state,
            },
            columns={name: [value] * size for name, value in prompt.columns.items()},
            gid=prompt.gid,
            slot=prompt.slot if in_run else None,
            round=round_of(group) if in_run else None,
            patient=in_run,
        )
        return whole._with_episodes(group, environments) if group.episodes else whole

    def _with_episodes(self, group: RolloutGroup, environments: Sequence[Any] | None) -> Batch:
        """The same group as what was said in its episodes, as far as they are whole."""
        episodes = group.episodes
        arguments = self.arguments | {"prompts": [prompt_of(episode, group.prompt.prompt) for episode in episodes]}
        if not isinstance(group.prompt.prompt, str):
            arguments["completions"] = list(map(messages_of, episodes))
        if environments is not None:
            arguments["environments"] = list(environments)
            arguments["environment_rewards"] = [episode.reward for episode in episodes]
        views = () if environments is None else tuple(map(view_of, episodes))
        whole = msgspec.structs.replace(self, arguments=arguments, views=views)
        if not any(episode.failed for episode in episodes):
            return whole
        kept = whole.only([place for place, episode in enumerate(episodes) if not episode.failed])
        return msgspec.structs.replace(kept, group_size=len(episodes))

    def part(self, index: int) -> Batch:
        """One sample by itself."""
        return self.only([index])

    def only(self, indices: Sequence[int]) -> Batch:
        """Some of the samples."""
        return msgspec.structs.replace(
            self,
            arguments={
                name: [values[i] for i in indices] if isinstance(values, list) else values
                for name, values in self.arguments.items()
            },
            columns={name: [values[i] for i in indices] for name, values in self.columns.items()},
            places=tuple(self.place(i) for i in indices),
            views=tuple(self.views[i] for i in indices) if self.views else (),
        )

    def place(self, index: int) -> int:
        """Of a sample in its group."""
        return index if self.places is None else self.places[index]


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
        views=tuple(view for batch in batches for view in batch.views),
    )


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What one reward says about a batch."""

    scores: list[float | None]
    """(G,) finite, None where missing."""
    faults: list[Fault]
    log: RewardLog
    faulted: frozenset[int] = frozenset()
    """Completions whose score is missing through a fault, and not because the reward says None."""

    @classmethod
    def of_nothing(cls) -> Outcome:
        """Of no completions."""
        return cls(scores=[], faults=[], log=RewardLog(0))

    def of_group(self, batch: Batch) -> Outcome:
        """The same of the whole group of which the batch was scored: what is missing of the others is so through a
        fault, that of their episodes."""
        places, size = batch.places, batch.group_size
        if places is None or size is None:
            return self
        scores: list[float | None] = [None] * size
        extra: dict[str, list[Any]] = {column: [None] * size for column in self.log.extra}
        for index, place in enumerate(places):
            scores[place] = self.scores[index]
            for column, values in self.log.extra.items():
                extra[column][place] = values[index]
        log = RewardLog(size, {column: tuple(values) for column, values in extra.items()}, self.log.logged)
        faulted = frozenset(places[index] for index in self.faulted) | frozenset(range(size)) - frozenset(places)
        return Outcome(scores=scores, faults=self.faults, log=log, faulted=faulted)

    def split(self, sizes: list[int]) -> list[Outcome]:
        """The outcomes of the batches that were joined. Each has the whole batch's metrics, the first one its faults,
        told once."""
        outcomes: list[Outcome] = []
        start = 0
        for size in sizes:
            cut = slice(start, start + size)
            extra = {column: values[cut] for column, values in self.log.extra.items()}
            log = RewardLog(size, extra, self.log.logged)
            faulted = frozenset(index - start for index in self.faulted if start <= index < start + size)
            faults = [] if outcomes else self.faults
            outcomes.append(Outcome(scores=self.scores[cut], faults=faults, log=log, faulted=faulted))
            start += size
        return outcomes


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

    @classmethod
    def combined(cls, outcomes: Mapping[str, Outcome], weights: Sequence[float], gid: int | None) -> GroupScores:
        """What each reward says about a group, in one."""
        scores = {name: tuple(outcome.scores) for name, outcome in outcomes.items()}
        faulted = sorted(frozenset[int]().union(*(outcome.faulted for outcome in outcomes.values())))
        rewards: list[float | None] = []
        for index, sample in enumerate(zip(*scores.values(), strict=True)):
            present = [w * s for w, s in zip(weights, sample, strict=True) if s is not None]
            rewards.append(math.fsum(present) if present and index not in faulted else None)
        return cls(
            scores=scores,
            rewards=tuple(rewards),
            faulted=tuple(faulted),
            incidents=tuple(
                incident_of(name, fault, gid) for name, outcome in outcomes.items() for fault in outcome.faults
            ),
            metrics={name: value for outcome in outcomes.values() for name, value in outcome.log.metrics.items()},
            extra={column: values for outcome in outcomes.values() for column, values in outcome.log.extra.items()},
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
    explained = {index: Fault("reward_timeout", log.why[index]) for index in bad if index in log.why}
    faults = [*faults, *summed(explained, len(scores))]
    scores = [None if index in bad else score for index, score in enumerate(scores)]
    bad = {index: score for index, score in bad.items() if index not in explained}
    if bad:
        shown = ", ".join(f"{score} for sample {index}" for index, score in bad.items())
        faults = [*faults, Fault("reward_nonfinite", f"returned {shown}; scores must be finite, {_LARGEST:g} at most")]
    return Outcome(scores=scores, faults=faults, log=log, faulted=faulted | bad.keys() | explained.keys())


def incident_of(name: str, fault: Fault, gid: int | None) -> Incident:
    """A reward's fault at a group."""
    return Incident(actor="scorer", kind=fault.kind, message=f"reward {name}: {fault.message}", gid=gid)


class Wait(msgspec.Struct, frozen=True, kw_only=True):
    """Calls of a reward are under way, and the newest tries have all failed."""

    why: str
    """The newest fault, in a few words."""
    tries: int
    """That have failed in a row."""
    for_s: float
    """Seconds since the first of them failed."""


class RewardEvents:
    """Passes what happens to rewards on to one listener."""

    def __init__(self, config: RewardsConfig) -> None:
        self._config = config
        self._listener: Callable[[Incident], None] | None = None
        self._untold: list[Incident] = []
        """Of rewards that were moved while nobody listened."""

    def listen(self, listener: Callable[[Incident], None] | None) -> None:
        """Have a listener called with each incident at once; it must not raise."""
        self._listener = listener
        while listener is not None and self._untold:
            listener(self._untold.pop(0))

    def breaker_changed(self, name: str, why: str | None, down_s: float) -> None:
        """A reward is down, and why; or with None, it is back after so many seconds."""
        if why is None:
            self._tell("reward_back", f"reward {name} answers again after {down_s:.1f} s; its calls go on")
            return
        failures, longest_s = self._config.breaker_failures, self._config.breaker_max_wait_s
        self._tell(
            "reward_down",
            f"reward {name} is down, {failures} calls in a row have failed: {why}; its calls wait, no step is "
            f"begun, and it is tried again at least every {longest_s:g} s; to have another in its place: "
            f"troupe set OUT_DIR rewards.{name}=FILE.py:NAME",
        )

    def machines_changed(self, name: str, why: str | None) -> None:
        """No machine that could run a reward is there, and why; or with None, one is."""
        if why is None:
            self._tell("reward_back", f"reward {name} has a worker; its calls go on")
        else:
            self._tell("waiting_for_workers", f"reward {name} waits, and no step is begun: {why}")

    def moved(self, name: str, why: str) -> None:
        """A function runs in processes from now on."""
        self._tell(
            "reward_moved",
            f"reward {name} now runs in processes of its own, {self._config.processes} at a time (rewards.processes): "
            f"{why}; what it kept in variables begins anew there; rewards.run has it there from the start",
            keep=True,
        )

    def exchanged(self, name: str, was_down: bool) -> None:
        """Another version scores from now on."""
        self._tell("reward_exchanged", f"reward {name} was exchanged")
        if was_down:
            self._tell("reward_back", f"reward {name} is no longer waited for")

    def _tell(self, kind: str, message: str, *, keep: bool = False) -> None:
        incident = Incident(actor="scorer", kind=kind, message=message)
        if self._listener is not None:
            self._listener(incident)
        elif keep:
            self._untold.append(incident)
