"""Rewards and environments that a worker runs for a run: the worker's side of `calls.py`.

What a run asks for is begun only where the worker's owner has named it, by the owner's own name for it: a run sends no
code and no path. Each thing has a process of its own, which is killed when the run says so, or when the worker ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import anyio
import anyio.abc

from troupe.cluster.call_wire import (
    DONE,
    MOST_BYTES,
    MOST_SESSIONS,
    PULL,
    WAIT_S,
    Begin,
    Done,
    Offered,
    Piece,
    Pull,
    decode_orders,
)
from troupe.cluster.wire import Offer, RunState
from troupe.environments.adapters import ADAPTERS
from troupe.environments.processes import asking as environments
from troupe.environments.processes.wire import Broken as BrokenWorld
from troupe.environments.processes.wire import Load
from troupe.environments.settings import EnvironmentConfig
from troupe.errors import ConfigError, RunError, sayable
from troupe.rewards.loading import is_own
from troupe.rewards.processes import asking as rewards
from troupe.rewards.processes.calls import Broken
from troupe.runtime.elsewhere import Code, Service, ServiceKind
from troupe.runtime.frames import FrameError, encode
from troupe.runtime.machine import VERSION
from troupe.runtime.process import ChildProcess
from troupe.runtime.roles import first_fault

_ENDED = 4096
"""Names of processes that have ended, kept so that none is begun twice."""


class Asks(Protocol):
    """The part of a link that is needed here."""

    async def ask(self, verb: str, body: bytes = b"", *, wait_s: float = 10.0) -> bytes:
        """The answer, however often it takes to ask."""


class _Refused(Exception):  # noqa: N818 - it says what happened
    """This may not run here."""


class OwnCode:
    """What the owner of a worker lets run there."""

    def __init__(
        self,
        offers: Collection[Offer],
        rewards: Sequence[str] = (),
        environments: Sequence[str] = (),
        tools: Sequence[str] = (),
    ) -> None:
        """Names as in a run's configuration, relative files from the working folder. Who offers rewards offers those
        of our own, too.

        Raises:
            ConfigError: for a file that cannot be read, or a name without an offer that it belongs to.
        """
        self._offers = set(offers)
        self._check("rewards", "--reward", rewards)
        self._check("environments", "--environment", environments)
        self._check("environments", "--tool", tools)
        self._rewards = {_code(spec, is_ours=is_own(spec)): spec for spec in rewards}
        self._environments = {_code(spec, is_ours=spec.partition(":")[0] in ADAPTERS): spec for spec in environments}
        self._tools = {_code(spec, is_ours=False): spec for spec in tools}

    def offered(self, kind: ServiceKind) -> Offered:
        """What of a kind may run here."""
        if kind == "rewards":
            return Offered(troupe=VERSION, code=tuple(self._rewards))
        return Offered(troupe=VERSION, code=tuple(self._environments), tools=tuple(self._tools))

    def reward(self, service: Service) -> str:
        """The owner's name of a reward that is asked for. _Refused where there is none."""
        if set(service.named) != {""} or service.tools:
            raise _Refused("what is asked for is no reward")
        code = service.named[""]
        if "rewards" in self._offers and not code.sha256 and is_own(code.name):
            return code.name
        return _own(self._rewards, code, "reward", is_ours=is_own(code.name))

    def section(self, service: Service) -> EnvironmentConfig:
        """The section of environments and tools that are asked for, under the owner's names. _Refused where they are
        not all the owner's."""
        named = {
            name: _own(self._environments, code, "environment", is_ours=code.name.partition(":")[0] in ADAPTERS)
            for name, code in service.named.items()
        }
        tools = tuple(_own(self._tools, code, "tool", is_ours=False) for code in service.tools)
        return EnvironmentConfig(factory=named[""] if set(named) == {""} else named or None, tools=tools)

    def _check(self, offer: Offer, flag: str, given: Sequence[str]) -> None:
        if given and offer not in self._offers:
            raise ConfigError(f"{flag} {given[0]} is given, but this worker does not offer {offer}; add it to --offers")


