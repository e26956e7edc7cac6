"""Which groups make a step in either schedule, and how each group ends: cases by hand, and properties of any run."""

from __future__ import annotations

import random
from collections import Counter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fakes import make_prompt, make_rollout, make_scored
from troupe.actors.learner.gathering import (
    FreeGathering,
    Gathering,
    PinnedGathering,
    StepGroups,
    gathering_for,
    gid_of,
    slot_of,
)
from troupe.actors.schedule import OnStale, ScheduleConfig
from troupe.messages import Replace, RolloutGroup, ScoredGroup, Slot
from troupe.runtime.board import Credits

NOTHING: tuple[float | None, ...] = (None, None, None)


def free(on_stale: OnStale = "drop", *, max_staleness: int = 1, resampling: int = 2) -> FreeGathering:
    """Steps of two groups, of which two completions must have a score."""
    return FreeGathering(2, 2, resampling, max_staleness, on_stale)


def aged(step: int, place: int, *versions: tuple[int, ...], attempt: int = 0) -> ScoredGroup:
    """A group whose completions have tokens of these versions."""
    rollouts = tuple(make_rollout(range(len(row)), versions=row) for row in versions)
    group = RolloutGroup(prompt=make_prompt(step, place, attempt), rollouts=rollouts)
    return ScoredGroup(group=group, scores={"r": tuple(float(i) for i in range(len(rollouts)))})


def arrive(gathering: Gathering, group: ScoredGroup, version: int, *, without_signal: bool = False) -> Replace | None:
    """A group comes and is examined."""
    groups = gathering.add(group)
    without = {gid_of(group)} if without_signal else set()
    return gathering.examine(groups, without, version) if groups else None


def ends(step: StepGroups | None) -> list[tuple[int, int, int, str]]:
    """Step, place, attempt and state of each group, in order."""
    assert step is not None
    slots = [slot_of(group) for group in step.groups]
    states = [step.states[gid_of(group)] for group in step.groups]
    return [(s.step, s.place, s.attempt, state) for s, state in zip(slots, states, strict=True)]


def test_the_schedule_says_which() -> None:
    pinned = gathering_for(ScheduleConfig(max_staleness=3), batch_size=2, min_scored=1, resampling=0)
    other = gathering_for(ScheduleConfig(mode="free"), batch_size=2, min_scored=1, resampling=0)
    assert isinstance(pinned, PinnedGathering)
    assert isinstance(other, FreeGathering)


def test_pinned_steps_come_in_order_and_by_slot() -> None:
    gathering = PinnedGathering(2, 2, 0, 1)
    for group in (make_scored(1, 1), make_scored(0, 1, NOTHING), make_scored(1, 0)):
        arrive(gathering, group, 0)
        assert gathering.take_step(0) is None
    arrive(gathering, make_scored(0, 0), 0)
    step = gathering.take_step(0)
    assert ends(step) == [(0, 0, 0, "trained"), (0, 1, 0, "quarantined")]
    assert step is not None
    assert (step.oldest, step.drops_stale, step.replaced) == (-1, False, frozenset())
    assert [slot_of(group).place for group in step.ending("quarantined")] == [1]
    assert ends(gathering.take_step(1)) == [(1, 0, 0, "trained"), (1, 1, 0, "trained")]
    assert gathering.take_step(2) is None


def test_pinned_groups_are_examined_when_their_round_is_whole() -> None:
    gathering = PinnedGathering(2, 2, 1, 0)
    assert list(gathering.add(make_scored(0, 1))) == []
    whole = gathering.add(make_scored(0, 0))
    assert [slot_of(group).place for group in whole] == [0, 1]
    assert gathering.examine(whole, {gid_of(whole[0]), gid_of(whole[1])}, 0) == Replace(
        slots=(Slot(step=0, place=0), Slot(step=0, place=1))
    )
    assert gathering.take_step(0) is None
    gathering.add(make_scored(0, 1, attempt=1))
    again = gathering.add(make_scored(0, 0, attempt=1))
    assert gathering.examine(again, {gid_of(again[1])}, 0) is None, "the limit is reached"
    step = gathering.take_step(0)
    assert ends(step) == [(0, 0, 0, "filtered"), (0, 0, 1, "trained"), (0, 1, 0, "filtered"), (0, 1, 1, "filtered")]
    assert step is not None
    assert step.replaced == {gid_of(group) for group in whole}


