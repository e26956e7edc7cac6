"""EnvironmentManager: episodes in environments and with tools, each answer at arm's length and asked for once.

A fault of the environment makes its episode *missing* (`failed`) and an incident, and never ends the run, unless the
code has never worked; what a tool raises, or that it takes too long, is told to the policy. Results over
`live.MOST_BYTES` are refused: a tool's with an error that the policy reads, an environment's as a fault. What was
answered before stands in the ledger, and nobody is asked again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import anyio
import msgspec

from troupe.environments.answering import Answerer, ended
from troupe.environments.convention import EnvironmentFault, EnvironmentSpec, Said, World
from troupe.environments.events import Ending, EnvironmentEvents, View
from troupe.environments.gate import Missing
from troupe.environments.handles import Talk
from troupe.environments.ledger import ENDING, EpisodeLedger, EpisodeName
from troupe.environments.runners import close_probes
from troupe.environments.settings import EnvironmentConfig
from troupe.messages import Incident, PromptText
from troupe.messages.episodes import Answer
from troupe.runtime.elsewhere import Elsewhere

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
        elsewhere: Elsewhere | None = None,
    ) -> None:
        """`wants_attributes`: whether rewards take `environments`, so that instances in this process are kept until
        `settled`, and one that was lost is brought back for its attributes alone. `sleep` and `jitter` pace the
        retries. `elsewhere`: where other machines are, for `run = "worker"`.

        Raises:
            WorldError: where it runs in processes, for what was given in Python and cannot be loaded by name; where it
                runs on other machines, and there are none.
        """
        self._world, self._config = world, config
        self._ledger = EpisodeLedger() if ledger is None else ledger
        self._events = EnvironmentEvents(config)
        self._answerer = Answerer(
            world,
            config,
            self._events,
            wants_attributes=wants_attributes,
            sleep=sleep,
            jitter=jitter,
            elsewhere=elsewhere,
        )
        self._talks: dict[int, dict[int, Talk]] = {}
        self._asked: dict[EpisodeName, _Asked] = {}

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
        awaited = self._answerer.runner.awaited
        whys = {name: awaited if gate.why is None else gate.why for name, gate in self._answerer.gates.items()}
        return {name: why for name, why in whys.items() if why is not None}

    def listen(self, listener: Callable[[Incident], None] | None) -> None:
        """Have one listener called at once with every incident; it must not raise."""
        self._events.listen(listener)

    def name_sets(self, names: Sequence[str]) -> None:
        """The sets that are evaluated, so that incidents name them."""
        self._events.sets = tuple(names)

    def trust(self) -> None:
        """Take it that the environments have worked before: their code does not end the run any more."""
        for gate in self._answerer.gates.values():
            gate.proven |= {"open", "answer", "end"}

    async def start(self) -> None:
        """Get ready. WorldError where that fails."""
        try:
            if self._config.run != "loop":
                await close_probes(self._world, self._config)
            await self._answerer.runner.start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End everything, cancelled or not: nothing is left behind but threads that hang."""
        with anyio.CancelScope(shield=True):
            await self._answerer.tries.end(0.0)
            await ended([asked.task for asked in self._asked.values()], 0.0)
            for talk in self._all_talks():
                self._answerer.lose(talk)
            self._talks.clear()
            await self._answerer.errands.end(_END_S)
            for left in await self._answerer.runner.stop():
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
        """How the episode has ended, after so many turns of the policy, of which those that were asked for count.

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
            self._answerer.errands.begin(self._settle(talk))

    def forget(self, gid: int) -> None:
        """The group is closed: nobody will ask for any of it again."""
        self.settled(gid)
        self._ledger.forget(gid)

    async def _once(self, talk: Talk, turn: int, token_ids: tuple[int, ...], said: Said | None) -> Answer:
        """The answer, which is asked for in a task of its own: whoever waits for it may go."""
        while (answer := self._ledger.find(talk.name, turn, token_ids)) is None:
            asked = self._asked.get(talk.name)
            if asked is None or asked.task.done():
                break
            if (asked.turn, asked.token_ids) == (turn, token_ids):
                return await asyncio.shield(asked.task)
            await asyncio.wait([asked.task])
        if said is not None:
            talk.said[turn] = said
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
        began_s = anyio.current_time()
        self._ledger.cut(talk.name, turn)
        before = token_ids[0] + 1 if turn == ENDING else turn
        answers = self._ledger.before(talk.name, before)
        message = said.message if said is not None else {}
        if (not answers and turn) or len(answers) < turn:
            raise ValueError(f"turn {turn} of {talk.name} came before those before it were answered")
        try:
            if answers and answers[-1].failed:
                answer = Answer(said=message, failed=answers[-1].failed)
            else:
                answer = await self._answerer.ask(talk, turn, answers, said)
        except EnvironmentFault as fault:
            kind = fault.kind if isinstance(fault, Missing) else "environment_error"
            self._events.tell(kind, str(fault), talk, turn)
            answer = Answer(said=message, failed=str(fault))
            self._answerer.lose(talk)
        except BaseException:
            self._answerer.lose(talk)
            raise
        if (found := self._answerer.runner.needs_process) is not None:
            self._events.once(
                "environment_needs_process",
                "",
                f'{found} works in a process of its own only; set environment.run = "process"',
            )
        answer = msgspec.structs.replace(answer, seconds=anyio.current_time() - began_s)
        self._ledger.note(talk.name, turn, token_ids, answer)
        return answer

    async def _settle(self, talk: Talk) -> None:
        if (asked := self._asked.get(talk.name)) is not None:
            await asyncio.wait([asked.task])
        if (live := talk.live) is not None:
            talk.live = None
            await self._answerer.runner.give_back(live)

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
