"""What a run that goes on from a checkpoint does with the groups that were under way.

A checkpoint keeps of a group what cannot be had again: completions and scores. Prompts are made anew from slot and row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from troupe.actors.schedule import PromptSchedule
from troupe.errors import CheckpointError
from troupe.messages import OpenGroup, Prompt, ScoredGroup, Slot, Unfinished


class Restored(msgspec.Struct, frozen=True, kw_only=True):
    """Where prompting goes on, and what need not be done again."""

    next: int
    """Number of the first prompt in the stream that was not begun."""
    open: tuple[OpenGroup, ...] = ()
    """Groups that were begun and have not ended."""
    prompts: tuple[Prompt, ...] = ()
    """Those of the open groups that the learner does not have and will need, in the order in which they are issued."""
    alive: dict[int, Slot] = {}
    """Gid → slot of the open groups that hold a credit."""
    recorded: dict[int, ScoredGroup] = {}
    """Gid → groups that are prompted once more, and need be neither sampled nor scored."""
    collected: Unfinished = Unfinished()
    """Free schedule: what the learner had collected for its next step."""


def restored_pinned(
    unfinished: Unfinished, schedule: PromptSchedule, first_step: int, *, max_staleness: int, whole_rounds: bool
) -> Restored:
    """A pinned run prompts every step from `first_step` on, and what was scored is used where it comes up.

    What other versions have sampled than `max_staleness` now asks for is sampled anew. `whole_rounds`: whether a round
    counts only if all of its groups were scored, because a reward looks at all at once.
    """
    there = (*unfinished.collected, *unfinished.scored)
    groups = [g for g in there if _slot(g).step >= first_step and _is_pinned(g, max_staleness)]
    if whole_rounds:
        sizes = Counter(map(_round, groups))
        groups = [group for group in groups if sizes[_round(group)] == group.group.prompt.round_size]
    return Restored(next=first_step * schedule.batch_size, recorded=_recorded(groups, schedule))


def restored_free(unfinished: Unfinished, schedule: PromptSchedule, *, wanted: int) -> Restored:
    """A free run prompts again what was open, in the order of slots, and then goes on in the stream.

    `wanted`: groups that the steps to come will take. Where fewer steps are asked for than before, that may be less
    than was begun; the rest stays open for who goes on from there.
    Raises CheckpointError where the groups collected are not those of these prompts.
    """
    collected = [_renewed(group, schedule) for group in unfinished.collected]
    if None in collected:
        raise CheckpointError(
            "unfinished.msgpack: a group that was collected has another prompt than the dataset and the tokenizer now "
            "give for its row; restore them"
        )
    there = {_slot(group) for group in unfinished.collected}
    held = [group.slot for group in unfinished.open if group.slot in there][:wanted]
    waiting = [group for group in unfinished.open if group.slot not in there][: wanted - len(held)]
    recorded = _recorded(unfinished.scored, schedule)
    sizes = Counter((g.slot.step, g.slot.attempt) for g in waiting if schedule.gid(g.slot) not in recorded)
    for number in range(unfinished.next, -(-unfinished.next // schedule.batch_size) * schedule.batch_size):
        sizes[number // schedule.batch_size, 0] += 1  # the rest of a step that was begun
    return Restored(
        next=unfinished.next,
        open=unfinished.open,
        prompts=tuple(
            # whoever is scored already does not come to where a round is scored in one call
            schedule.prompt(g.slot, round_size=sizes[g.slot.step, g.slot.attempt] or g.round_size, row=g.row)
            for g in waiting
        ),
        alive={schedule.gid(slot): slot for slot in (*held, *(group.slot for group in waiting))},
        recorded=recorded,
        collected=msgspec.structs.replace(unfinished, collected=tuple(collected)),
    )


def _recorded(groups: Sequence[ScoredGroup], schedule: PromptSchedule) -> dict[int, ScoredGroup]:
    renewed = [_renewed(group, schedule) for group in groups]
    return {group.group.prompt.gid: group for group in renewed if group is not None}


def _renewed(group: ScoredGroup, schedule: PromptSchedule) -> ScoredGroup | None:
    """The group with its whole prompt; None where that has other tokens than it had."""
    before = group.group.prompt
    prompt = schedule.prompt(before.slot, round_size=before.round_size, row=before.row)
    if prompt.prompt_ids != before.prompt_ids:
        return None
    replace = msgspec.structs.replace
    return replace(group, group=replace(group.group, prompt=prompt))


def _slot(group: ScoredGroup) -> Slot:
    return group.group.prompt.slot


def _round(group: ScoredGroup) -> tuple[int, int]:
    return _slot(group).step, _slot(group).attempt


def _is_pinned(group: ScoredGroup, max_staleness: int) -> bool:
    """Whether all of a group is of the version that its step is pinned to."""
    version = max(0, _slot(group).step - max_staleness)
    return all(set(rollout.versions) <= {version} for rollout in group.group.rollouts)
