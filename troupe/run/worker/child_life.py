"""One generator's process at a worker, from its start to its end: versions in, groups and turns out."""

from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path

import anyio
from anyio.abc import TaskGroup

from troupe.actors.generator.child import GeneratorChild
from troupe.actors.generator.cluster_wire import MAX_SPANS, Done, Observe, Spans, decode_accepted, decode_observed
from troupe.actors.generator.kin import probe_answer
from troupe.actors.generator.parts import Part
from troupe.actors.generator.wire import pack_group, pack_turn
from troupe.cluster.blobs import BlobMissingError
from troupe.cluster.link import Link
from troupe.cluster.version_files import VersionFiles
from troupe.cluster.versions import Newest, decode_newest
from troupe.cluster.wire import PULL_WAIT_S
from troupe.messages import Incident, RolloutGroup, Span, TurnTaken
from troupe.run.worker.hands import Hands
from troupe.runtime.backoff import backoff_s
from troupe.runtime.frames import encode

_LONG_S = PULL_WAIT_S + 10.0
_SOON_S, _AGAIN_S = 0.01, 0.5
_SPANS_S = 0.2


class NewestVersion:
    """What the run has said of its versions last."""

    def __init__(self) -> None:
        self.version = -1
        self._told = anyio.Event()

    def tell(self, version: int) -> None:
        """A beat was answered."""
        self.version = version
        self._told.set()
        self._told = anyio.Event()

    async def next_told(self) -> None:
        """Wait for the next beat."""
        await self._told.wait()


