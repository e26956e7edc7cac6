"""Answering the turns of episodes: each in its turn at the gate, on a handle of its own, and saved afterwards."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection, Coroutine
from functools import partial
from typing import Any

import anyio
import msgspec

from troupe.environments.convention import EnvironmentFault, Said, World
from troupe.environments.events import Ending, EnvironmentEvents
from troupe.environments.gate import Gate
from troupe.environments.handles import Handle, Talk, told
from troupe.environments.ledger import ENDING
from troupe.environments.live import Died, Gone, Late, Raised, Runner
from troupe.environments.processes.runner import ProcessRunner
from troupe.environments.runners import LocalRunner
from troupe.environments.settings import EnvironmentConfig
from troupe.environments.turns import answer_turn, open_episode
from troupe.errors import WorldError
from troupe.messages.episodes import Answer
from troupe.runtime.elsewhere import Elsewhere
from troupe.runtime.roles import first_fault

_END_S = 5.0
"""That a task which was cancelled may take to end."""
_ANY_NUMBER = 1_000_000


class Errands:
    """Tasks that nobody waits for."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def begin(self, work: Coroutine[Any, Any, object]) -> None:
        """Have something done."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._is_done)

    async def end(self, grace_s: float) -> None:
        """Wait for all of them, and cancel those that take longer."""
        await ended(self._tasks, grace_s)

    def _is_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # an environment that is thrown away may answer with anything


async def ended(tasks: Collection[asyncio.Task[Any]], grace_s: float) -> None:
    """Wait for tasks, and cancel those that take longer."""
    for seconds in (grace_s, _END_S):
        tasks = [task for task in tasks if not task.done()]
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)
            for task in tasks:
                task.cancel()


class Answerer:
    """Asking the turns of all episodes of a world."""

    def __init__(
        self,
        world: World,
        config: EnvironmentConfig,
        events: EnvironmentEvents,
        *,
        wants_attributes: bool = False,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
        jitter: Callable[[], float] = random.random,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        """`elsewhere`: where other machines are.

        Raises:
            WorldError: where it runs in processes, for what was given in Python and cannot be loaded by name; where it
                runs on other machines, and there are none.
        """
        self._config, self.events, self._wants_attributes = config, events, wants_attributes
        self.errands, self.tries = Errands(), Errands()
        self.runner = _runner(world, config, events, elsewhere)
        self.gates = {
            name: Gate(spec.label or "of tools", config, partial(self._changed, name), sleep=sleep, jitter=jitter)
            for name, spec in world.environments.items()
        }
        in_processes = isinstance(self.runner, ProcessRunner)
        self._places = anyio.CapacityLimiter(_ANY_NUMBER if in_processes else config.concurrency)
        self._openings: dict[str, Talk] = {}
        """By environment, the newest that has succeeded, or the first: what it is tried with whether it is back."""

    async def ask(self, talk: Talk, turn: int, answers: list[Answer], said: Said | None) -> Answer:
        """The answer to a turn, or how the episode has ended (`ENDING`), after these answers.

        Raises:
            EnvironmentFault: where there is none, and the episode is missing.
            WorldError: for code that has never worked.
        """
        gate = self.gates[talk.spec.name]
        if turn == 0:
            self._openings.setdefault(talk.spec.name, talk)
            opened = await gate.run(partial(self._opened, talk), "open", talk.name.gid, again=True)
            self._openings[talk.spec.name] = talk
            return opened
        newest = len(answers) - 1
        if talk.live is not None and talk.seen != newest:  # it has gone on in another way
            self.lose(talk)
        if turn == ENDING:
            return await gate.run(partial(self._ended, talk, answers), "end", talk.name.gid)
        assert said is not None
        return await gate.run(partial(self._answered, talk, turn, answers, said), "answer", talk.name.gid)

    async def _opened(self, talk: Talk) -> Answer:
        self.lose(talk)
        async with self._places:
            handle = self._handle(talk, 0, [])
            answer = await _ASKING.open(talk, handle)
            return await self._saved(talk, 0, handle, answer)

    async def _answered(self, talk: Talk, turn: int, answers: list[Answer], said: Said) -> Answer:
        async with self._places:
            handle = self._handle(talk, turn, answers)
            answer = await _ASKING.answer(talk, handle, said)
            return await self._saved(talk, turn, handle, answer)

    async def _ended(self, talk: Talk, answers: list[Answer]) -> Answer:
        wanted = talk.spec.has_reward or self._wants_attributes or (talk.live is not None and not talk.live.is_lost)
        if not talk.spec.is_live or not wanted:
            return Ending().answer
        async with self._places:
            handle = self._handle(talk, ENDING, answers)
            try:
                reward, attributes = await handle.end()
            except EnvironmentFault:
                if talk.spec.has_reward or self._wants_attributes:
                    raise
                return Ending().answer
        talk.seen = len(answers) - 1
        live = talk.live
        if live is not None and (live.instance is None or not self._wants_attributes):  # else rewards look at it
            talk.live = None
            self.errands.begin(self.runner.give_back(live))
        return Ending(reward=reward, attributes=attributes).answer

    async def _saved(self, talk: Talk, turn: int, handle: Handle, answer: Answer) -> Answer:
        """The answer, with what the environment has saved of itself after it."""
        talk.seen = turn
        if not talk.spec.can_save or not handle.touched:
            return answer
        try:
            return msgspec.structs.replace(answer, saved=await handle.save())
        except (Died, Gone):  # that the process is gone shows when it is next needed
            return answer
        except (Raised, Late) as error:
            what = f"environment {talk.spec.label} does not save itself: {told(error)}; it is brought back by repeating"
            self.events.once("environment_unsaved", talk.spec.name, what)
            return answer

    def _handle(self, talk: Talk, turn: int, answers: list[Answer]) -> Handle:
        return Handle(
            talk,
            turn,
            answers,
            self.runner,
            self._config,
            asking=_ASKING,
            tell=self.events.tell,
            pause=self.gates[talk.spec.name].pause,
        )

    def lose(self, talk: Talk) -> None:
        """Its environment is nobody's any more."""
        live, talk.live, talk.seen = talk.live, None, -1
        if live is not None:
            self.errands.begin(self.runner.throw_away(live))

    def _changed(self, name: str, why: str | None, down_s: float) -> None:
        gate = self.gates[name]
        self.events.changed(gate.label, why, down_s)
        if why is not None:  # or nobody might try whether it is back
            self.tries.begin(gate.run(partial(self._probed, self._openings[name]), "open", -1, again=True))

    async def _probed(self, like: Talk) -> None:
        talk = Talk(like.name, like.spec, like.prompt, like.columns)
        await self._opened(talk)
        if talk.live is not None:
            await self.runner.give_back(talk.live)


def _runner(world: World, config: EnvironmentConfig, events: EnvironmentEvents, elsewhere: Elsewhere | None) -> Runner:
    if config.run == "process":
        return ProcessRunner(world, config)
    if config.run != "worker":
        return LocalRunner(world, config)
    if elsewhere is None:
        raise WorldError(
            'environment.run = "worker" needs a run that workers can join; give --serve HOST:PORT, or run it in a '
            '"process"'
        )
    return ProcessRunner(world, config, elsewhere, events.machines_changed)


class _Asking:
    """How turns are asked."""

    async def open(self, talk: Talk, handle: Any) -> Answer:
        """The opening."""
        return await self._alone(open_episode(talk.spec, handle, talk.prompt, talk.columns))

    async def answer(self, talk: Talk, handle: Any, said: Said) -> Answer:
        """A turn."""
        return await self._alone(answer_turn(talk.spec, handle, said))

    async def _alone(self, asked: Coroutine[Any, Any, Answer]) -> Answer:
        try:
            return await asked
        except BaseExceptionGroup as group:  # of tools that are called together
            raise first_fault(group) from None


_ASKING = _Asking()
