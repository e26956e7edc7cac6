"""ActingGenerator: the generator where the policy acts: turns are sampled, the environment answers, and so on."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from typing import ClassVar, NamedTuple

import anyio
import msgspec
from anyio.abc import TaskStatus

from troupe.actors.generator.episodes import EpisodeLimits, Episodes
from troupe.actors.generator.table import Table
from troupe.actors.ledgers import Rounds
from troupe.messages import Observation, Prompt, RolloutGroup, ScoredGroup, TurnTaken
from troupe.policy import CompletedTurn, OpenSession, RolloutEngine, Weights
from troupe.runtime.actor import Actor
from troupe.runtime.board import PolicyBoard
from troupe.runtime.device import DeviceThread
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.reporter import Reporter

_ASKERS = count(1)
_GATHERS_S = 0.002
"""Answers of one moment come one by one: they are waited for, so that their turns are decoded together."""


class ActingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What episodes are sampled with."""

    seed: int
    limits: EpisodeLimits
    sessions: int = 1
    """Rounds that are under way at once, at most."""
    most_at_once: int | None = None
    """Prompts whose turns are decoded together in the free schedule, at most; None: the schedule is pinned."""


class _Decoded(NamedTuple):
    """What is complete at one token."""

    turns: list[CompletedTurn]
    computed: list[tuple[str, float, float]]
    """What the device did since the one before, and when."""