def test_free_steps_are_made_of_the_first_groups_whatever_their_slots() -> None:
    gathering = free()
    assert arrive(gathering, make_scored(1, 1), 0) is None
    assert gathering.take_step(0) is None
    assert arrive(gathering, make_scored(0, 1, NOTHING), 0) is None
    step = gathering.take_step(0)
    assert ends(step) == [(0, 1, 0, "quarantined"), (1, 1, 0, "trained")]
    assert step is not None
    assert step.drops_stale
    assert gathering.take_step(1) is None


@pytest.mark.parametrize("on_stale", ["drop", "correct"])
def test_a_group_with_some_old_tokens_is_trained(on_stale: OnStale) -> None:
    gathering = free(on_stale)
    assert arrive(gathering, aged(0, 0, (0, 0, 1), (0, 0)), 2) is None
    assert arrive(gathering, aged(0, 1, (2, 2), (2,)), 2) is None
    step = gathering.take_step(2)
    assert ends(step) == [(0, 0, 0, "trained"), (0, 1, 0, "trained")]
    assert step is not None
    assert (step.oldest, step.drops_stale) == (1, on_stale == "drop")


@pytest.mark.parametrize(("on_stale", "end"), [("drop", "stale"), ("correct", "trained")])
def test_a_group_of_old_tokens_alone(on_stale: OnStale, end: str) -> None:
    gathering = free(on_stale)
    assert arrive(gathering, aged(0, 0, (0, 0), (0,)), 2) is None
    arrive(gathering, aged(0, 1, (2,), (2,)), 2)
    assert ends(gathering.take_step(2)) == [(0, 0, 0, end), (0, 1, 0, "trained")]


def test_a_step_of_old_tokens_alone_does_not_begin() -> None:
    gathering = free()
    old = [aged(0, place, (0,), (0,)) for place in range(2)]
    assert arrive(gathering, old[0], 2) is None
    assert arrive(gathering, old[1], 2) == Replace(slots=(slot_of(old[1]),), rows=(old[1].group.prompt.row,))
    assert gathering.take_step(2) is None
    arrive(gathering, aged(0, 1, (2,), (2,), attempt=1), 2)
    assert ends(gathering.take_step(2)) == [(0, 0, 0, "stale"), (0, 1, 0, "stale"), (0, 1, 1, "trained")]


def test_what_old_tokens_and_missing_scores_leave_nothing_of_does_not_begin_either() -> None:
    gathering = free()
    old = aged(0, 0, (0,), (0,))
    assert arrive(gathering, old, 2) is None
    assert arrive(gathering, make_scored(0, 1, NOTHING), 2) == Replace(
        slots=(slot_of(old),), rows=(old.group.prompt.row,)
    )
    arrive(gathering, aged(0, 0, (2,), (2,), attempt=1), 2)
    assert ends(gathering.take_step(2)) == [(0, 0, 0, "stale"), (0, 0, 1, "trained"), (0, 1, 0, "quarantined")]


def test_completions_without_tokens_are_not_old() -> None:
    gathering = free()
    arrive(gathering, aged(0, 0, (), ()), 9)
    arrive(gathering, aged(0, 1, (), (9,)), 9)
    assert [end[3] for end in ends(gathering.take_step(9))] == ["trained", "trained"]


def test_an_old_group_is_sent_back_once_with_its_row() -> None:
    gathering = free("requeue")
    first = aged(3, 1, (0, 1), (1,))
    assert arrive(gathering, first, 2) == Replace(slots=(Slot(step=3, place=1),), rows=(first.group.prompt.row,))
    assert arrive(gathering, aged(2, 0, (2,), (2,)), 2) is None
    assert gathering.take_step(2) is None, "one that was sent back takes no place"
    assert arrive(gathering, aged(3, 1, (0, 1), (0,), attempt=1), 2) is None, "the second time it is trained on"
    step = gathering.take_step(2)
    assert ends(step) == [(2, 0, 0, "trained"), (3, 1, 0, "stale"), (3, 1, 1, "trained")]
    assert step is not None
    assert step.replaced == {gid_of(first)}
    assert step.drops_stale
    assert arrive(gathering, aged(3, 0, (0,), (0,)), 3) is not None
    assert arrive(gathering, aged(3, 0, (0,), (0,), attempt=1), 3) is None, "or closed, with nothing left of it"
    arrive(gathering, aged(4, 0, (3,), (3,)), 3)
    assert ends(gathering.take_step(3))[:2] == [(3, 0, 0, "stale"), (3, 0, 1, "stale")]


