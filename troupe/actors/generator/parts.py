"""Parts: the units in which prompts are decoded, whoever decodes them."""

from collections import defaultdict
from collections.abc import Iterable

import msgspec

from troupe.messages import Prompt, Slot


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Prompts of one step and attempt that are decoded together, and beside no others."""

    step: int
    attempt: int
    number: int
    """Pinned: `place mod schedule.parts` of its prompts; free: the place of its only one."""
    version: int | None
    """Of the policy, that it is decoded with; None: the newest at each token."""
    prompts: tuple[Prompt, ...]
    """By slot."""

    @property
    def name(self) -> str:
        """STEP.ATTEMPT.NUMBER, which no other part of the run has."""
        return f"{self.step}.{self.attempt}.{self.number}"

    def prompt_of(self, gid: int) -> Prompt:
        """One of its prompts."""
        return next(prompt for prompt in self.prompts if prompt.gid == gid)


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
