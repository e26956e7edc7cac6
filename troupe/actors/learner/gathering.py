"""Which groups make a step, which are sampled anew, and how each ends: the bookkeeping of both schedules.

Decisions follow from slots, scores and versions alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import NamedTuple

import msgspec

from troupe.actors.learner.rollouts import num_sampled, sampled_versions
from troupe.actors.schedule import OnStale, ScheduleConfig
from troupe.messages import ClosedState, Past, Replace, ScoredGroup, Slot, Unfinished


class StepGroups(NamedTuple):
    """All groups that end with a learner batch."""

    groups: tuple[ScoredGroup, ...]
    """By slot."""
    states: dict[int, ClosedState]
    """How each ends, by gid."""
    replaced: frozenset[int]
    """The gids whose credit another group has taken over."""
    oldest: int
    """Tokens of versions before this one are stale."""
    drops_stale: bool
    """Whether those are left out of the loss."""

    def ending(self, *states: ClosedState) -> list[ScoredGroup]:
        """The groups that end in one of these states, by slot."""
        return [group for group in self.groups if self.states[gid_of(group)] in states]


class Gathering(ABC):
    """Groups on their way into steps."""

    def __init__(self, batch_size: int, min_scored: int, resampling: int, max_staleness: int) -> None:
        """Steps of `batch_size` groups, in each of which `min_scored` completions must have a score; a group without
        signal is replaced `resampling` times."""
        self._batch_size = batch_size
        self._min_scored = min_scored
        self._resampling = resampling
        self._max_staleness = max_staleness

    @abstractmethod
    def add(self, group: ScoredGroup) -> Sequence[ScoredGroup]:
        """Take a group in → the groups, in order, that are to be examined now."""

    @abstractmethod
    def examine(self, groups: Sequence[ScoredGroup], without_signal: Collection[int], version: int) -> Replace | None:
        """Decide on what `add` gave; `without_signal`: gids of those that nothing can be learned from; `version`: the
        newest one. Gives the groups to be sampled anew."""

    @abstractmethod
    def is_ready(self, version: int) -> bool:
        """Whether the step that makes `version` + 1 can begin."""

    def take_step(self, version: int) -> StepGroups | None:
        """That step, if it is ready."""
        return self._make_step(version) if self.is_ready(version) else None

    @abstractmethod
    def _make_step(self, version: int) -> StepGroups:
        """That step, which is ready."""

    @abstractmethod
    def unfinished(self) -> Unfinished:
        """What is collected, for a checkpoint."""


def gathering_for(
    schedule: ScheduleConfig,
    *,
    batch_size: int,
    min_scored: int,
    resampling: int,
    unfinished: Unfinished | None = None,
    supervised: int = 0,
) -> Gathering:
    """The bookkeeping of a schedule, for steps of `batch_size` groups.

    `min_scored`: completions that must have a score; `resampling`: how often a group without signal is replaced.
    `unfinished`: what was collected when the checkpoint was written that the run goes on from. A pinned run is given
    these groups once more and decides anew. `supervised`: steps at the beginning whose groups are given.
    """
    if schedule.mode == "pinned":
        return PinnedGathering(batch_size, min_scored, resampling, schedule.max_staleness)
    free = FreeGathering(batch_size, min_scored, resampling, schedule.max_staleness, schedule.on_stale)
    if unfinished is not None:
        free.go_on(unfinished)
    if not supervised:
        return free
    return GivenFirst(supervised, PinnedGathering(batch_size, min_scored, 0, schedule.max_staleness), free)


class PinnedGathering(Gathering):
    """Steps in order, each of the groups of its own slots.

    Groups without signal are replaced together, when all groups of their round are here, so that neither what a step
    is made of nor what a round of replacements holds depends on the order in which scores come in.
    """

    def __init__(self, batch_size: int, min_scored: int, resampling: int, max_staleness: int) -> None:
        super().__init__(batch_size, min_scored, resampling, max_staleness)
        self._steps: dict[int, _Rounds] = {}

    def add(self, group: ScoredGroup) -> Sequence[ScoredGroup]:
        return self._rounds_of(group).add(group)

    def examine(self, groups: Sequence[ScoredGroup], without_signal: Collection[int], version: int) -> Replace | None:
        without = [group for group in groups if gid_of(group) in without_signal and is_usable(group, self._min_scored)]
        if not without:
            return None
        rounds = self._rounds_of(without[0])
        rounds.filtered |= {gid_of(group) for group in without}
        return rounds.replace(without) if slot_of(without[0]).attempt < self._resampling else None

    def is_ready(self, version: int) -> bool:
        return version in self._steps and not self._steps[version].missing

    def _make_step(self, version: int) -> StepGroups:
        rounds = self._steps.pop(version)
        return StepGroups(
            groups=tuple(sorted(rounds.groups, key=slot_of)),
            states={gid_of(group): self._end_state(group, rounds) for group in rounds.groups},
            replaced=frozenset(rounds.replaced),
            oldest=version - self._max_staleness,
            drops_stale=False,
        )

    def unfinished(self) -> Unfinished:
        groups = [group for rounds in self._steps.values() for group in rounds.groups]
        return Unfinished(collected=tuple(sorted(groups, key=slot_of)))

    def _rounds_of(self, group: ScoredGroup) -> _Rounds:
        return self._steps.setdefault(slot_of(group).step, _Rounds(self._batch_size))

    def _end_state(self, group: ScoredGroup, rounds: _Rounds) -> ClosedState:
        if gid_of(group) in rounds.filtered:
            return "filtered"
        return "trained" if is_usable(group, self._min_scored) else "quarantined"


class _Rounds:
    """The groups of one pinned step as they come in, round by round; the first round has all the places."""

    def __init__(self, batch_size: int) -> None:
        self.groups: list[ScoredGroup] = []
        self.filtered: set[int] = set()
        self.replaced: set[int] = set()
        self.missing = batch_size
        """Groups of the newest round that are not here yet."""
        self._round: list[ScoredGroup] = []

    def add(self, group: ScoredGroup) -> Sequence[ScoredGroup]:
        self.groups.append(group)
        self._round.append(group)
        self.missing -= 1
        return [] if self.missing else sorted(self._round, key=slot_of)

    def replace(self, groups: Sequence[ScoredGroup]) -> Replace:
        """Open a round of replacements."""
        self.replaced |= {gid_of(group) for group in groups}
        self._round, self.missing = [], len(groups)
        return Replace(slots=tuple(map(slot_of, groups)))


class FreeGathering(Gathering):
    """A step is made of the first groups that are here, whatever their slots.

    Each group is decided on when it comes. That is also when its step begins, as far as staleness goes: a step begins
    as soon as its last group has come, so all of them are here by then under the same newest version. A step of which
    stale tokens leave nothing does not begin: one of its groups is sampled anew.
    """

    def __init__(
        self, batch_size: int, min_scored: int, resampling: int, max_staleness: int, on_stale: OnStale
    ) -> None:
        super().__init__(batch_size, min_scored, resampling, max_staleness)
        self._on_stale = on_stale
        self._pasts: dict[tuple[int, int], Past] = {}
        self._lost: dict[int, Past] = {}
        """Of groups that are stale and not sampled anew, by gid: what came before in their places."""
        self._groups: list[ScoredGroup] = []
        self._states: dict[int, ClosedState] = {}
        self._replaced: set[int] = set()

    def add(self, group: ScoredGroup) -> Sequence[ScoredGroup]:
        return [group]

    def examine(self, groups: Sequence[ScoredGroup], without_signal: Collection[int], version: int) -> Replace | None:
        (group,) = groups
        slot, gid = slot_of(group), gid_of(group)
        place = slot.step, slot.place
        past = self._pasts.pop(place, None) or Past(step=slot.step, place=slot.place)
        self._groups.append(group)
        self._states[gid] = self._end_state(group, gid in without_signal, version)
        following, rows = None, None
        if self._states[gid] == "filtered" and past.filtered < self._resampling:
            following = msgspec.structs.replace(past, filtered=past.filtered + 1, sent_back=False)
        elif self._is_sent_back(group, past, version):
            self._states[gid] = "stale"
            following, rows = msgspec.structs.replace(past, sent_back=True), (group.group.prompt.row,)
        if following is not None:
            return self._replace(group, following, rows)
        if self._states[gid] == "stale":
            self._lost[gid] = past
        return self._fill_empty_step()

    def _fill_empty_step(self) -> Replace | None:
        """Have a stale group sampled anew where a step would begin that has nothing but what is lost."""
        kept = [group for group in self._groups if gid_of(group) not in self._replaced]
        stale = [group for group in kept if self._states[gid_of(group)] == "stale"]
        if len(kept) < self._batch_size or not stale or any(self._states[gid_of(g)] == "trained" for g in kept):
            return None
        group, slot = stale[-1], slot_of(stale[-1])
        past = self._lost.pop(gid_of(group), None) or Past(step=slot.step, place=slot.place)
        return self._replace(group, past, (group.group.prompt.row,))

    def _replace(self, group: ScoredGroup, following: Past, rows: tuple[int, ...] | None) -> Replace:
        slot = slot_of(group)
        self._pasts[slot.step, slot.place] = following
        self._replaced.add(gid_of(group))
        return Replace(slots=(slot,), rows=rows)

    def is_ready(self, version: int) -> bool:
        return len(self._groups) - len(self._replaced) >= self._batch_size

    def _make_step(self, version: int) -> StepGroups:
        step = StepGroups(
            groups=tuple(sorted(self._groups, key=slot_of)),
            states=self._states,
            replaced=frozenset(self._replaced),
            oldest=version - self._max_staleness,
            drops_stale=self._on_stale != "correct",
        )
        self._groups, self._states, self._replaced, self._lost = [], {}, set(), {}
        return step

    def unfinished(self) -> Unfinished:
        return Unfinished(
            collected=tuple(self._groups),
            states=dict(self._states),
            replaced=tuple(sorted(self._replaced)),
            pasts=tuple(self._pasts[place] for place in sorted(self._pasts)),
        )

    def go_on(self, unfinished: Unfinished) -> None:
        """Take over what was collected, with what was decided."""
        self._groups = list(unfinished.collected)
        self._states = dict(unfinished.states)
        self._replaced = set(unfinished.replaced)
        self._pasts = {(past.step, past.place): past for past in unfinished.pasts}

    def _end_state(self, group: ScoredGroup, is_without_signal: bool, version: int) -> ClosedState:
        if not is_usable(group, self._min_scored):
            return "quarantined"
        if is_without_signal:
            return "filtered"
        stale = stale_tokens(group, version - self._max_staleness)
        is_lost = self._on_stale != "correct" and 0 < stale == sum(map(num_sampled, group.group.rollouts))
        return "stale" if is_lost else "trained"

    def _is_sent_back(self, group: ScoredGroup, past: Past, version: int) -> bool:
        """Whether the group's row is sampled anew, because of tokens that are too old; once."""
        if self._on_stale != "requeue" or past.sent_back or self._states[gid_of(group)] not in ("trained", "stale"):
            return False
        return stale_tokens(group, version - self._max_staleness) > 0