def test_what_is_as_old_as_may_be_is_not_stale() -> None:
    for max_staleness in range(3):
        gathering = free("requeue", max_staleness=max_staleness)
        assert arrive(gathering, aged(0, 0, (5 - max_staleness,), (5,)), 5) is None
        assert arrive(gathering, aged(0, 1, (4 - max_staleness,), (5,)), 5) is not None


def test_groups_without_signal_are_replaced_one_by_one_as_often_as_allowed() -> None:
    gathering = free("requeue", resampling=2)
    replaced = [arrive(gathering, make_scored(0, 0, attempt=a), 0, without_signal=True) for a in range(3)]
    assert replaced == [Replace(slots=(Slot(step=0, place=0, attempt=a),)) for a in range(2)] + [None]
    arrive(gathering, make_scored(0, 1), 0)
    assert ends(gathering.take_step(0)) == [(0, 0, a, "filtered") for a in range(3)] + [(0, 1, 0, "trained")]


def test_neither_a_group_without_signal_nor_one_without_scores_is_sent_back() -> None:
    gathering = free("requeue", resampling=0)
    assert arrive(gathering, aged(0, 0, (0,), (0,)), 5, without_signal=True) is None
    poor = msgspec.structs.replace(aged(0, 1, (0,), (0,)), scores={"r": (None, None)})
    assert arrive(gathering, poor, 5, without_signal=True) is None
    assert [end[3] for end in ends(gathering.take_step(5))] == ["filtered", "quarantined"]


def test_a_replacement_is_another_row_which_may_be_sent_back_too() -> None:
    gathering = free("requeue", resampling=1)
    old = [aged(0, 0, (0,), (9,), attempt=a) for a in range(4)]
    assert arrive(gathering, old[0], 9) is not None
    assert arrive(gathering, old[1], 9, without_signal=True) == Replace(slots=(slot_of(old[1]),))
    assert arrive(gathering, old[2], 9) == Replace(slots=(slot_of(old[2]),), rows=(old[2].group.prompt.row,))
    assert arrive(gathering, old[3], 9, without_signal=True) is None, "replaced once, as often as allowed"
    arrive(gathering, make_scored(0, 1, version=9), 9)
    assert [end[3] for end in ends(gathering.take_step(9))] == ["stale", "filtered", "stale", "filtered", "trained"]


