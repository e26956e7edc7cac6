"""Generator: completes prompts. It decodes a whole step, or a round of replacements, together and hands over each group
when it is finished."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from troupe.learning import as_rollouts
from troupe.messages import Prompt, RolloutGroup
from troupe.policy import CompletedGroup, RolloutEngine, RolloutRequest, Weights
from troupe.runtime import Actor, Channel, DeviceThread, Mailbox, PolicyBoard, Reporter


class Generator(Actor):
    """Receives Prompt; sends RolloutGroup in the order in which groups finish.

    Pinned schedule: a round's decode (the prompts of one step and attempt) starts when all its prompts are there and
    exactly the version that the step is pinned to is published. What is decoded together is therefore a function of
    slots and tokens, never of timing. Waiting for a version never holds up a replacement that this very version waits
    for: step k is prompted with the credits of step k − η − 1, which come back after version k − η was published.
    """

    name = "generator"

    def __init__(
        self,
        inbox: Mailbox,
        groups: Channel[RolloutGroup],
        *,
        engine: Callable[[], RolloutEngine],
        device: DeviceThread,
        board: PolicyBoard[Weights],
        decode_text: Callable[[Sequence[int]], str],
        seed: int,
        report: Reporter | None = None,
    ) -> None:
        super().__init__(inbox, [groups], report)
        self._groups = groups
        self._make_engine = engine
        self._board = board
        self._decode_text = decode_text
        self._seed = seed
        self._waiting: defaultdict[tuple[int, int], list[Prompt]] = defaultdict(list)
        self._device = device
        self._engine: RolloutEngine

    async def start(self) -> None:
        """Make the engine on the device thread that will run it."""
        self._engine = await self._device.run(self._make_engine)

    async def handle(self, message: Prompt) -> None:
        """Collect the prompts of a round; decode it when it is complete."""
        name = message.slot.step, message.slot.attempt
        self._waiting[name].append(message)
        if len(self._waiting[name]) == message.round_size:
            await self._decode(sorted(self._waiting.pop(name), key=lambda prompt: prompt.slot))

    async def _decode(self, prompts: list[Prompt]) -> None:
        step = prompts[0].slot.step
        version = self._board.pinned_for(step)
        with self.report.span("wait for policy", step=step):
            weights = await self._board.get(version)
        requests = [RolloutRequest(prompt_ids=prompt.prompt_ids, key=self._key(prompt)) for prompt in prompts]
        with self.report.span("generate", step=step):
            decoding = await self._device.run(self._begin, weights, version, requests)
            while group := await self._device.run(next, decoding, None, on_cancel=self._engine.abort):
                rollouts = as_rollouts(group, self._decode_text)
                await self._groups.send(RolloutGroup(prompt=prompts[group.index], rollouts=rollouts))
            await self._device.run(self._engine.release)  # the next step has other weights, and the learner needs room

    def _begin(self, weights: Weights, version: int, requests: list[RolloutRequest]) -> Iterator[CompletedGroup]:
        self._engine.load(weights, version)
        return self._engine.decode(requests)

    def _key(self, prompt: Prompt) -> tuple[int, ...]:
        return (self._seed, prompt.slot.step, prompt.slot.place, prompt.slot.attempt)
