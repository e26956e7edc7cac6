"""Generating: the work of a worker that decodes parts, with one generator's process after another."""

from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, suppress
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup

from troupe.actors.generator.checks import bits_of
from troupe.actors.generator.child import CHILD_FAULTS, GeneratorChild, Listener
from troupe.actors.generator.cluster_wire import (
    Dropped,
    KinAnswer,
    Probe,
    Pull,
    Terms,
    WholeVersion,
    decode_kin_verdict,
    decode_pulled,
    decode_state,
    decode_terms,
)
from troupe.actors.generator.wire import Setup
from troupe.cluster.blobs import BlobMissingError, get_bytes
from troupe.cluster.bus import Bus, NoAnswer, stored_subject
from troupe.cluster.link import Link
from troupe.cluster.version_files import VersionFiles
from troupe.cluster.versions import decode_version_head, version_subject
from troupe.cluster.wire import PULL_WAIT_S, Offer, RunState
from troupe.errors import RunError, TroupeError
from troupe.run.worker.child_life import ChildLife, NewestVersion
from troupe.run.worker.hands import Hands, part_of
from troupe.run.worker.scratch import scratch_folder
from troupe.run.worker.setup import Here, own_setup, read_setup
from troupe.runtime.backoff import backoff_s
from troupe.runtime.device import DeviceThread
from troupe.runtime.frames import encode
from troupe.runtime.roles import decisive_fault

MOST_DEATHS = 3
"""Processes in a row that end with nothing done: then this machine cannot do it, and goes before its losses end the
run."""
_FIRST_S, _LONGEST_S = 0.5, 30.0
_LONG_S = PULL_WAIT_S + 10.0
_SETUP_BYTES = 1024 * 1024 * 1024
_AGAIN_S = 0.5
_KIN_S = 1.0
_MORE_VERSIONS = 3
_EVALUATED = 2
"""Files of a version that is evaluated: itself, and what it may be a change of."""
_REASON_CHARS = 2000

T = TypeVar("T")
StartChild = Callable[[Setup, Listener], Awaitable[GeneratorChild]]


