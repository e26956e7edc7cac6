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
from troupe.actors.generator.parts import Part, parts_of
from troupe.actors.generator.pool import Pool
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
    """Parts of rounds that are under way at once, at most."""
    parts: int = 1
    """`schedule.parts`, in the pinned schedule."""
    most_at_once: int | None = None
    """Prompts whose turns are decoded together in the free schedule, at most; None: the schedule is pinned."""


class _Decoded(NamedTuple):
    """What is complete at one token."""

    turns: list[CompletedTurn]
    computed: list[tuple[str, float, float]]
    """What the device did since the one before, and when."""


class ActingGenerator(Actor):
    """Receives Prompt and Observation; sends TurnTaken, and RolloutGroup when a group's last episode has ended.

    Pinned schedule: the episodes of a part of a round are decoded in turns: turn t of all that go on, in slot order,
    together, when all their observations are there. So what is decoded together is a function of slots and tokens,
    however long an environment takes. Several parts are under way, each with the version that its step is pinned to;
    their turns take the device one after the other, in the order in which they are ready, which changes no bit of any.

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
        self._sessions = anyio.Semaphore(config.sessions)
        self._at_device = anyio.Lock()  # both give turns in the order of asking
        self._open: dict[int, tuple[Pool, Episodes]] = {}
        """Group → what it is decoded with, until it is handed over."""
        self._waiting: deque[Prompt] = deque()
        """Free schedule: prompts whose episodes were not begun yet."""
        self._free: Pool | None = None
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
                self._free = Pool()
                await self.tasks.start(self._run_free, self._free, self._config.most_at_once)
            self._free.tell()
        elif prompts := self._rounds.gather(message):
            await self.tasks.start(self._run_pinned, prompts)

    async def _hear(self, observation: Observation) -> None:
        if observation.gid not in self._open or observation.asker != self._asker:
            return
        pool, episodes = self._open[observation.gid]
        if (row := episodes.observe(observation)) is not None:
            pool.over.append(row)
        for group in episodes.pop_finished():
            await self._rounds.hand_over(group)
            del self._open[group.prompt.gid]
        pool.tell()

    async def _run_pinned(self, prompts: list[Prompt], *, task_status: TaskStatus[None]) -> None:
        with self.inbox.kept_open():
            task_status.started()
            version = self._board.pinned_for(prompts[0].slot.step)
            async with anyio.create_task_group() as tasks:
                for part in parts_of(prompts, self._config.parts, version):
                    if await self._rounds.left(part.prompts, as_one=True):
                        tasks.start_soon(self._run_part, part, version)
            self._rounds.finish(prompts)

    async def _run_part(self, part: Part, version: int) -> None:
        async with self._sessions:
            await self._run_episodes(part, version)

    async def _run_episodes(self, part: Part, version: int) -> None:
        prompts, step = part.prompts, part.step
        pool = Pool()
        await self._begin(prompts, pool)
        with self.report.span("wait for policy", step=step, kind="wait"):
            await self._board.get(version)
        while self._are_open(prompts):
            if pool.waiting or not pool.ready:
                await pool.news()
                continue
            async with self._at_device, self._device.turn(self.report, step=step):
                self._engine.load(await self._board.get(version), version)
                await self._decode(pool, step, part.name)
        await self._leave(pool)

    async def _run_free(self, pool: Pool, most_at_once: int, *, task_status: TaskStatus[None]) -> None:
        with self.inbox.kept_open():
            task_status.started()
            while await self._turn_over(pool):
                if pool.ready:
                    await self._decode_newest(pool, most_at_once)
                else:
                    await pool.news()
                    await anyio.sleep(_GATHERS_S)
            self._free = None
        await self._leave(pool)

    async def _turn_over(self, pool: Pool) -> bool:
        """Be done with prompts whose groups were handed over, and begin those that came → whether any are open."""
        for prompt in [each for each in pool.prompts if not self._are_open([each])]:
            pool.prompts.remove(prompt)
            self._rounds.finish([prompt])
        pool.episodes = [each for each in pool.episodes if not each.ended]
        while self._waiting:
            prompt = self._waiting.popleft()
            if await self._rounds.left([prompt], as_one=False):
                pool.prompts.append(prompt)
                await self._begin([prompt], pool)
            else:
                self._rounds.finish([prompt])
        return bool(pool.prompts)

    async def _decode_newest(self, pool: Pool, most_at_once: int) -> None:
        """Decode what is ready, and what becomes so meanwhile, until nothing is under way."""
        async with self._device.turn(self.report):
            await self._decode_newest_now(pool, most_at_once)

    async def _decode_newest_now(self, pool: Pool, most_at_once: int) -> None:
        version, weights = await self._board.newer_than(-1)
        self._engine.load(weights, version)
        if pool.session is None:
            self._served_by = pool.session = await self._device.run(self._engine.open_session, plain=True)
        session = self._served_by
        session.join(pool.requests(most_at_once))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._follow, version)
            tasks.start_soon(self._join_more, pool, session, most_at_once)
            with self.report.span("generate"):
                while pool.under_way:
                    await self._read(pool, self._timed(pool, self._served(pool, session)), None, session.end)
            tasks.cancel_scope.cancel()
        self._engine.release()

    def _served(self, pool: Pool, session: OpenSession) -> Callable[[], Iterator[list[CompletedTurn]]]:
        """What decodes until nothing is under way. Of rows that have ended, some lie with the others until then."""

        def serve() -> Iterator[list[CompletedTurn]]:
            ended: list[tuple[int, ...]] = []
            for turns in session.serve():
                yield turns
                ended += pool.over
                pool.forget()
            session.forget(ended)

        return serve

    async def _join_more(self, pool: Pool, session: OpenSession, most_at_once: int) -> None:
        """What becomes ready goes along, as long as nobody else waits for the device: else it would never be free."""
        while True:
            await pool.news()
            await self._turn_over(pool)
            if pool.under_way and not self._device.turns.is_wanted:  # else it is ending
                session.join(pool.requests(most_at_once))

    async def _follow(self, version: int) -> None:
        """Have every version that is newer used from the next token on."""
        while True:
            version, weights = await self._board.newer_than(version)
            self._engine.load(weights, version)

    async def _begin(self, prompts: Sequence[Prompt], pool: Pool) -> None:
        """Have the environments of these begun."""
        config = self._config
        episodes = Episodes(prompts, config.limits, seed=config.seed, decode_text=self._decode_text)
        pool.episodes.append(episodes)
        self._open |= {prompt.gid: (pool, episodes) for prompt in prompts}
        for turn in episodes.openings:
            await self._ask(turn)

    def _are_open(self, prompts: Sequence[Prompt]) -> bool:
        return any(prompt.gid in self._open for prompt in prompts)

    async def _ask(self, turn: TurnTaken) -> None:
        await self._turns.send(msgspec.structs.replace(turn, asker=self._asker))

    async def _decode(self, pool: Pool, step: int, part: str) -> None:
        """Decode what is ready at a pool, together."""
        requests = pool.requests()

        def decoding() -> Iterator[list[CompletedTurn]]:
            if pool.session is None:
                pool.session = self._engine.session(sessions=self._config.sessions)
            pool.forget()
            return pool.session.decode(requests)

        with self.report.span("generate", step=step, part=part):
            await self._read(pool, self._timed(pool, decoding), step)
            self._engine.release()  # the next step has other weights, and the learner needs room

    async def _read(
        self,
        pool: Pool,
        decoding: Iterator[_Decoded],
        step: int | None,
        at_rest: Callable[[], None] = lambda: None,
    ) -> None:
        """Ask about each turn when it has ended. `at_rest` is called when none is under way."""
        async with self._device.iterate(decoding, on_leave=partial(self._abandon, pool)) as decoded:
            while item := await decoded.next():
                for name, start_s, end_s in item.computed:
                    self.report.record(name, start_s, end_s, step=step)
                for turn in item.turns:
                    await self._ask(pool.add(turn))
                if not pool.under_way:
                    at_rest()
                pool.tell()  # there may be room for others

    def _abandon(self, pool: Pool) -> None:
        pool.is_left = True
        self._engine.abort()

    def _timed(self, pool: Pool, begin: Callable[[], Iterator[list[CompletedTurn]]]) -> Iterator[_Decoded]:
        """Turns as they end, and when the device worked for them; for its thread."""
        decoding = begin()
        if pool.is_left:  # before it began, which has forgotten the abort
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

    async def _leave(self, pool: Pool) -> None:
        if pool.session is not None:
            await self._device.run(pool.session.close, plain=True)