def _code(spec: str, *, is_ours: bool) -> Code:
    try:
        return Code.of(spec, is_ours=is_ours)
    except OSError as error:
        raise ConfigError(f"{spec}: the file cannot be read: {error}") from None


def _own(named: Mapping[Code, str], code: Code, what: str, *, is_ours: bool) -> str:
    spec = named.get(code)
    if spec is None:
        raise _Refused(f"the {what} {code.name}, as the run has it, is not offered here")
    try:
        if Code.of(spec, is_ours=is_ours) == code:
            return spec
    except OSError as error:
        raise _Refused(f"the file of {what} {code.name} cannot be read any more: {error}") from None
    raise _Refused(f"the file of {what} {code.name} was changed while the worker ran; start the worker anew")


class Serving:
    """A `Work`: the rewards, or the environments and tools, that a worker runs."""

    tokens_per_second: float | None = None
    version: int | None = None
    pulled = 0

    def __init__(self, kind: ServiceKind, own: OwnCode, *, tell: Callable[[str], None] = lambda text: None) -> None:
        """`tell` is given what a person should know."""
        self.offer: Offer = kind
        self._kind, self._own, self._tell = kind, own, tell
        self._bench: _Bench | None = None
        self._answers = 0

    @property
    def held(self) -> Collection[str]:
        """Names of its processes."""
        return () if self._bench is None else self._bench.names

    @property
    def doing(self) -> str:
        """How many there are."""
        count = len(self.held)
        return f"{count} process{'' if count == 1 else 'es'} of {self._kind}" if count else ""

    @property
    def summary(self) -> str:
        """How much they have answered."""
        return f"{self._answers} answers of {self._kind}" if self._answers else ""

    def details(self) -> bytes:
        """What may run here."""
        return encode(self._own.offered(self._kind))

    def pulse(self, state: RunState, details: bytes, drop: Sequence[str]) -> None:
        """Nothing: what is to be dropped is told with the answers to pulls."""

    async def serve(self, link: Asks, details: bytes) -> None:
        """Run what the run asks for, until cancelled or the link says that there is no more; then nothing is left."""
        self._bench = bench = _Bench(link, self._kind, self._own, self._tell, self._count)
        try:
            async with anyio.create_task_group() as tasks:
                await bench.pull(tasks)
        except BaseExceptionGroup as group:
            raise first_fault(group) from None
        finally:
            self._bench = None

    def _count(self) -> None:
        self._answers += 1


