"""Parts: the units in which prompts are decoded, whoever decodes them."""

from collections import defaultdict
from collections.abc import Callable, Iterable

import msgspec

from troupe.messages import Prompt, RolloutGroup, Slot


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Prompts of one step and attempt, or rows of a set that is evaluated, that are decoded together, and beside no
    others."""

    step: int
    """Of rows: the version that is evaluated."""
    attempt: int = 0
    number: int
    """Pinned: `place mod schedule.parts` of its prompts; free: the place of its only one. Of rows: the first one's."""
    set: int | None = None
    """Number of the set that its rows are of; None: it is of training."""
    version: int | None
    """Of the policy, that it is decoded with; None: the newest at each token."""
    prompts: tuple[Prompt, ...]
    """By slot."""

    @property
    def name(self) -> str:
        """STEP.ATTEMPT.NUMBER or e.VERSION.SET.NUMBER, which no other part of the run has."""
        if self.set is not None:
            return f"e.{self.step}.{self.set}.{self.number}"
        return f"{self.step}.{self.attempt}.{self.number}"

    def prompt_of(self, gid: int) -> Prompt:
        """One of its prompts."""
        return next(prompt for prompt in self.prompts if prompt.gid == gid)


class PartAsked(msgspec.Struct, frozen=True, kw_only=True):
    """Evaluator → Generator: have this part decoded, beside those of training."""

    part: Part
    answer: Callable[[RolloutGroup], None]
    """Is given each of its groups, maybe more than once."""


def parts_of(prompts: Iterable[Prompt], parts: int | None, version: int | None) -> list[Part]:
    """The parts of prompts of one step and attempt, by number. `parts`: how many a step has, of which some may be empty
    where a round holds few prompts; None: each prompt is one."""
    dealt: defaultdict[int, list[Prompt]] = defaultdict(list)
    for prompt in sorted(prompts, key=lambda prompt: prompt.slot):
        place = prompt.slot.place
        dealt[place if parts is None else place % parts].append(prompt)
    return [
        Part(
            step=together[0].slot.step,
            attempt=together[0].slot.attempt,
            number=number,
            version=version,
            prompts=tuple(together),
        )
        for number, together in sorted(dealt.items())
    ]


def key_of(seed: int, slot: Slot) -> tuple[int, ...]:
    """What the noise of a group is drawn from, to which each sample adds its number."""
    return (seed, slot.step, slot.place, slot.attempt)
