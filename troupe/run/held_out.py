"""Episodes without actors: the same rounds, conversations and environments as in a run, one round after the other."""

from collections.abc import Iterator, Sequence

import anyio
from anyio.abc import TaskGroup

from troupe.actors.conversations import Conversations
from troupe.actors.generator.episodes import EpisodeLimits, Episodes
from troupe.messages import Prompt, RolloutGroup, TurnTaken
from troupe.policy import CompletedTurn, GenerationConfig, Policy, TurnRequest, TurnSession
from troupe.run.acting import ActingSetup
from troupe.run.status import Progress
from troupe.runtime.device import DeviceThread


def number_of_row(gid: int) -> int:
    """The row of a held-out group, whose gid is below 0: no group of a run has such a one."""
    return -1 - gid if gid < 0 else gid


class HeldOutEpisodes:
    """Runs held-out rows with one policy."""

    def __init__(
        self,
        acting_setup: ActingSetup,
        policy: Policy,
        generation: GenerationConfig,
        device: DeviceThread,
        *,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        """`progress` is told of each sample that has ended."""
        self.conversations: Conversations = acting_setup.conversations()
        """To be forgotten when their groups are scored."""
        self._policy, self._device, self._seed, self._progress = policy, device, seed, progress
        self._engine = policy.engine(generation)
        self._limits = EpisodeLimits(
            num_generations=generation.num_generations,
            max_completion_length=generation.max_completion_length,
            context=acting_setup.rules.context,
            max_turns=acting_setup.rules.max_turns,
        )
        self._news = anyio.Event()

    async def run(self, prompts: Sequence[Prompt]) -> list[RolloutGroup]:
        """Run the episodes of all prompts together, in turns → their groups with episodes, in order."""
        episodes = Episodes(prompts, self._limits, seed=self._seed, decode_text=self._policy.tokenizer.decode_sampled)
        session = await self._device.run(self._engine.session, plain=True)
        try:
            async with anyio.create_task_group() as tasks:
                for turn in episodes.openings:
                    tasks.start_soon(self._answer, episodes, turn)
                while not episodes.ended:
                    while episodes.waiting:
                        await self._news.wait()
                        self._news = anyio.Event()
                    await self._decode(session, episodes, tasks)
        finally:
            with anyio.CancelScope(shield=True):
                await self._device.run(session.close, plain=True)
        ended = {group.prompt.gid: (await self.conversations.end(group))[0] for group in episodes.pop_finished()}
        return [ended[prompt.gid] for prompt in prompts]

    async def _decode(self, session: TurnSession, episodes: Episodes, tasks: TaskGroup) -> None:
        if requests := episodes.requests():
            turns = _turns(session, requests)
            async with self._device.iterate(turns, on_leave=self._engine.abort) as decoded:
                while completed := await decoded.next():
                    for turn in completed:
                        tasks.start_soon(self._answer, episodes, episodes.add(turn))

    async def _answer(self, episodes: Episodes, turn: TurnTaken) -> None:
        observation, _ = await self.conversations.answer(turn)
        if observation.done and self._progress is not None:
            self._progress.done += 1
        episodes.observe(observation)
        self._news.set()


def _turns(session: TurnSession, requests: Sequence[TurnRequest]) -> Iterator[list[CompletedTurn]]:
    """Turns as they end; for the device's thread."""
    for turns in session.decode(requests):
        if turns:
            yield turns