class _Bench:
    """The processes of a worker for one session of it."""

    def __init__(
        self,
        link: Asks,
        kind: ServiceKind,
        own: OwnCode,
        tell: Callable[[str], None],
        on_answer: Callable[[], None],
    ) -> None:
        self._link, self._kind, self._own, self._tell, self._on_answer = link, kind, own, tell, on_answer
        self._held: dict[str, _Held] = {}
        self._ended: deque[str] = deque(maxlen=_ENDED)

    @property
    def names(self) -> list[str]:
        """Of those there are."""
        return list(self._held)

    async def pull(self, tasks: anyio.abc.TaskGroup) -> None:
        """Ask what is to be done, and do it."""
        number = 0
        while True:
            in_hand = {name: held.got for name, held in self._held.items()}
            ask = encode(Pull(kind=self._kind, number=number, sessions=in_hand))
            answer = await self._link.ask(PULL, ask, wait_s=2 * WAIT_S + 5)
            try:
                orders = decode_orders(answer)
            except FrameError as error:
                raise RunError(f"the run asks for what is no message: {error}") from None
            number += 1
            for begin in orders.begin:
                if begin.session not in self._held and begin.session not in self._ended:
                    held = self._held[begin.session] = _Held(begin)
                    tasks.start_soon(self._serve, held)
            for piece in orders.pieces:
                if (there := self._held.get(piece.session)) is not None:
                    there.arrive(piece)
            for name, grace_s in orders.end.items():
                if (there := self._held.get(name)) is not None:
                    there.end(grace_s)

    async def _serve(self, held: _Held) -> None:
        try:
            how, code = await self._served(held)
        except (_Refused, OSError, ValueError) as error:
            how, code = sayable(str(error)), 1
            self._tell(f"refused: {how}")
            broken = Broken if held.service.kind == "rewards" else BrokenWorld
            await self._done(held, encode(broken(how)))
        if not held.is_unwanted:
            await self._done(held, None, code=code, how=how)
        self._ended.append(held.name)
        del self._held[held.name]

    async def _served(self, held: _Held) -> tuple[str, int]:
        """Begin a process and carry frames both ways, until it has ended or nobody needs it → how it ended, its code.
        _Refused, OSError, ValueError where it cannot be begun."""
        child = await self._begun(held)
        grace_s = 0.0
        try:
            with held.scope:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(held.feed, child)
                    await self._read(held, child)
                    tasks.cancel_scope.cancel()
            grace_s = held.grace_s
        finally:
            with anyio.CancelScope(shield=True):
                await child.aclose(grace_s)
        return child.how_it_ended(), child.returncode or 0

    async def _begun(self, held: _Held) -> ChildProcess:
        if len(self._held) > MOST_SESSIONS:
            raise _Refused(f"there are {MOST_SESSIONS} processes here already")
        service = held.service
        if service.kind != self._kind:
            raise _Refused(f"{service.kind} were asked for, and {self._kind} are offered")
        if service.kind == "rewards":
            spec = self._own.reward(service)
            self._tell(f"a process of reward {spec} is begun")
            return await ChildProcess.start(rewards.WORKER, spec, env=rewards.ENVIRONMENT)
        section = self._own.section(service)
        self._tell(f"a process of {service.label} is begun")
        held.say(encode(Load(section)))
        return await ChildProcess.start(environments.WORKER, env=environments.ENVIRONMENT)

    async def _read(self, held: _Held, child: ChildProcess) -> None:
        """Tell the run what a process answers, to its end."""
        while True:
            try:
                frame = await child.receive()
            except (anyio.EndOfStream, FrameError):
                return
            if len(frame) > MOST_BYTES:
                self._tell(f"{held.service.label}: an answer of {len(frame):,} bytes is too long; its process is ended")
                return
            await self._done(held, frame)
            self._on_answer()

    async def _done(self, held: _Held, frame: bytes | None, *, code: int = 0, how: str = "") -> None:
        done = Done(kind=self._kind, session=held.name, number=held.answers, frame=frame, code=code, how=how[-10_000:])
        held.answers += 1
        await self._link.ask(DONE, encode(done), wait_s=10.0)


class _Held:
    """One process, and what has come for it."""

    def __init__(self, begin: Begin) -> None:
        self.name, self.service = begin.session, begin.service
        self.got = 0
        """Pieces."""
        self.answers = 0
        """Told."""
        self.scope = anyio.CancelScope()
        self.grace_s = 1.0
        self.is_unwanted = False
        self._size = 0
        self._pieces: list[bytes] = []
        self._frames: deque[bytes] = deque()
        self._news = anyio.Event()

    def arrive(self, piece: Piece) -> None:
        """A piece, which may have come before."""
        if piece.number != self.got:
            return
        self.got += 1
        self._size += len(piece.data)
        if self._size > MOST_BYTES:
            self.end(0.0)
            return
        self._pieces.append(piece.data)
        if piece.is_last:
            self.say(b"".join(self._pieces))
            self._pieces.clear()
            self._size = 0

    def say(self, frame: bytes) -> None:
        """Have the process told this in its turn."""
        self._frames.append(frame)
        self._news.set()
        self._news = anyio.Event()

    async def feed(self, child: ChildProcess) -> None:
        """Send the process what comes for it, until cancelled."""
        while True:
            while self._frames:
                try:
                    await child.send(self._frames.popleft())
                except anyio.BrokenResourceError:  # that it has ended shows where its answers are read
                    await anyio.sleep_forever()
            await self._news.wait()

    def end(self, grace_s: float) -> None:
        """Nobody needs it any more."""
        self.is_unwanted, self.grace_s = True, grace_s
        self.scope.cancel()