class ChildLife:
    """Listens to one child and gives it what it needs."""

    def __init__(
        self,
        link: Link,
        files: VersionFiles,
        hands: Hands,
        newest: NewestVersion,
        telling: TaskGroup,
        *,
        tell: Callable[[str], None],
    ) -> None:
        """`telling`: has tasks that bring groups to the run, which outlive the child."""
        self.made = 0
        """Tokens of the longest completion under way."""
        self.groups = 0
        """That the run has taken of it."""
        self.done = 0
        """Groups that it has completed."""
        self.child: GeneratorChild
        """Once it has begun."""
        self._tasks: TaskGroup
        self._link, self._files, self._hands, self._newest = link, files, hands, newest
        self._telling = telling
        self._tell = tell
        self._spans: deque[Span] = deque(maxlen=MAX_SPANS)
        self._probe: _Probe | None = None
        self._given: dict[str, dict[int, RolloutGroup | None]] = {}
        """Parts that the child was given → their groups, as far as it has made them."""
        self._reading: Counter[int] = Counter()
        self._evaluated: set[int] = set()
        """The version that was evaluated last."""
        self._loaded = anyio.Event()

    def begin(self, child: GeneratorChild, tasks: TaskGroup) -> None:
        """The child is ready: listen, and keep it at the newest version, in tasks that end with it."""
        self.child, self._tasks = child, tasks
        self._tasks.start_soon(child.run)
        self._tasks.start_soon(self._follow)
        if child.setup.most_at_once is not None:
            self._tasks.start_soon(self._hear_of_newest)
        self._tasks.start_soon(self._tell_spans)

    def begin_work(self) -> None:
        """The run gives work to this worker: hear of answers to turns."""
        if self.child.setup.acts is not None:
            self._tasks.start_soon(self._observe)

    async def on_group(self, group: RolloutGroup) -> None:
        """As of `Listener`."""
        self.done += 1
        if self._probe is not None and self._probe.add(group):
            return
        for groups in self._given.values():
            if group.prompt.gid in groups:
                groups[group.prompt.gid] = group
        self._made(group)

    async def on_turn(self, taken: TurnTaken) -> None:
        """As of `Listener`."""
        if self._probe is not None and self._probe.asks_for(taken.prompt.gid):
            await self.child.observe(probe_answer(taken))
        else:
            self._tasks.start_soon(self._tell_turn, taken)

    async def on_incident(self, incident: Incident) -> None:
        """As of `Listener`."""
        self._tell(incident.message)

    def on_span(self, span: Span) -> None:
        """As of `Listener`."""
        self._spans.append(span)

    def on_made(self, tokens: int) -> None:
        """As of `Listener`."""
        self.made = tokens

    async def decode(self, part: Part) -> None:
        """Have a part decoded that is in hand, with its version; in the free schedule with one that is new enough."""
        if part.set is not None and part.version is not None:
            await self._evaluate(part, part.version)
        elif part.version is None:
            await self._fresh()
            await self._give(part)
        elif await self._have(part.name, part.version):
            await self._give(part)

    async def _evaluate(self, part: Part, version: int) -> None:
        """Rows of an evaluation: its version stays here until they are decoded, and until another one is evaluated."""
        self._evaluated, self._reading[version] = {version}, self._reading[version] + 1
        try:
            if (path := await self._fetched(part.name, version)) is not None:
                await self._give(part, path)
                await self.child.until_done(part.name)
        finally:
            self._reading -= Counter([version])

    async def _give(self, part: Part, path: Path | None = None) -> None:
        """Give the child a part; `path`: the file of its version where the child has that not by itself."""
        if part.name not in self._hands:
            return
        if part.name in self.child.parts:  # it was taken away meanwhile, and has come again
            for group in self._given.get(part.name, {}).values():
                if group is not None:
                    self._made(group)
            return
        self._given = {name: groups for name, groups in self._given.items() if name in self.child.parts}
        self._given[part.name] = dict.fromkeys(prompt.gid for prompt in part.prompts)
        if path is None:
            await self.child.decode(part)
        else:
            await self.child.evaluate(part, path)

    async def decode_probe(self, part: Part) -> list[RolloutGroup]:
        """What a probe comes to. BlobMissingError where its version has gone."""
        if part.version is not None:
            await self.child.load(part.version, await self._files.fetch(part.version))
        self._probe = _Probe(part)
        await self.child.decode(part)
        await self._probe.whole.wait()
        groups, self._probe = self._probe.groups, None
        return groups

    def _made(self, group: RolloutGroup) -> None:
        """Tell the run of a group, if it wants it."""
        part = self._hands.made(group.prompt.gid)
        if part is not None:
            self._telling.start_soon(self._tell_group, part, group)

    async def _have(self, name: str, version: int) -> bool:
        """Have the child read a version; False where the part that needs it is not wanted any more."""
        self._reading[version] += 1
        nth = 0
        try:
            while not self.child.has(version):
                if name not in self._hands:
                    return False
                if version < self.child.newest - self.child.setup.max_staleness:
                    self._hands.drop([name])  # of a step that is over: the run gives it to nobody, or to another
                    return False
                try:
                    await self.child.load(version, await self._files.fetch(version))
                except BlobMissingError:  # it is being published
                    nth += 1
                    await anyio.sleep(backoff_s(nth, _SOON_S, _AGAIN_S))
        finally:
            self._reading -= Counter([version])
        return True

    async def _fetched(self, name: str, version: int) -> Path | None:
        """The file of a version, once the run has published it; None where the part that needs it is not wanted any
        more."""
        nth = 0
        while name in self._hands:
            try:
                return await self._files.fetch(version)
            except BlobMissingError:
                nth += 1
                await anyio.sleep(backoff_s(nth, _SOON_S, _AGAIN_S))
        return None

    async def _fresh(self) -> None:
        """Wait until the child has the newest version of this moment, or one that leaves time enough until what it
        samples would be too old to be trained on."""
        oldest = max(0, self._newest.version - self.child.setup.max_staleness // 2)
        while self.child.newest < oldest:
            await self._loaded.wait()

    async def _hear_of_newest(self) -> None:
        """Know of each version as soon as it is published; beats alone would be too late for short steps."""
        while True:
            body = encode(Newest(version=self._newest.version))
            self._newest.tell(decode_newest(await self._link.ask("newest", body, wait_s=_LONG_S)).version)

    async def _follow(self) -> None:
        """Have the child read the newest version, whenever there is another."""
        while True:
            version = self._newest.version
            if version <= self.child.newest:
                await self._newest.next_told()
                continue
            self._reading[version] += 1
            try:
                await self.child.load(version, await self._files.fetch(version))
            except BlobMissingError:
                await anyio.sleep(_AGAIN_S)
                continue
            finally:
                self._reading -= Counter([version])
            self._loaded.set()
            self._loaded = anyio.Event()
            self._files.keep({version, *self._evaluated, *self._hands.versions(), *self._reading})

    async def _tell_group(self, part: str, group: RolloutGroup) -> None:
        gid = group.prompt.gid
        done = Done(part=part, completed=pack_group(group))
        accepted = decode_accepted(await self._link.ask("done", encode(done)))
        self.groups += accepted.verdict == "taken"
        self._hands.told(gid)

    async def _tell_turn(self, taken: TurnTaken) -> None:
        await self._link.ask("turn", encode(pack_turn(taken)))

    async def _observe(self) -> None:
        after = 0
        while True:
            body = encode(Observe(after=after))
            observed = decode_observed(await self._link.ask("observe", body, wait_s=_LONG_S))
            for number, observation in enumerate(observed.observations, observed.first):
                if number > after:
                    after = number
                    await self.child.observe(observation)

    async def _tell_spans(self) -> None:
        while True:
            await anyio.sleep(_SPANS_S)
            if self._spans:
                spans = tuple(self._spans)
                self._spans.clear()
                await self._link.ask("span", encode(Spans(spans=spans)))


class _Probe:
    """A part whose groups are not for the run."""

    def __init__(self, part: Part) -> None:
        self.groups: list[RolloutGroup] = []
        self.whole = anyio.Event()
        self._left = {prompt.gid for prompt in part.prompts}

    def asks_for(self, gid: int) -> bool:
        """Whether a group that is not there yet is one of its."""
        return gid in self._left

    def add(self, group: RolloutGroup) -> bool:
        """Whether the group is one of its."""
        if not self.asks_for(group.prompt.gid):
            return False
        self._left.discard(group.prompt.gid)
        self.groups.append(group)
        if not self._left:
            self.whole.set()
        return True
