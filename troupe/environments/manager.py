"""EnvironmentManager: episodes in environments and with tools, each answer at arm's length and asked for once.

A fault of the environment makes its episode *missing* (`failed`) and an incident, and never ends the run, unless the
code has never worked; what a tool raises, or that it takes too long, is told to the policy. Results over
`live.MOST_BYTES` are refused: a tool's with an error that the policy reads, an environment's as a fault. What was
answered before stands in the ledger, and nobody is asked again.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import anyio
import msgspec

from troupe.environments.convention import EnvironmentFault, EnvironmentSpec, Said, World
from troupe.environments.events import Ending, EnvironmentEvents, View
from troupe.environments.gate import Gate, Missing
from troupe.environments.ledger import ENDING, EpisodeLedger, EpisodeName
from troupe.environments.live import Runner
from troupe.environments.processes.runner import ProcessRunner
from troupe.environments.runners import LocalRunner, close_probes
from troupe.environments.seats import Seat, Talk, told
from troupe.environments.settings import EnvironmentConfig
from troupe.environments.turns import answer_turn, open_episode
from troupe.messages import Incident, PromptText
from troupe.messages.episodes import Answer
from troupe.runtime.roles import first_fault, together

_END_S = 5.0
"""That what is under way may take at the end."""


class _Asked:
    """What an episode is being asked."""

    def __init__(self, turn: int, token_ids: tuple[int, ...], task: asyncio.Task[Answer]) -> None:
        self.turn, self.token_ids, self.task = turn, token_ids, task


class EnvironmentManager:
    """Runs the environments and tools of a world. To be started and stopped, or used by `async with`.

    It outlives those who ask: what they have asked for goes on when they are cancelled, and who asks again for the same
    gets the same answer.
    """

    def __init__(
        self,
        world: World,
        config: EnvironmentConfig,
        *,
        ledger: EpisodeLedger | None = None,
        wants_attributes: bool = False,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """`wants_attributes`: whether rewards take `environments`, so that an environment that was lost is brought back
        for its attributes alone. `sleep` and `jitter` pace the retries.

        Raises:
            WorldError: with `run = "process"`, for what was given in Python and cannot be loaded by name.
        """
        self._world, self._config = world, config
        self._ledger = EpisodeLedger() if ledger is None else ledger
        self._wants_attributes = wants_attributes
        self._events = EnvironmentEvents(config)
        self._runner: Runner = ProcessRunner(world, config) if config.run == "process" else LocalRunner(world, config)
        self._gates = {
            name: Gate(spec.label or "of tools", config, partial(self._changed, name), sleep=sleep, jitter=jitter)
            for name, spec in world.environments.items()
        }
        at_once = 1_000_000 if config.run == "process" else config.concurrency
        self._places = anyio.CapacityLimiter(at_once)
        self._talks: dict[int, dict[int, Talk]] = {}
        self._asked: dict[EpisodeName, _Asked] = {}
        self._openings: dict[str, Talk] = {}
        self._aside: set[asyncio.Task[Any]] = set()

    @property
    def ledger(self) -> EpisodeLedger:
        """What was answered."""
        return self._ledger

    @property
    def specs(self) -> Mapping[str, EnvironmentSpec]:
        """What is known of each environment, by name."""
        return self._world.environments

    def schemas(self, environment: str = "") -> list[dict[str, Any]]:
        """Of the tools that the policy may call in an environment; without a name, in the only one."""
        specs = self._world.environments
        return (specs[environment] if environment or "" in specs else next(iter(specs.values()))).schemas

    @property
    def down(self) -> Mapping[str, str]:
        """Environments that are down, by name: why."""
        return {name: gate.why for name, gate in self._gates.items() if gate.why is not None}

    def listen(self, listener: Callable[[Incident], None] | None) -> None:
        """Have one listener called at once with every incident; it must not raise."""
        self._events.listen(listener)

    def trust(self) -> None:
        """Take it that the environments have worked before: their code does not end the run any more."""
        for gate in self._gates.values():
            gate.proven |= {"open", "answer", "end"}

    async def start(self) -> None:
        """Get ready. WorldError where that fails."""
        try:
            if self._config.run != "loop":
                await close_probes(self._world, self._config)
            await self._runner.start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End everything, cancelled or not: nothing is left behind but threads that hang."""
        with anyio.CancelScope(shield=True):
            tasks = [*self._aside, *(asked.task for asked in self._asked.values())]
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=_END_S)
            with anyio.move_on_after(_END_S):
                await together([partial(self._lose, talk) for talk in self._all_talks()])
            self._talks.clear()
            for left in await self._runner.stop():
                self._events.tell("environment_error", left)

    async def __aenter__(self) -> EnvironmentManager:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def open(self, name: EpisodeName, prompt: PromptText, columns: Mapping[str, Any]) -> Answer:
        """Turn 0 of an episode: its environment is reset. `failed` where it cannot be.

        Raises:
            WorldError: for code that has never worked; or columns that are no plain data, for a process.
        """
        talks = self._talks.setdefault(name.gid, {})
        if name.sample not in talks:
            spec = self._world.spec_of(columns)
            if self._world.multi:
                columns = {column: value for column, value in columns.items() if column != "environment"}
            talks[name.sample] = Talk(name, spec, prompt, columns)
        return await self._once(talks[name.sample], 0, (), None)

    async def answer(self, name: EpisodeName, turn: int, token_ids: Sequence[int], said: Said) -> Answer:
        """The answer to a turn, ≥ 1, of an episode that was opened; `failed` where there is none.

        Where another turn of this number was answered before, the episode goes on from the turn before it.

        Raises:
            WorldError: as `open`.
        """
        return await self._once(self._talk(name), turn, tuple(token_ids), said)

    async def close(self, name: EpisodeName, turns: int) -> Ending:
        """How the episode has ended, after so many turns of the policy. Its environment is kept until `settled`.

        Raises:
            WorldError: as `open`.
        """
        talk = self._talk(name)
        answer = await self._once(talk, ENDING, (turns,), None)
        ending = Ending.of(answer)
        talk.attributes = ending.attributes
        return ending

    def environments(self, gid: int) -> list[Any] | None:
        """What rewards get as `environments`, one a sample: the instance where it is in this process, else its public
        attributes, to be read. None where there are only tools."""
        talks = self._talks.get(gid, {})
        if not any(talk.spec.is_live for talk in talks.values()):
            return None
        return [self._shown(talk) for _, talk in sorted(talks.items())]

    def settled(self, gid: int) -> None:
        """The group is scored: its environments may be used for others. Its answers stay in the ledger, until that
        forgets them."""
        for talk in self._talks.pop(gid, {}).values():
            self._begin(self._settle(talk))

    async def _once(self, talk: Talk, turn: int, token_ids: tuple[int, ...], said: Said | None) -> Answer:
        """The answer, which is asked for in a task of its own: whoever waits for it may go."""
        while (asked := self._asked.get(talk.name)) is not None and not asked.task.done():
            if (asked.turn, asked.token_ids) == (turn, token_ids):
                return await asyncio.shield(asked.task)
            await asyncio.wait([asked.task])
        if said is not None:
            talk.said[turn] = said
        answer = self._ledger.find(talk.name, turn, token_ids)
        if answer is not None:
            return answer
        task = asyncio.get_running_loop().create_task(self._ask(talk, turn, token_ids, said))
        self._asked[talk.name] = _Asked(turn, token_ids, task)
        task.add_done_callback(partial(self._was_asked, talk.name))
        return await asyncio.shield(task)

    def _was_asked(self, name: EpisodeName, task: asyncio.Task[Answer]) -> None:
        if (asked := self._asked.get(name)) is not None and asked.task is task:
            del self._asked[name]
        if not task.cancelled():
            task.exception()  # whoever waits has it, if there is somebody

    async def _ask(self, talk: Talk, turn: int, token_ids: tuple[int, ...], said: Said | None) -> Answer:
        began_s = time.perf_counter()
        self._ledger.cut(talk.name, turn)
        before = token_ids[0] + 1 if turn == ENDING else turn
        answers = self._ledger.before(talk.name, before)
        message = said.message if said is not None else {}
        try:
            if answers is None:
                raise Missing(f"turn {before} came before those before it were answered")
            if answers and answers[-1].failed:
                return Answer(said=message, failed=answers[-1].failed)
            answer = await self._asked_at(talk, turn, answers, said)
        except EnvironmentFault as fault:
            kind = fault.kind if isinstance(fault, Missing) else "environment_error"
            self._events.tell(kind, str(fault), talk, turn)
            answer = Answer(said=message, failed=str(fault))
            await self._lose(talk)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._lose(talk)
            raise
        if (found := self._runner.needs_process) is not None:
            self._events.once(
                "environment_needs_process",
                "",
                f'{found} works in a process of its own only; set environment.run = "process"',
            )
        answer = msgspec.structs.replace(answer, seconds=time.perf_counter() - began_s)
        self._ledger.note(talk.name, turn, token_ids, answer)
        return answer

    async def _asked_at(self, talk: Talk, turn: int, answers: list[Answer], said: Said | None) -> Answer:
        gate = self._gates[talk.spec.name]
        if turn == 0:
            self._openings.setdefault(talk.spec.name, talk)
            opened = await gate.run(partial(self._opened, talk), "open", talk.name.gid, again=True)
            self._openings[talk.spec.name] = talk
            return opened
        newest = len(answers) - 1
        if talk.live is not None and talk.seen != newest:  # it has gone on in another way
            await self._lose(talk)
        if turn == ENDING:
            return await gate.run(partial(self._ended, talk, answers), "end", talk.name.gid)
        assert said is not None
        return await gate.run(partial(self._answered, talk, turn, answers, said), "answer", talk.name.gid)

    async def _opened(self, talk: Talk) -> Answer:
        await self._lose(talk)
        async with self._places:
            seat = self._seat(talk, 0, [])
            answer = await _PLAYS.open(talk, seat)
            return await self._saved(talk, 0, seat, answer)

    async def _answered(self, talk: Talk, turn: int, answers: list[Answer], said: Said) -> Answer:
        async with self._places:
            seat = self._seat(talk, turn, answers)
            answer = await _PLAYS.answer(talk, seat, said)
            return await self._saved(talk, turn, seat, answer)

    async def _ended(self, talk: Talk, answers: list[Answer]) -> Answer:
        wanted = talk.spec.has_reward or self._wants_attributes or (talk.live is not None and not talk.live.is_lost)
        if not talk.spec.is_live or not wanted:
            return Ending().answer
        async with self._places:
            seat = self._seat(talk, ENDING, answers)
            try:
                reward, attributes = await seat.end()
            except EnvironmentFault:
                if talk.spec.has_reward or self._wants_attributes:
                    raise
                return Ending().answer
        talk.seen = len(answers) - 1
        if talk.live is not None and talk.live.instance is None:  # what rewards see of it are its attributes
            live, talk.live = talk.live, None
            self._begin(self._runner.give_back(live))
        return Ending(reward=reward, attributes=attributes).answer

    async def _saved(self, talk: Talk, turn: int, seat: Seat, answer: Answer) -> Answer:
        """The answer, with what the environment has saved of itself after it."""
        talk.seen = turn
        if not talk.spec.can_save or not seat.touched:
            return answer
        try:
            return msgspec.structs.replace(answer, saved=await seat.save())
        except Exception as error:
            what = f"environment {talk.spec.label} does not save itself: {told(error)}; it is brought back by repeating"
            self._events.once("environment_unsaved", talk.spec.name, what)
            return answer

    def _seat(self, talk: Talk, turn: int, answers: list[Answer]) -> Seat:
        return Seat(
            talk,
            turn,
            answers,
            self._runner,
            self._config,
            plays=_PLAYS,
            tell=self._events.tell,
            pause=self._gates[talk.spec.name].pause,
        )

    async def _lose(self, talk: Talk) -> None:
        """Its environment is nobody's any more."""
        live, talk.live, talk.seen = talk.live, None, -1
        if live is not None:
            await self._runner.throw_away(live)

    async def _settle(self, talk: Talk) -> None:
        if (asked := self._asked.get(talk.name)) is not None:
            await asyncio.wait([asked.task])
        if (live := talk.live) is not None:
            talk.live = None
            await self._runner.give_back(live)

    def _talk(self, name: EpisodeName) -> Talk:
        talk = self._talks.get(name.gid, {}).get(name.sample)
        if talk is None:
            raise ValueError(f"sample {name.sample} of group {name.gid} was not opened, or is settled")
        return talk

    def _all_talks(self) -> Iterator[Talk]:
        for talks in self._talks.values():
            yield from talks.values()

    def _shown(self, talk: Talk) -> Any:
        live = talk.live
        if live is not None and live.instance is not None and not live.is_lost:
            return live.instance
        return View(talk.spec.label, talk.attributes or {})

    def _begin(self, work: Coroutine[Any, Any, object]) -> None:
        """Have something done aside."""
        task = asyncio.get_running_loop().create_task(work)
        self._aside.add(task)
        task.add_done_callback(self._is_done)

    def _is_done(self, task: asyncio.Task[Any]) -> None:
        self._aside.discard(task)
        if not task.cancelled():
            task.exception()  # an environment that is thrown away may answer with anything

    def _changed(self, name: str, why: str | None, down_s: float) -> None:
        gate = self._gates[name]
        self._events.changed(gate.label, why, down_s)
        if why is not None:  # or nobody might try whether it is back
            self._begin(gate.run(partial(self._probed, self._openings[name]), "open", -1, again=True))

    async def _probed(self, like: Talk) -> None:
        talk = Talk(like.name, like.spec, like.prompt, like.columns)
        await self._opened(talk)
        if talk.live is not None:
            await self._runner.give_back(talk.live)


class _Plays:
    """How turns are played."""

    async def open(self, talk: Talk, seat: Any) -> Answer:
        """The opening."""
        return await self._alone(open_episode(talk.spec, seat, talk.prompt, talk.columns))

    async def answer(self, talk: Talk, seat: Any, said: Said) -> Answer:
        """A turn."""
        return await self._alone(answer_turn(talk.spec, seat, said))

    async def _alone(self, playing: Coroutine[Any, Any, Answer]) -> Answer:
        try:
            return await playing
        except BaseExceptionGroup as group:  # of tools that are called together
            raise first_fault(group) from None


_PLAYS = _Plays()
