"""Kin: a worker whose bits are the run's. It is asked to decode a probe, which the run decodes as well."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from random import Random

import anyio

from troupe.actors.generator.audits import Judge
from troupe.actors.generator.checks import bits_of
from troupe.actors.generator.child import CHILD_FAULTS
from troupe.actors.generator.cluster_wire import KinAnswer, Probe
from troupe.actors.generator.cluster_worker import frame_of
from troupe.actors.generator.parts import Part
from troupe.cluster.wire import Facts
from troupe.messages import Observation, Prompt, Slot, TurnTaken

ATTEMPT = 1_000_000
"""Of the probe's slots, which no group of the run has."""


class Kinship:
    """What a worker is compared with."""

    def __init__(
        self,
        part: Callable[[int], Part],
        judge: Judge,
        versions: Callable[[], Collection[int]],
        facts: Facts,
    ) -> None:
        """`part`: the probe with the weights of a version. `versions`: those that workers can have now. `facts`: this
        machine's."""
        self._part, self._judge, self._versions, self._facts = part, judge, versions, facts
        self._references: dict[int, tuple[str, str]] = {}
        self._judging = anyio.Lock()

    def probe(self) -> Probe | None:
        """What a worker is to decode; None while there are no weights."""
        versions = self._versions()
        return Probe(part=frame_of(self._part(max(versions)))) if versions else None

    async def why_not(self, answer: KinAnswer, facts: Facts) -> str | None:
        """Why a worker is no kin, and empty where it is; None: its version cannot be compared any more."""
        reference = await self.prepare(answer.version)
        if reference is None:
            return None
        if answer.token_ids != reference[0]:
            differing = "it draws other tokens for the same prompts"
        elif answer.log_probs != reference[1]:
            differing = "its tokens are the run's, and the bits of their log-probs are not"
        else:
            return ""
        names = ("troupe", "mlx", "device", "blas")
        pairs = [(name, getattr(facts, name) or "not told", getattr(self._facts, name) or "not told") for name in names]
        told = "; ".join(f"{name}: {theirs} there, {ours} here" for name, theirs, ours in pairs if theirs != ours)
        return (
            f"in the pinned schedule only a worker may generate whose bits are the run's; {differing} "
            f"({told or 'though Troupe, MLX, device and BLAS are the same'}); make the machines alike, or let it serve "
            'a run with schedule.mode = "free"'
        )

    async def begin(self) -> None:
        """Have the run's own answer ready when a worker's comes; where that fails, it is tried then."""
        if versions := self._versions():
            with suppress(*CHILD_FAULTS):
                await self.prepare(max(versions))

    async def prepare(self, version: int) -> tuple[str, str] | None:
        """What the run itself makes of the probe with a version; None where that is gone."""
        async with self._judging:
            if version not in self._references and version in self._versions():
                try:
                    self._references[version] = bits_of(await self._judge.decode(self._part(version)))
                except LookupError:
                    return None
        return self._references.get(version)


def probe_part(version: int, prompts: Sequence[Sequence[int]], *, max_staleness: int) -> Part:
    """A part that is decoded with this version in the pinned schedule, and belongs to no step."""
    step = version + max_staleness
    return Part(
        step=step,
        attempt=ATTEMPT,
        number=0,
        version=version,
        prompts=tuple(
            Prompt(
                gid=-1 - place,
                slot=Slot(step=step, place=place, attempt=ATTEMPT),
                epoch=0,
                row=0,
                prompt="",
                prompt_ids=tuple(ids),
                columns={},
                round_size=len(prompts),
            )
            for place, ids in enumerate(prompts)
        ),
    )


def probe_answer(taken: TurnTaken) -> Observation:
    """What follows a turn of a probe, where the policy acts: its first one is sampled, and that is all."""
    return Observation(
        gid=taken.prompt.gid, sample=taken.sample, turn=taken.turn, done=taken.turn > 0, asker=taken.asker
    )


def probe_prompts(seed: int, *, count: int, length: int, vocab_size: int) -> list[list[int]]:
    """Prompts of random tokens, of unequal lengths up to `length`."""
    random = Random(f"probe {seed}")
    return [[random.randrange(vocab_size) for _ in range(max(1, length - place % 4))] for place in range(count)]
