"""What a resume does with groups that were under way: whom it prompts, what it takes over, and what it must not."""

from __future__ import annotations

from typing import Any

import msgspec

from tests.support.fakes import make_group
from troupe.actors.schedule import PromptSchedule
from troupe.dataset import PromptDataset
from troupe.messages import OpenGroup, ScoredGroup, Slot, Unfinished
from troupe.run.resume.newest import restored_free, restored_pinned

P, ROWS = 2, 9


def schedule() -> PromptSchedule:
    dataset = PromptDataset.from_rows([{"prompt": f"row {i}", "answer": str(i)} for i in range(ROWS)])
    return PromptSchedule(dataset, [(i + 1,) for i in range(ROWS)], batch_size=P, seed=0, shuffle=False)


def scored(step: int, place: int, *, version: int = 0) -> ScoredGroup:
    """As a checkpoint has it: the prompt without its text."""
    prompt = msgspec.structs.replace(schedule().prompt(Slot(step=step, place=place)), prompt="", columns={})
    return ScoredGroup(group=make_group(prompt, size=2, version=version), scores={"r": (0.0, 1.0)})


def opened(*places: tuple[int, int]) -> tuple[OpenGroup, ...]:
    return tuple(OpenGroup(slot=Slot(step=step, place=place), round_size=P) for step, place in places)


def free(unfinished: Unfinished, *, wanted: int = 99) -> Any:
    return restored_free(unfinished, schedule(), wanted=wanted)


def test_a_pinned_step_takes_over_only_what_its_own_version_sampled() -> None:
    """`schedule.max_staleness` was 3 and is 1 now: steps 3 and 4 are of versions 2 and 3, not 0 and 1."""
    there = [scored(2, 0, version=1), scored(3, 0, version=0), scored(4, 1, version=1), scored(4, 0, version=3)]
    restored = restored_pinned(Unfinished(scored=tuple(there)), schedule(), 2, max_staleness=1, whole_rounds=False)
    assert sorted(restored.recorded) == [4, 8]


def test_a_free_run_of_fewer_steps_prompts_no_more_than_it_trains() -> None:
    unfinished = Unfinished(next=6, open=opened((0, 1), (1, 0), (1, 1), (2, 0), (2, 1)), collected=(scored(1, 0),))
    restored = free(unfinished, wanted=3)
    assert [prompt.gid for prompt in restored.prompts] == [1, 3], "with the one that is collected"
    assert sorted(restored.alive) == [1, 2, 3]
    assert restored.open == unfinished.open, "who goes on from there with more steps prompts the rest"
    assert restored.next == 6


def test_a_free_run_that_is_over_keeps_what_was_collected_and_waits_for_nobody() -> None:
    restored = free(Unfinished(next=4, open=opened((1, 0), (1, 1)), collected=(scored(1, 0),)), wanted=0)
    assert (restored.prompts, restored.alive) == ((), {})
    assert [group.group.prompt.gid for group in restored.collected.collected] == [2]


def test_a_free_round_counts_those_that_are_still_to_be_scored() -> None:
    """A reward that scores a round in one call waits for all of it: those who have their scores will not come."""
    unfinished = Unfinished(next=5, open=opened((0, 1), (1, 0), (1, 1), (2, 0)), scored=(scored(1, 1),))
    sizes = {prompt.gid: prompt.round_size for prompt in free(unfinished).prompts}
    assert {gid: size for gid, size in sizes.items() if gid != 3} == {
        1: 1,  # the other one of step 0 was trained on
        2: 1,  # the other one of step 1 has its scores
        4: 2,  # the other one of step 2 was not begun, and will come with this size
    }