class ActingGenerator(Actor):
    """Receives Prompt and Observation; sends TurnTaken, and RolloutGroup when a group's last episode has ended.

    Pinned schedule: the episodes of a round are decoded in turns: turn t of all that go on, in slot order, together,
    when all their observations are there. So what is decoded together is a function of slots and tokens, however long
    an environment takes. Several rounds are under way, each with the version that its step is pinned to; their turns
    take the device one after the other, in the order in which they are ready, which changes no bit of any.

    Free schedule: whatever is ready is decoded together, with the newest version at each token. All prompts that are
    there have their episodes begun, so that some are decoded while others wait for their environments.
    """

    name = "generator"
    acknowledges: ClassVar[bool] = True

    def __init__(
        self,
        inbox: Mailbox,
        groups: Channel[RolloutGroup],
        turns: Channel[TurnTaken],
        *,
        engine: Callable[[], RolloutEngine],
        device: DeviceThread,
        board: PolicyBoard[Weights],
        decode_text: Callable[[Sequence[int]], str],
        config: ActingConfig,
        handed_over: set[int] | None = None,
        recorded: Mapping[int, ScoredGroup] | None = None,
        report: Reporter | None = None,
    ) -> None:
        """`handed_over` and `recorded` are as for `Rounds`."""
        super().__init__(inbox, [groups, turns], report)
        self._rounds = Rounds(inbox, groups, handed_over=handed_over, recorded=recorded, report=self.report)
        self._turns = turns
        self._make_engine = engine
        self._device = device
        self._board = board
        self._decode_text = decode_text
        self._config = config
        self._asker = next(_ASKERS)
        self._engine: RolloutEngine
        self._at_device = anyio.Lock()  # which gives turns in the order of asking
        self._playing: dict[int, tuple[Table, Episodes]] = {}
        """Group → where it is played, until it is handed over."""
        self._waiting: deque[Prompt] = deque()
        """Free schedule: prompts whose episodes were not begun yet."""
        self._free: Table | None = None
        self._served_by: OpenSession

    @property
    def made(self) -> int:
        """Tokens that the longest turn under way has."""
        return self._engine.tokens if hasattr(self, "_engine") else 0

    async def start(self) -> None:
        """Make the engine on the device thread that will run it."""
        self._engine = await self._device.run(self._make_engine)

    async def handle(self, message: Prompt | Observation) -> None:
        """Begin a round when its prompts are there, or episodes at once; or take an answer to a turn."""
        if isinstance(message, Observation):
            self.inbox.done(message)  # who comes after would ask again
            await self._hear(message)
        elif self._config.most_at_once is not None:
            self._waiting.append(message)
            if self._free is None:
                self._free = Table()
                await self.tasks.start(self._play_free, self._free, self._config.most_at_once)
            self._free.tell()
        elif prompts := self._rounds.gather(message):
            await self.tasks.start(self._play_pinned, prompts)

    async def _hear(self, observation: Observation) -> None:
        if observation.gid not in self._playing or observation.asker != self._asker:
            return
        table, episodes = self._playing[observation.gid]
        if (row := episodes.observe(observation)) is not None:
            table.over.append(row)
        for group in episodes.pop_finished():
            await self._rounds.hand_over(group)
            del self._playing[group.prompt.gid]
        table.tell()

    async def _play_pinned(self, prompts: list[Prompt], *, task_status: TaskStatus[None]) -> None:
        with self.inbox.kept_open():
            task_status.started()
            if await self._rounds.left(prompts, as_one=True):
                step = prompts[0].slot.step
                await self._play_round(prompts, step, self._board.pinned_for(step))
            self._rounds.finish(prompts)

    async def _play_round(self, prompts: Sequence[Prompt], step: int, version: int) -> None:
        table = Table()
        await self._begin(prompts, table)
        with self.report.span("wait for policy", step=step, kind="wait"):
            await self._board.get(version)
        while self._is_played(prompts):
            if table.waiting or not table.ready:
                await table.news()
                continue
            async with self._at_device:
                self._engine.load(await self._board.get(version), version)
                await self._decode(table, step)
        await self._leave(table)

    async def _play_free(self, table: Table, most_at_once: int, *, task_status: TaskStatus[None]) -> None:
        with self.inbox.kept_open():
            task_status.started()
            while await self._turn_over(table):
                if table.ready:
                    await self._decode_newest(table, most_at_once)
                else:
                    await table.news()
                    await anyio.sleep(_GATHERS_S)
            self._free = None
        await self._leave(table)

    async def _turn_over(self, table: Table) -> bool:
        """Be done with prompts whose groups were handed over, and begin those that came → whether any are played."""
        for prompt in [each for each in table.prompts if not self._is_played([each])]:
            table.prompts.remove(prompt)
            self._rounds.finish([prompt])
        table.episodes = [each for each in table.episodes if not each.ended]
        while self._waiting:
            prompt = self._waiting.popleft()
            if await self._rounds.left([prompt], as_one=False):
                table.prompts.append(prompt)
                await self._begin([prompt], table)
            else:
                self._rounds.finish([prompt])
        return bool(table.prompts)

    async def _decode_newest(self, table: Table, most_at_once: int) -> None:
        """Decode what is ready, and what becomes so meanwhile, until nothing is under way."""
        version, weights = await self._board.newer_than(-1)
        self._engine.load(weights, version)
        if table.session is None:
            self._served_by = table.session = await self._device.run(self._engine.open_session, plain=True)
        session = self._served_by
        session.join(table.requests(most_at_once))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._follow, version)
            tasks.start_soon(self._join_more, table, session, most_at_once)
            with self.report.span("generate"):
                while table.under_way:
                    await self._read(table, self._timed(table, self._served(table, session)), None, session.end)
            tasks.cancel_scope.cancel()
        self._engine.release()

    def _served(self, table: Table, session: OpenSession) -> Callable[[], Iterator[list[CompletedTurn]]]:
        """What decodes until nothing is under way. Of rows that have ended, some lie with the others until then."""

        def serve() -> Iterator[list[CompletedTurn]]:
            ended: list[tuple[int, ...]] = []
            for turns in session.serve():
                yield turns
                ended += table.over
                table.forget()
            session.forget(ended)

        return serve

    async def _join_more(self, table: Table, session: OpenSession, most_at_once: int) -> None:
        while True:
            await table.news()
            await self._turn_over(table)
            if table.under_way:  # else it is ending
                session.join(table.requests(most_at_once))

    async def _follow(self, version: int) -> None:
        """Have every version that is newer used from the next token on."""
        while True:
            version, weights = await self._board.newer_than(version)
            self._engine.load(weights, version)

    async def _begin(self, prompts: Sequence[Prompt], table: Table) -> None:
        """Have the environments of these begun."""
        config = self._config
        episodes = Episodes(prompts, config.limits, seed=config.seed, decode_text=self._decode_text)
        table.episodes.append(episodes)
        self._playing |= {prompt.gid: (table, episodes) for prompt in prompts}
        for turn in episodes.openings:
            await self._ask(turn)

    def _is_played(self, prompts: Sequence[Prompt]) -> bool:
        return any(prompt.gid in self._playing for prompt in prompts)

    async def _ask(self, turn: TurnTaken) -> None:
        await self._turns.send(msgspec.structs.replace(turn, asker=self._asker))

    async def _decode(self, table: Table, step: int) -> None:
        """Decode what is ready at a table, together."""
        requests = table.requests()

        def decoding() -> Iterator[list[CompletedTurn]]:
            if table.session is None:
                table.session = self._engine.session(sessions=self._config.sessions)
            table.forget()
            return table.session.decode(requests)

        with self.report.span("generate", step=step):
            await self._read(table, self._timed(table, decoding), step)
            self._engine.release()  # the next step has other weights, and the learner needs room

    async def _read(
        self,
        table: Table,
        decoding: Iterator[_Decoded],
        step: int | None,
        at_rest: Callable[[], None] = lambda: None,
    ) -> None:
        """Ask about each turn when it has ended. `at_rest` is called when none is under way."""
        async with self._device.iterate(decoding, on_leave=partial(self._abandon, table)) as decoded:
            while item := await decoded.next():
                for name, start_s, end_s in item.computed:
                    self.report.record(name, start_s, end_s, step=step)
                for turn in item.turns:
                    await self._ask(table.add(turn))
                if not table.under_way:
                    at_rest()
                table.tell()  # there may be room for others

    def _abandon(self, table: Table) -> None:
        table.is_left = True
        self._engine.abort()

    def _timed(self, table: Table, begin: Callable[[], Iterator[list[CompletedTurn]]]) -> Iterator[_Decoded]:
        """Turns as they end, and when the device worked for them; for its thread."""
        decoding = begin()
        if table.is_left:  # before it began, which has forgotten the abort
            self._engine.abort()
        computed: list[tuple[str, float, float]] = []
        start_s = time.perf_counter()
        for turns in decoding:
            end_s = time.perf_counter()
            computed.append(("decode" if turns else "prefill", start_s, end_s))
            if turns:
                yield _Decoded(turns, computed)
                computed = []
            start_s = time.perf_counter()

    async def _leave(self, table: Table) -> None:
        if table.session is not None:
            await self._device.run(table.session.close, plain=True)
