"""Who completes the rows of a set: the generator's device, between what is generated for training, or its crew."""

from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from typing import Protocol

import anyio
import msgspec

from troupe.actors.evaluator.settings import EvaluationSet
from troupe.actors.generator.parts import Part, PartAsked, key_of
from troupe.actors.learner.batch import as_rollouts
from troupe.dataset import PromptDataset
from troupe.messages import Evaluate, Prompt, PromptText, RolloutGroup, Slot
from troupe.messages.evaluations import gid_of
from troupe.policy import CompletedGroup, RolloutEngine, RolloutRequest
from troupe.rewards import RewardManager
from troupe.runtime.device import DeviceThread
from troupe.runtime.mailbox import Channel
from troupe.runtime.reporter import Reporter

_AT_ONCE = 128
"""Completions that are decoded together: how long training may have to wait for the device."""


class EvalSet(msgspec.Struct, frozen=True, kw_only=True):
    """A set of rows that can be evaluated."""

    settings: EvaluationSet
    dataset: PromptDataset
    prompt_ids: Sequence[tuple[int, ...]]
    rewards: RewardManager
    has_own_rewards: bool = False
    """Whether these are to be started and stopped for it alone."""

    @property
    def name(self) -> str:
        """In metrics: `eval/NAME/…`."""
        return self.settings.name

    @property
    def figures(self) -> list[str]:
        """Names of the metrics that it may have."""
        return self.settings.metrics(self.rewards.names, answers="answer" in self.dataset.columns)


class RowPrompts:
    """The rows of a set as prompts, in pieces whose make-up follows from the set alone.

    Gids and steps are below 0, as those of no group of training, and gids unlike those of other versions and sets. The
    noise of a sample follows from the run's seed, the set's name, row and sample: all versions have the same.
    """

    def __init__(self, of: EvalSet, number: int, opened: Callable[[PromptText, Sequence[int]], str]) -> None:
        """`number`: of the set. `opened`: what a prompt opens of the thoughts."""
        self._of, self._number, self._opened = of, number, opened
        self._stream = int.from_bytes(blake2b(of.name.encode(), digest_size=6).digest())

    def pieces(self, version: int) -> list[list[Prompt]]:
        """All rows, those together that are decoded together."""
        places = pieces(len(self._of.dataset), self._of.settings.num_samples)
        return [[self._prompt(row, version) for row in rows] for rows in places]

    def _prompt(self, place: int, version: int) -> Prompt:
        row, ids = self._of.dataset[place], self._of.prompt_ids[place]
        return Prompt(
            gid=gid_of(version, self._number, place),
            slot=Slot(step=-1, place=place, attempt=self._stream),
            epoch=0,
            row=place,
            prompt=row.prompt,
            prompt_ids=ids,
            columns=row.columns,
            opened=self._opened(row.prompt, ids),
        )


def pieces(rows: int, num_samples: int) -> list[range]:
    """The rows of a set that are decoded together."""
    size = max(1, _AT_ONCE // num_samples)
    return [range(start, min(start + size, rows)) for start in range(0, rows, size)]


class Decoder(Protocol):
    """Completes the rows of one set."""

    @property
    def at_once(self) -> int:
        """Pieces that it may be asked for at the same time."""

    async def complete(
        self, prompts: Sequence[Prompt], message: Evaluate, on_row: Callable[[], None]
    ) -> list[RolloutGroup]:
        """A piece, with the weights of the message → its groups, in order. `on_row` is called with every group that is
        complete, from any thread."""

    def forget(self, groups: Sequence[RolloutGroup]) -> None:
        """They were scored."""


class CompletionDecoder:
    """Completes each row once by itself."""

    at_once = 1

    def __init__(
        self,
        engine: Callable[[], RolloutEngine],
        device: DeviceThread,
        *,
        seed: int,
        decode_text: Callable[[Sequence[int]], str],
        report: Reporter,
        told_as: str = "generate",
    ) -> None:
        """`told_as`: name of the spans in which it decodes."""
        self._make_engine, self._device, self._report, self._told_as = engine, device, report, told_as
        self._engine: RolloutEngine | None = None
        self._seed, self._decode_text = seed, decode_text

    async def complete(
        self, prompts: Sequence[Prompt], message: Evaluate, on_row: Callable[[], None]
    ) -> list[RolloutGroup]:
        """As of `Decoder`."""
        if self._engine is None:
            self._engine = await self._device.run(self._make_engine, plain=True)
        engine = self._engine
        requests = [RolloutRequest(prompt_ids=each.prompt_ids, key=key_of(self._seed, each.slot)) for each in prompts]

        def decode(decoding: Iterable[list[CompletedGroup]]) -> list[RolloutGroup]:
            groups: dict[int, RolloutGroup] = {}
            for completed in decoding:
                for group in completed:
                    prompt, rollouts = prompts[group.index], as_rollouts(group, self._decode_text)
                    groups[group.index] = RolloutGroup(prompt=prompt, rollouts=rollouts)
                    on_row()
            return [groups[index] for index in sorted(groups)]

        async with self._device.turn(self._report, hurried=False, step=message.version):
            with self._report.span(self._told_as, step=message.version):
                engine.load(message.weights, message.version)
                try:
                    decoding = engine.decode_lists(requests)
                    return await self._device.run(decode, decoding, on_cancel=engine.abort, plain=True)
                finally:
                    engine.release()

    def forget(self, groups: Sequence[RolloutGroup]) -> None:
        """Nothing is kept."""


class CrewDecoder:
    """Has each row completed once by who decodes for training: each piece is a part of its own."""

    at_once = 32

    def __init__(self, parts: Channel[PartAsked], number: int) -> None:
        """`number`: of the set."""
        self._parts, self._number = parts, number

    async def complete(
        self, prompts: Sequence[Prompt], message: Evaluate, on_row: Callable[[], None]
    ) -> list[RolloutGroup]:
        """As of `Decoder`."""
        groups: dict[int, RolloutGroup] = {}
        whole = anyio.Event()

        def answer(group: RolloutGroup) -> None:
            if group.prompt.gid not in groups:
                groups[group.prompt.gid] = group
                on_row()
            if len(groups) == len(prompts):
                whole.set()

        part = Part(
            step=message.version,
            number=prompts[0].slot.place,
            set=self._number,
            version=message.version,
            prompts=tuple(prompts),
        )
        await self._parts.send(PartAsked(part=part, answer=answer))
        await whole.wait()
        return [groups[prompt.gid] for prompt in prompts]

    def forget(self, groups: Sequence[RolloutGroup]) -> None:
        """Nothing is kept."""