class PaperRun:
    """A whole run on paper: credits, a stream of slots, groups that come in any order with tokens of any age."""

    def __init__(self, gathering: Gathering, *, mode: str, P: int, eta: int, steps: int, dice: random.Random) -> None:
        self.gathering, self.mode, self.P, self.eta, self.dice = gathering, mode, P, eta, dice
        self.credits = Credits((eta + 1) * P)
        self.next, self.end, self.version = 0, steps * P, 0
        self.alive: list[tuple[Slot, int]] = []
        """Slot and the version when it was prompted."""
        self.ended: Counter[int] = Counter()
        self.issued: list[int] = []
        self.steps: list[StepGroups] = []

    def run(self) -> None:
        """To the end: a group of all that are alive comes in, until none is."""
        self.issue()
        while self.alive:
            slot, born = self.alive.pop(self.dice.randrange(len(self.alive)))
            newest = self.version if self.mode == "free" else max(0, slot.step - self.eta)
            ages = [sorted(self.dice.randint(min(born, newest), newest) for _ in range(3)) for _ in range(2)]
            group = aged(slot.step, slot.place, *map(tuple, ages), attempt=slot.attempt)
            group = self.rename(group)
            if self.dice.random() < 0.1:
                group = msgspec.structs.replace(group, scores={"r": (None, None)})
            self.come(group)

    def rename(self, group: ScoredGroup) -> ScoredGroup:
        """With a gid for steps of P groups."""
        prompt = msgspec.structs.replace(group.group.prompt, gid=self.gid(slot_of(group)))
        return msgspec.structs.replace(group, group=msgspec.structs.replace(group.group, prompt=prompt))

    def gid(self, slot: Slot) -> int:
        return (slot.step * self.P + slot.place) + slot.attempt * 2**48

    def issue(self) -> None:
        while self.next < self.end and self.credits.free:
            self.begin(Slot(step=self.next // self.P, place=self.next % self.P))
            self.next += 1

    def begin(self, slot: Slot) -> None:
        self.credits.take(self.gid(slot))
        self.issued.append(self.gid(slot))
        self.alive.append((slot, self.version))

    def come(self, group: ScoredGroup) -> None:
        if examined := self.gathering.add(group):
            without = {gid_of(g) for g in examined if self.dice.random() < 0.4}
            if replace := self.gathering.examine(examined, without, self.version):
                self.replace(replace)
        while step := self.gathering.take_step(self.version):
            self.close(step)

    def replace(self, replace: Replace) -> None:
        assert replace.rows is None or len(replace.rows) == len(replace.slots)
        for slot in replace.slots:
            self.credits.give_back(self.gid(slot))
            self.begin(msgspec.structs.replace(slot, attempt=slot.attempt + 1))

    def close(self, step: StepGroups) -> None:
        assert len(step.groups) - len(step.replaced) == self.P, "a step is P groups that leave"
        self.version += 1
        self.steps.append(step)
        for group in step.groups:
            self.ended[gid_of(group)] += 1
            if gid_of(group) not in step.replaced:
                self.credits.give_back(gid_of(group))
        self.issue()


@given(
    mode=st.sampled_from(["pinned", "free"]),
    P=st.integers(1, 4),
    eta=st.integers(0, 3),
    steps=st.integers(1, 5),
    resampling=st.integers(0, 2),
    on_stale=st.sampled_from(["drop", "requeue", "correct"]),
    seed=st.integers(0, 2**32),
)
def test_any_run_ends_with_every_group_closed_once_and_no_credit_taken(
    mode: str, P: int, eta: int, steps: int, resampling: int, on_stale: OnStale, seed: int
) -> None:
    schedule = ScheduleConfig(mode=mode, max_staleness=eta, on_stale=on_stale)  # type: ignore[arg-type]
    gathering = gathering_for(schedule, batch_size=P, min_scored=1, resampling=resampling)
    run = PaperRun(gathering, mode=mode, P=P, eta=eta, steps=steps, dice=random.Random(seed))
    run.run()  # `Credits.take` raises where more than (η + 1)·P would be alive
    assert run.version == steps, "nobody waits for ever"
    assert run.credits.live == frozenset()
    assert run.ended == Counter(run.issued)
    assert set(run.ended.values()) <= {1}
    for version, step in enumerate(run.steps):
        check(step, version, eta, schedule)
    places = [(s.step, s.place) for step in run.steps for s in map(slot_of, step.ending("filtered"))]
    assert max(Counter(places).values(), default=0) <= resampling + 1


def check(step: StepGroups, version: int, eta: int, schedule: ScheduleConfig) -> None:
    """What holds for every step of a run."""
    assert [slot_of(g) for g in step.groups] == sorted(slot_of(g) for g in step.groups)
    assert step.states.keys() == {gid_of(g) for g in step.groups}
    if schedule.mode == "pinned":
        assert {slot_of(g).step for g in step.groups} == {version}
        assert not step.ending("stale")
    for group in step.ending("trained"):
        newest = [max(r.versions) for r in group.group.rollouts]
        assert not step.drops_stale or max(newest) >= version - eta, "something of it is left to be trained on"
    assert {gid_of(g) for g in step.ending("trained", "quarantined")}.isdisjoint(step.replaced)
    kept = [step.states[gid_of(g)] for g in step.groups if gid_of(g) not in step.replaced]
    assert "trained" in kept or "stale" not in kept, "old tokens make no empty step"