class Generating:
    """As `Work`."""

    offer: Offer = "generate"

    def __init__(
        self,
        bus: Bus,
        run: str,
        here: Here,
        *,
        tell: Callable[[str], None] = lambda text: None,
        start: StartChild | None = None,
        folder: Callable[[int], AbstractContextManager[Path]] = scratch_folder,
        device: Callable[[], AbstractAsyncContextManager[DeviceThread]] = lambda: DeviceThread("versions"),
        pause_s: Callable[[int], float] = lambda nth: backoff_s(nth, _FIRST_S, _LONGEST_S),
    ) -> None:
        """`tell` is given what a person should know. `start`: makes the process. `folder`: for so many bytes.
        `device`: where versions are made of changes. `pause_s`: before the n-th process after one that has ended."""
        self._bus, self._run, self._here, self._tell, self._folder = bus, run, here, tell, folder
        self._start = start or self._start_child
        self._device, self._pause_s = device, pause_s
        self._hands = Hands()
        self._newest = NewestVersion()
        self._life: ChildLife | None = None
        self._given_up = self._is_kin = False
        self.groups = self.pulled = 0
        self.doing = ""

    @property
    def held(self) -> Collection[str]:
        """As of `Work`."""
        return self._hands.names

    @property
    def tokens_per_second(self) -> float | None:
        """As of `Work`."""
        return None if self._life is None else self._life.child.pace.per_second

    @property
    def version(self) -> int | None:
        """As of `Work`."""
        return None if self._life is None or self._life.child.newest < 0 else self._life.child.newest

    @property
    def summary(self) -> str:
        """As of `Work`."""
        groups = self.groups + (0 if self._life is None else self._life.groups)
        return f"{groups:,} groups" if groups else ""

    def details(self) -> bytes:
        """Nothing: what it computes with stands beside."""
        return b""

    def pulse(self, state: RunState, details: bytes, drop: Sequence[str]) -> None:
        """As of `Work`."""
        if details:
            self._newest.tell(decode_state(details).newest)
        dropped = self._hands.drop(drop)
        life = self._life
        if life is not None and life.child.setup.acts is not None and not life.child.parts.keys().isdisjoint(dropped):
            self._given_up = True  # nobody answers the turns of these, and they would stand in the way of others
            life.child.kill()

    async def serve(self, link: Link, details: bytes) -> None:
        """As of `Work`."""
        terms = decode_terms(details)
        self._hands, self._newest, self._is_kin, self.pulled = Hands(), NewestVersion(), False, 0
        self._newest.tell(max(terms.versions, default=-1))
        self.doing = "reading what the run is"
        frame = await self._until_there(lambda: get_bytes(self._bus, self._stored(terms.setup), most=_SETUP_BYTES))
        told = read_setup(frame)
        if told.base is None:
            setup = own_setup(told, link.name, self._here)
        else:  # whose files are gone through
            setup = await anyio.to_thread.run_sync(own_setup, told, link.name, self._here)
        size = await self._until_there(self._size)

        async def damaged(version: int) -> None:
            await link.ask("full", encode(WholeVersion(version=version)))

        async with self._device() as device, anyio.create_task_group() as telling:
            versions = setup.max_staleness + _MORE_VERSIONS + (_EVALUATED if setup.sets else 0)
            with self._folder(versions * size) as folder:
                files = VersionFiles(self._bus, self._run, folder, device, damaged=damaged)
                await self._with_children(link, terms, setup, files, telling)

    async def _with_children(
        self, link: Link, terms: Terms, setup: Setup, files: VersionFiles, telling: TaskGroup
    ) -> None:
        """Work with one process after another, until what the link or a process says is final."""
        deaths = 0
        while True:
            self.doing = "starting its generator"
            life = ChildLife(link, files, self._hands, self._newest, telling, tell=self._tell)
            self._given_up = False
            try:
                await self._with_child(link, terms, setup, life)
            except Exception as error:
                fault = decisive_fault(error)
            if isinstance(fault, TroupeError) or not isinstance(fault, CHILD_FAULTS):
                raise fault
            reason = f"its generator ended: {fault}"[:_REASON_CHARS]
            lost = self._hands.drop_unmade()
            self.groups += life.groups
            if self._given_up:
                continue
            self._tell(reason)
            if lost:
                await link.ask("dropped", encode(Dropped(parts=tuple(lost), reason=reason)))
            deaths = 1 if life.done else deaths + 1
            if deaths >= MOST_DEATHS:
                raise RunError(f"the generator ended {deaths} times in a row with nothing done; the last time: {fault}")
            self.doing = "waiting before its generator is started again"
            await anyio.sleep(self._pause_s(deaths))

    async def _with_child(self, link: Link, terms: Terms, setup: Setup, life: ChildLife) -> None:
        """Until the process ends, or what the link says is final: raises that."""
        child = await self._start(setup, life)
        try:
            async with anyio.create_task_group() as tasks:
                life.begin(child, tasks)
                self._life = life
                if not self._is_kin:
                    await self._prove(link, terms, life)
                    self._is_kin = True
                life.begin_work()
                await self._pull(link, life, tasks)
        finally:
            self._life = None
            child.kill()
            with anyio.CancelScope(shield=True):
                await child.aclose()

    async def _prove(self, link: Link, terms: Terms, life: ChildLife) -> None:
        """Show that what this machine computes is what the run would, where that matters. DeclinedError where not."""
        probe = terms.probe
        if probe is None and life.child.setup.most_at_once is not None:
            return
        self.doing = "showing that its bits are the run's"
        while True:
            answer = await _probed(probe, life)
            verdict = decode_kin_verdict(await link.ask("kin", encode(answer), wait_s=_LONG_S))
            if verdict.admitted:
                return
            probe = verdict.probe
            if probe is None:
                await anyio.sleep(_KIN_S)

    async def _pull(self, link: Link, life: ChildLife, tasks: TaskGroup) -> None:
        """Take parts for as long as the process lives."""
        setup = life.child.setup
        most = setup.most_at_once or (1 if setup.acts is None else setup.acts.sessions)
        while True:
            self.doing = ""
            pull = Pull(number=self.pulled + 1, most=await self._hands.room(most))
            pulled = decode_pulled(await link.ask("pull", encode(pull), wait_s=_LONG_S))
            self.pulled = pull.number
            for part in map(part_of, pulled.parts):
                if self._hands.add(part):
                    tasks.start_soon(life.decode, part)

    async def _start_child(self, setup: Setup, listener: Listener) -> GeneratorChild:
        return await GeneratorChild.start(setup, listener, env=self._here.env)

    def _stored(self, name: str) -> str:
        return stored_subject(self._run, name)

    async def _size(self) -> int:
        """Bytes of a version. BlobMissingError where there is none yet."""
        subject = version_subject(self._run, max(0, self._newest.version), "head")
        data = await self._bus.get(subject)
        if data is None:
            raise BlobMissingError(subject)
        return decode_version_head(data).size

    async def _until_there(self, get: Callable[[], Awaitable[T]]) -> T:
        """What is stored for workers, once it is: the run publishes it all anew when its server has begun anew."""
        while True:
            try:
                return await get()
            except (BlobMissingError, NoAnswer):
                await anyio.sleep(_AGAIN_S)


async def _probed(probe: Probe | None, life: ChildLife) -> KinAnswer:
    """What a probe comes to; where there is none, or its version has gone, what asks for another."""
    if probe is not None:
        part = part_of(probe.part)
        with suppress(BlobMissingError):
            ids, log_probs = bits_of(await life.decode_probe(part))
            return KinAnswer(version=-1 if part.version is None else part.version, token_ids=ids, log_probs=log_probs)
    return KinAnswer(version=-1, token_ids="", log_probs="")
