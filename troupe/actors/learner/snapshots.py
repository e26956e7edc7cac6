"""What of a learner's state, and of the groups that are under way, a checkpoint gets."""

import math
from collections.abc import Callable, Mapping

import msgspec

from troupe.actors.curriculum import Curriculum
from troupe.actors.learner.gathering import gid_of, slot_of
from troupe.actors.learner.train import LearnerState
from troupe.actors.ledgers import OpenGroups
from troupe.messages import ScoredGroup, Snapshot, Unfinished
from troupe.policy import Weights
from troupe.runtime.mailbox import Mailbox


class Snapshots:
    """Makes the snapshots of a run, each with the means of the metrics since the one before."""

    def __init__(
        self,
        *,
        every: int,
        beside_learning: bool = True,
        with_reference: bool = False,
        with_average: bool = False,
        open_groups: OpenGroups,
        recorded: Mapping[int, ScoredGroup],
        next_prompt: Callable[[], int] = lambda: 0,
        curriculum: Curriculum | None = None,
    ) -> None:
        """`beside_learning`: a step is learned while a checkpoint is written. `with_reference`: the reference follows
        the policy; `with_average`: so does that by which it teaches itself. `open_groups`: shared with who begins them.
        `recorded`: gid → groups that had their scores when the run was resumed and have not come to the learner yet.
        `next_prompt`: number of the prompt that will be begun next. `curriculum`: chooses the rows of steps to come."""
        self.every = every
        """Steps from one snapshot to the next."""
        self.beside_learning = beside_learning
        self.open_groups = open_groups
        self.curriculum = curriculum
        self._with_reference = with_reference
        self._with_average = with_average
        self._recorded = recorded
        self._next_prompt = next_prompt
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, metrics: Mapping[str, float]) -> None:
        """Count the metrics of one more step."""
        for name, value in metrics.items():
            if math.isfinite(value):
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = total + value, count + 1

    def oldest_open(self, batch_size: int) -> int:
        """The first step of which a group is under way, or will be prompted next."""
        return min([self._next_prompt() // batch_size, *(group.slot.step for group in self.open_groups.all())])

    def forget_metrics(self) -> None:
        """Begin new means, the snapshot with the old ones being sent."""
        self._sums.clear()

    def make(
        self,
        state: LearnerState,
        inbox: Mailbox,
        published: Mapping[int, Weights],
        collected: Unfinished,
        *,
        final: bool = False,
    ) -> Snapshot:
        """Everything a checkpoint of `state` needs, by reference.

        `published`: the versions on the board, and those still to be evaluated; `collected`: the groups that the
        learner has; those in its `inbox` are found there.
        """
        collected = msgspec.structs.replace(
            collected, collected=tuple(group for group in collected.collected if not group.group.supervised)
        )
        means = {name: total / count for name, (total, count) in self._sums.items()}
        return Snapshot(
            version=state.version,
            weights=state.weights,
            optimizer_state=dict(state.optimizer_state),  # its own: the next step takes the learner's apart
            behind={version: weights for version, weights in published.items() if version < state.version},
            reference=state.reference if self._with_reference else None,
            average=state.average if self._with_average else None,
            num_tokens=state.num_tokens,
            skipped_in_a_row=state.skipped_in_a_row,
            metrics={name: mean for name, mean in means.items() if math.isfinite(mean)},
            unfinished=msgspec.structs.replace(
                collected,
                next=self._next_prompt(),
                open=self.open_groups.all(),
                scored=self._scored(state.version, inbox, set(map(gid_of, collected.collected))),
            ),
            curriculum=None if self.curriculum is None else self.curriculum.state(),
            final=final,
        )

    def _scored(self, version: int, inbox: Mailbox, collected: set[int]) -> tuple[ScoredGroup, ...]:
        """The groups that have their scores and are not collected: one that is being examined, those that wait, and
        those from before a resume that are still on their way."""
        scored: dict[int, ScoredGroup] = {}
        for message in inbox.in_hand:
            if isinstance(message, ScoredGroup) and self.open_groups.has(slot_of(message)):
                scored[gid_of(message)] = message
        for message in inbox.waiting:
            if isinstance(message, ScoredGroup):
                scored[gid_of(message)] = message
        for gid, group in self._recorded.items():
            if slot_of(group).step >= version or self.open_groups.has(slot_of(group)):
                scored.setdefault(gid, group)
        # what is given, and not sampled, is there without a checkpoint
        return tuple(g for gid, g in scored.items() if gid not in collected and not g.group.supervised)
