"""Rows of a set as episodes: the same rounds, conversations and environments as in training, one round after the
other."""

from collections.abc import Callable, Iterator, Sequence

import anyio
from anyio.abc import TaskGroup

from troupe.actors.conversations import Conversations
from troupe.actors.generator.episodes import EpisodeLimits, Episodes
from troupe.messages import Evaluate, Prompt, RolloutGroup, TurnTaken
from troupe.policy import CompletedTurn, RolloutEngine, TurnRequest, TurnSession
from troupe.runtime.device import DeviceThread
from troupe.runtime.reporter import Reporter


class EpisodeDecoder:
    """A `Decoder` of rows that act. Between two decodes others may have the device."""

    at_once = 1

    def __init__(
        self,
        engine: Callable[[], RolloutEngine],
        device: DeviceThread,
        *,
        conversations: Conversations,
        limits: EpisodeLimits,
        seed: int,
        decode_text: Callable[[Sequence[int]], str],
        report: Reporter,
    ) -> None:
        self._make_engine, self._device, self._report = engine, device, report
        self._conversations, self._limits = conversations, limits
        self._seed, self._decode_text = seed, decode_text
        self._engine: RolloutEngine
        self._alive: set[int] = set()
        """Groups that are not scored yet."""
        self._news = anyio.Event()

    async def complete(
        self, prompts: Sequence[Prompt], message: Evaluate, on_row: Callable[[], None]
    ) -> list[RolloutGroup]:
        """As of `Decoder`, the episodes of all prompts together, in turns."""
        if not hasattr(self, "_engine"):
            self._engine = await self._device.run(self._make_engine, plain=True)
        episodes = Episodes(prompts, self._limits, seed=self._seed, decode_text=self._decode_text)
        self._engine.load(message.weights, message.version)
        session = await self._device.run(self._engine.session, plain=True)
        self._alive |= {prompt.gid for prompt in prompts}
        left = {prompt.gid: self._limits.num_generations for prompt in prompts}

        def on_end(gid: int) -> None:
            left[gid] -= 1
            if not left[gid]:
                on_row()

        try:
            async with anyio.create_task_group() as tasks:
                for turn in episodes.openings:
                    tasks.start_soon(self._answer, episodes, turn, on_end)
                while not episodes.ended:
                    while episodes.waiting:
                        await self._news.wait()
                        self._news = anyio.Event()
                    await self._decode(session, episodes, tasks, message, on_end)
        finally:
            with anyio.CancelScope(shield=True):
                await self._device.run(session.close, plain=True)
        ended = {group.prompt.gid: (await self._conversations.end(group))[0] for group in episodes.pop_finished()}
        return [ended[prompt.gid] for prompt in prompts]

    def forget(self, groups: Sequence[RolloutGroup]) -> None:
        """As of `Decoder`."""
        self._alive -= {group.prompt.gid for group in groups}
        self._conversations.forget(self._alive)

    async def _decode(
        self,
        session: TurnSession,
        episodes: Episodes,
        tasks: TaskGroup,
        message: Evaluate,
        on_end: Callable[[int], None],
    ) -> None:
        requests = episodes.requests()
        if not requests:
            return
        engine, step = self._engine, message.version
        async with self._device.turn(self._report, hurried=False, step=step):
            with self._report.span("generate", step=step):
                engine.load(message.weights, step)
                try:
                    turns = _turns(session, requests)
                    async with self._device.iterate(turns, on_leave=engine.abort) as decoded:
                        while completed := await decoded.next():
                            for turn in completed:
                                tasks.start_soon(self._answer, episodes, episodes.add(turn), on_end)
                finally:
                    engine.release()

    async def _answer(self, episodes: Episodes, turn: TurnTaken, on_end: Callable[[int], None]) -> None:
        observation, _ = await self._conversations.answer(turn)
        if observation.done:
            on_end(turn.prompt.gid)
        episodes.observe(observation)
        self._news.set()


def _turns(session: TurnSession, requests: Sequence[TurnRequest]) -> Iterator[list[CompletedTurn]]:
    """Turns as they end; for the device's thread."""
    for turns in session.decode(requests):
        if turns:
            yield turns
