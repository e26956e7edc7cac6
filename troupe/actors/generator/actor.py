"""Generator: completes prompts. It decodes many together and hands over each group when it is finished."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

import anyio

from troupe.actors.generator.parts import key_of, parts_of
from troupe.actors.learner.batch import as_rollouts
from troupe.actors.ledgers import Rounds
from troupe.messages import Prompt, Rollout, RolloutGroup, ScoredGroup
from troupe.policy import CompletedGroup, RolloutEngine, RolloutRequest, Weights
from troupe.runtime.actor import Actor
from troupe.runtime.board import PolicyBoard
from troupe.runtime.device import DeviceThread
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.reporter import Reporter


class _Decoded(NamedTuple):
    """What is complete at one token."""

    groups: list[tuple[int, tuple[Rollout, ...], bytes]]
    """(Place of the prompt, its completions, the experts of its tokens)."""
    computed: list[tuple[str, float, float]]
    """What the device did since the one before, and when."""


class Generator(Actor):
    """Receives Prompt; sends RolloutGroup in the order in which groups finish.

    Pinned schedule: a round (the prompts of one step and attempt) is decoded when all its prompts are there and exactly
    the version that the step is pinned to is published, one part after another. What is decoded together is therefore a
    function of slots and tokens, never of timing. Waiting for a version never holds up a replacement that this very
    version waits for: step k is prompted with the credits of step k − η − 1, which come back after version k − η was
    published.

    Free schedule: the prompts that are there are decoded at once, with the newest version, and every newer one is taken
    at the token after it was published, while caches are kept.
    """

    name = "generator"
    acknowledges: ClassVar[bool] = True

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
        most_at_once: int | None = None,
        parts: int = 1,
        handed_over: set[int] | None = None,
        recorded: Mapping[int, ScoredGroup] | None = None,
        report: Reporter | None = None,
    ) -> None:
        """`most_at_once`: how many prompts a decode of the free schedule has at the most; None: the schedule is pinned.
        `parts`: `schedule.parts`, in the pinned one. `handed_over` and `recorded` are as for `Rounds`. `decode_text` is
        called on the device's thread.
        """
        super().__init__(inbox, [groups], report)
        self._rounds = Rounds(inbox, groups, handed_over=handed_over, recorded=recorded, report=self.report)
        self._make_engine = engine
        self._board = board
        self._decode_text = decode_text
        self._seed = seed
        self._most_at_once, self._parts = most_at_once, parts
        self._undecoded: list[Prompt] = []
        self._device = device
        self._engine: RolloutEngine

    @property
    def made(self) -> int:
        """Tokens that the longest completion under way has."""
        return self._engine.tokens if hasattr(self, "_engine") else 0

    async def start(self) -> None:
        """Make the engine on the device thread that will run it."""
        self._engine = await self._device.run(self._make_engine)

    async def handle(self, message: Prompt) -> None:
        """Collect the prompts of a round and decode it when it is complete; or decode what is there."""
        if self._most_at_once is None:
            if prompts := self._rounds.gather(message):
                await self._decode_pinned(prompts)
            return
        self._undecoded.append(message)
        if len(self._undecoded) == self._most_at_once or not len(self.inbox):
            prompts, self._undecoded = self._undecoded, []
            await self._decode_newest(prompts)

    async def _decode_pinned(self, prompts: list[Prompt]) -> None:
        step = prompts[0].slot.step
        version = self._board.pinned_for(step)
        for part in parts_of(prompts, self._parts, version):
            if await self._rounds.left(part.prompts, as_one=True):
                with self.report.span("wait for policy", step=step, kind="wait"):
                    weights = await self._board.get(version)
                self._engine.load(weights, version)
                await self._decode(part.prompts, step, part.name)
        self._rounds.finish(prompts)

    async def _decode_newest(self, prompts: list[Prompt]) -> None:
        if left := await self._rounds.left(prompts, as_one=False):
            version, weights = await self._board.newer_than(-1)
            self._engine.load(weights, version)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._follow, version)
                await self._decode(left, None)
                tasks.cancel_scope.cancel()
            self._engine.release()  # of a version that came when all was decoded
        self._rounds.finish(prompts)

    async def _follow(self, version: int) -> None:
        """Have every version that is newer used from the next token on."""
        while True:
            version, weights = await self._board.newer_than(version)
            self._engine.load(weights, version)

    async def _decode(self, prompts: Sequence[Prompt], step: int | None, part: str = "") -> None:
        async with self._device.turn(self.report, step=step):
            await self._decode_now(prompts, step, part)

    async def _decode_now(self, prompts: Sequence[Prompt], step: int | None, part: str) -> None:
        requests = [
            RolloutRequest(prompt_ids=prompt.prompt_ids, key=key_of(self._seed, prompt.slot)) for prompt in prompts
        ]
        with self.report.span("generate", step=step, part=part):
            decoding = self._engine.decode_lists(requests)  # before anybody can leave: it forgets an abort
            async with self._device.iterate(self._completed(decoding), on_leave=self._engine.abort) as completed:
                while decoded := await completed.next():
                    for name, start_s, end_s in decoded.computed:
                        self.report.record(name, start_s, end_s, step=step)
                    for index, rollouts, experts in decoded.groups:
                        group = RolloutGroup(prompt=prompts[index], rollouts=rollouts, prompt_experts=experts)
                        await self._rounds.hand_over(group)
            self._engine.release()  # the next step has other weights, and the learner needs room

    def _completed(self, decoding: Iterator[list[CompletedGroup]]) -> Iterator[_Decoded]:
        """Groups as they are completed, texts included; for the device's thread."""
        computed: list[tuple[str, float, float]] = []
        start_s = time.perf_counter()
        for groups in decoding:
            end_s = time.perf_counter()
            computed.append(("decode" if groups else "prefill", start_s, end_s))
            if groups:
                completions = [
                    (group.index, as_rollouts(group, self._decode_text), group.prompt_experts) for group in groups
                ]
                computed.append(("write text", end_s, time.perf_counter()))
                yield _Decoded(completions, computed)
                computed = []
            start_s = time.perf_counter()