class GivenFirst(Gathering):
    """A free run that begins with supervised steps, each of the groups of its own slots."""

    def __init__(self, supervised: int, given: Gathering, sampled: Gathering) -> None:
        self._supervised, self._given, self._sampled = supervised, given, sampled

    def add(self, group: ScoredGroup) -> Sequence[ScoredGroup]:
        return self._given.add(group) and () if group.group.supervised else self._sampled.add(group)

    def examine(self, groups: Sequence[ScoredGroup], without_signal: Collection[int], version: int) -> Replace | None:
        return self._sampled.examine(groups, without_signal, version)

    def is_ready(self, version: int) -> bool:
        return self._of(version).is_ready(version)

    def _make_step(self, version: int) -> StepGroups:
        return self._of(version)._make_step(version)

    def unfinished(self) -> Unfinished:
        return self._sampled.unfinished()

    def _of(self, version: int) -> Gathering:
        return self._given if version < self._supervised else self._sampled


def is_usable(group: ScoredGroup, min_scored: int) -> bool:
    """Whether at least `min_scored` completions of the group have a reward: a score from some function, and none that
    is missing through a fault. One whose completion is given needs none."""
    if group.group.supervised:
        return True
    rows = enumerate(zip(*group.scores.values(), strict=True))
    scored = sum(i not in group.faulted and any(score is not None for score in row) for i, row in rows)
    return scored >= min_scored


def stale_tokens(group: ScoredGroup, oldest: int) -> int:
    """How many tokens of a group were sampled from a version before `oldest`."""
    return sum(version < oldest for rollout in group.group.rollouts for version in sampled_versions(rollout))


def slot_of(group: ScoredGroup) -> Slot:
    """Where a group stands in the run."""
    return group.group.prompt.slot


def gid_of(group: ScoredGroup) -> int:
    """The unique number of a group."""
    return group.group.prompt.gid
