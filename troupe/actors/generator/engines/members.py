"""EngineMembers: external engines, servers of other programs, as members of a crew; in the free schedule only.

An engine takes prompts while it has room, each completed with the newest weights at that moment, and hands its groups
over whole. One that is down, or answers what is of no use, gives back what it has and is tried again later; the others
go on.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

import anyio

from troupe.actors.generator.crew import Crew
from troupe.actors.generator.engines.answers import EngineDownError, EngineRefusedError, Sampled
from troupe.actors.generator.engines.dialects import Held
from troupe.actors.generator.engines.engine import Engine
from troupe.actors.generator.engines.folders import EngineFolders
from troupe.actors.generator.engines.server import EngineServer
from troupe.actors.generator.parts import Part
from troupe.errors import RunError
from troupe.messages import Incident, MemberStatus, RolloutGroup
from troupe.policy import Weights
from troupe.runtime.backoff import backoff_s
from troupe.runtime.device import DeviceThread

_LONGEST_PAUSE_S = 10.0
_FAREWELL_S = 5.0
_CHECKED_EVERY = 10
"""Versions of an adapter, of which the first, as of one that a run begins with, may change nothing."""
_NOISE = 0.05
"""Nats by which kernels and types may make log-probs differ."""
_APART = 1.0
"""Nats by which an engine's log-probs may differ from ours in the mean: other kernels and types make hundredths, four
bits a weight a few tenths, another model several."""

LogProbs = Callable[[Weights, Sequence[int], Sequence[int]], list[float]]
"""(weights, prompt, completion) → what the learner's own network says of each token; on the device's thread."""


class EngineMembers:
    """A source of members: the engines that the config names."""

    def __init__(
        self,
        servers: Sequence[EngineServer],
        *,
        folders: Mapping[str | None, EngineFolders],
        device: DeviceThread,
        probe_ids: tuple[int, ...],
        own_log_probs: LogProbs,
        alone: bool = True,
        first_pause_s: float = 0.5,
    ) -> None:
        """`folders`: by `weights_folder`. `device`: the thread that writes weights. `probe_ids`: a prompt of the run.
        `own_log_probs`: what tells an engine with another model. `alone`: nobody else decodes. `first_pause_s`: before
        an engine that failed is tried again; each further one in a row is twice as long."""
        self._engines = [Engine(server) for server in servers]
        self._folders = folders
        self._device = device
        self._probe_ids = probe_ids
        self._own_log_probs = own_log_probs
        self._first_adapter: tuple[int, Weights] | None = None
        self._alone = alone
        self._first_pause_s = first_pause_s

    async def run(self, crew: Crew) -> None:
        """Have the engines take prompts. RunError where one cannot be used from the beginning."""
        try:
            async with anyio.create_task_group() as tasks:
                for engine in self._engines:
                    tasks.start_soon(self._serve, engine, crew)
        finally:
            for folders in self._folders.values():
                folders.close()

    def statuses(self) -> Sequence[MemberStatus]:
        return [engine.status() for engine in self._engines]

    @property
    def needs(self) -> str:
        """What is waited for, where no engine can take prompts."""
        if not self._alone or any(engine.state in ("working", "ended") for engine in self._engines):
            return ""
        engine = self._engines[0]
        return f"waiting for engine {engine.name}" + (f": {engine.detail}" if engine.detail else "")

    async def finish(self) -> None:
        """Have the engines forget what they were given."""
        for engine in self._engines:
            engine.state = "ended"
            held = [] if engine.held is None or engine.server.way == "none" else [*engine.old, engine.held]
            with suppress(EngineDownError, EngineRefusedError), anyio.move_on_after(_FAREWELL_S):
                for each in held:
                    await engine.server.dialect.forget(each)

    async def _serve(self, engine: Engine, crew: Crew) -> None:
        while True:
            try:
                await self._make_ready(engine, crew)
                await self._work(engine, crew)
            except (EngineDownError, EngineRefusedError) as error:
                await self._set_aside(engine, crew, error)
            await anyio.sleep(backoff_s(engine.failures, self._first_pause_s, _LONGEST_PAUSE_S))

    async def _make_ready(self, engine: Engine, crew: Crew) -> None:
        """See that it is there, can be used, and has the newest weights."""
        await engine.server.probe(self._probe_ids)
        if engine.server.way != "none":
            await engine.server.dialect.tidy()
        async with self._using_newest(engine, crew):
            pass
        if engine.failures:
            await self._tell(crew, "engine_back", f"engine {engine.name} answers again, and takes prompts")
        engine.ready()

    async def _set_aside(self, engine: Engine, crew: Crew, error: EngineDownError | EngineRefusedError) -> None:
        crew.renew(engine, ())
        engine.parts.clear()
        for version in tuple(engine.lent):
            self._give_back(engine, version)
        engine.old, engine.held, engine.checked_version = [], None, None
        is_refused = isinstance(error, EngineRefusedError)
        engine.state, engine.detail = ("refused" if is_refused else "lost"), str(error)
        if is_refused and not engine.was_ready:
            raise RunError(f"engine {engine.name} cannot be used: {error}")
        engine.failures += 1
        if engine.failures == 1:
            kind = "engine_refused" if is_refused else "engine_lost"
            had = "what it had goes to others, and " if engine.was_ready else ""
            message = f"engine {engine.name}: {error}; {had}it is tried again from time to time"
            await self._tell(crew, kind, message)

    async def _work(self, engine: Engine, crew: Crew) -> None:
        """Take prompts and complete them, until one cannot be completed."""
        failed: list[tuple[Part, EngineDownError | EngineRefusedError]] = []
        async with anyio.create_task_group() as decodes:

            async def decode(part: Part) -> None:
                try:
                    await self._decode(engine, crew, part)
                except (EngineDownError, EngineRefusedError) as error:
                    failed.append((part, error))
                    decodes.cancel_scope.cancel()

            while True:
                freed = engine.freed
                if (room := engine.server.config.most - len(engine.parts)) < 1:
                    await freed.wait()
                    continue
                for part in await crew.take(engine, most=room, rows=False):
                    engine.parts.add(part.name)
                    decodes.start_soon(decode, part)
        if failed:  # else it was cancelled from outside
            part, error = failed[0]
            if isinstance(error, EngineRefusedError) or error.of_request:
                crew.lost(engine, str(error), [part.name])
            raise error

    async def _decode(self, engine: Engine, crew: Crew, part: Part) -> None:
        for prompt in part.prompts:
            async with self._using_newest(engine, crew) as held:
                with engine.span(crew.report, part.step, prompt.gid):
                    rollouts = await engine.server.complete(prompt, held)
            engine.made(rollouts)
            with anyio.CancelScope(shield=True):  # else a group could be lost that counts as handed over
                await crew.completed(engine, RolloutGroup(prompt=prompt, rollouts=rollouts))
        engine.done_with(part.name)
        await self._forget_old(engine)

    @asynccontextmanager
    async def _using_newest(self, engine: Engine, crew: Crew) -> AsyncIterator[Held]:
        """The newest weights, which it then has; they stay there meanwhile."""
        while engine.held is None or engine.held.version < self._wanted(engine, crew):
            async with engine.changing:
                if engine.held is None or engine.held.version < self._wanted(engine, crew):
                    await self._change(engine, crew)
        held = engine.held
        engine.users[held.version] += 1
        try:
            yield held
        finally:
            engine.users[held.version] -= 1
            engine.left.set()
            engine.left = anyio.Event()

    def _wanted(self, engine: Engine, crew: Crew) -> int:
        return 0 if engine.server.way == "none" else crew.board.version

    async def _change(self, engine: Engine, crew: Crew) -> None:
        """Give it the newest weights."""
        server = engine.server
        replaces = server.dialect.replaces(server.way)
        while replaces and engine.users.total():
            await engine.left.wait()
        version, weights = await crew.board.newer_than(-1)
        if server.way == "none":
            if version == 0:  # else nobody has these weights any more
                await self._check(engine, weights, server.as_begun)
            engine.held = server.as_begun
            return
        folders = self._folders_of(engine)
        folders.lend(version)
        engine.lent.append(version)
        with crew.report.span("write weights"):
            folder = await self._device.run(folders.write, version, weights)
        with crew.report.span("load weights"):
            held = await server.dialect.load(server.way, version, folder)
            if self._is_due(engine, version):
                await self._check(engine, weights, held)
        if engine.held is not None:
            engine.old.append(engine.held)
        engine.held = held
        await self._forget_old(engine)

    async def _check(self, engine: Engine, weights: Weights, held: Held) -> None:
        """EngineRefusedError where it samples from another model."""
        sampled = await engine.server.sample_some(self._probe_ids, held)
        apart = await self._apart(weights, sampled)
        if not apart <= _APART:
            raise EngineRefusedError(
                f"its log-probs differ from the learner's by {apart:.2g} nats a token (at most {_APART:g} are "
                "allowed): it has another model, or the weights did not reach it"
            )
        engine.checked_version = held.version
        if engine.server.way != "adapter":
            return
        if self._first_adapter is None:
            self._first_adapter = held.version, weights
        version, first = self._first_adapter
        if apart > _NOISE and 2.0 * (from_first := await self._apart(first, sampled)) < apart:
            raise EngineRefusedError(
                f"its log-probs are {apart:.2g} nats a token from those of version {held.version}, and "
                f"{from_first:.2g} from those of version {version}: new adapters do not reach it"
            )

    async def _apart(self, weights: Weights, sampled: Sampled) -> float:
        """Mean difference between an engine's log-probs and ours, in nats."""
        own = await self._device.run(self._own_log_probs, weights, self._probe_ids, sampled.token_ids)
        return sum(abs(a - b) for a, b in zip(own, sampled.log_probs, strict=True)) / len(own)

    def _is_due(self, engine: Engine, version: int) -> bool:
        """Whether log-probs are to be compared with those of weights that it is given."""
        server, checked = engine.server, engine.checked_version
        if checked is None or server.dialect.replaces(server.way):
            return True
        return server.way == "adapter" and version >= checked + _CHECKED_EVERY

    async def _forget_old(self, engine: Engine) -> None:
        """Let go of weights that nothing is asked of any more."""
        for held in [old for old in engine.old if not engine.users[old.version]]:
            engine.old.remove(held)
            with suppress(EngineDownError, EngineRefusedError):
                await engine.server.dialect.forget(held)
            self._give_back(engine, held.version)

    def _give_back(self, engine: Engine, version: int) -> None:
        engine.lent.remove(version)
        self._folders_of(engine).give_back(version)

    def _folders_of(self, engine: Engine) -> EngineFolders:
        return self._folders[engine.server.config.weights_folder]

    async def _tell(self, crew: Crew, kind: str, message: str) -> None:
        await crew.report.incident(Incident(actor=crew.report.actor, kind=kind, message=message))
