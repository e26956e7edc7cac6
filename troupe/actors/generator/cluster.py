"""ClusterMembers: workers on the network as members of the crew.

Workers ask (`cluster_wire.py`), and are answered: with parts on lease, with observations, and with how the run stands.
What they send is checked before anybody looks at it. In the pinned schedule a worker first shows that its bits are the
run's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Collection, Sequence

import anyio
import msgspec
from anyio.abc import TaskGroup

from troupe.actors.generator.checks import ResultLimits, checked_group
from troupe.actors.generator.cluster_wire import (
    Accepted,
    GenerateState,
    KinVerdict,
    Pulled,
    Terms,
    decode_done,
    decode_dropped,
    decode_kin,
    decode_observe,
    decode_pull,
    decode_spans,
    decode_whole,
)
from troupe.actors.generator.cluster_worker import ANSWER_S, ClusterWorker, Pull, frame_of
from troupe.actors.generator.crew import Crew
from troupe.actors.generator.kin import Kinship
from troupe.actors.generator.parts import Part
from troupe.actors.generator.remembered import Remembered
from troupe.actors.generator.trust import Trust
from troupe.actors.generator.wire import TurnEnded, unpack_turn
from troupe.cluster.desk import DeclineError, Desk, OffenceError
from troupe.cluster.roster import Roster, Worker
from troupe.cluster.wire import PULL_WAIT_S, Offer
from troupe.messages import MemberStatus
from troupe.runtime.frames import MessageError, decoder, encode

_REMEMBERED = 8192
"""Groups of which it is known who was asked for them."""

_decode_turn: Callable[[bytes], TurnEnded] = decoder(TurnEnded, "a worker and the run")


async def _at_once(version: int) -> None: ...


class ClusterMembers:
    """A service of the roster, and `Members` of the crew; outlives the actor, whose crew it is given by `run`."""

    offer: Offer = "generate"

    def __init__(
        self,
        desk: Desk,
        roster: Roster,
        *,
        limits: ResultLimits,
        decode_text: Callable[[Sequence[int]], str],
        terms: Terms,
        versions: Callable[[], Collection[int]],
        kinship: Kinship | None = None,
        trust: Trust | None = None,
        put_whole: Callable[[int], Awaitable[None]] | None = None,
        needs: str = "",
        until_there: Callable[[int], Awaitable[None]] = _at_once,
    ) -> None:
        """`terms`: what every worker is told. `versions`: those that workers can have now. `kinship`: None: anybody may
        generate. `trust`: what of their answers is looked at. `put_whole`: has a version put where workers find it, as
        a whole. `needs`: what to say while there is work and nobody for it; empty: others do it. `until_there`: waits
        until workers can have a version."""
        self._desk, self._roster = desk, roster
        self._limits, self._decode_text = limits, decode_text
        self._terms, self._versions = terms, versions
        self._kinship, self._trust = kinship, trust or Trust(desk, roster)
        self._put_whole, self._needs, self._until_there = put_whole, needs, until_there
        self._members: dict[str, ClusterWorker] = {}
        self._asked: Remembered[tuple[Part, set[str]]] = Remembered(
            _REMEMBERED, lambda gid: self._crew is not None and self._crew.is_open(gid)
        )
        """Group → its part, and the names of those who had it."""
        self._crew: Crew | None = None
        self._tasks: TaskGroup
        for verb, handler in (
            ("kin", self._kin),
            ("pull", self._pull),
            ("done", self._done),
            ("turn", self._turn),
            ("observe", self._observe),
            ("dropped", self._dropped),
            ("full", self._full),
            ("span", self._span),
        ):
            desk.register(verb, handler)

    async def run(self, crew: Crew) -> None:
        """Give out the parts of a crew until cancelled; those of an earlier one are nobody's any more."""
        async with anyio.create_task_group() as self._tasks:
            self._crew = crew
            self._trust.audits.begin()
            for member in self._members.values():
                member.pulls.clear()
            try:
                await anyio.sleep_forever()
            finally:
                self._crew = None

    def statuses(self) -> Sequence[MemberStatus]:
        """Every worker of the roster."""
        return self._roster.statuses()

    async def finish(self) -> None:
        """Nothing is to be done: workers are told of the run's end when they ask."""

    @property
    def needs(self) -> str:
        """What must come from outside, where there is work and nobody for it."""
        crew = self._crew
        return self._needs if crew is not None and crew.queued and not self._kin_here() else ""

    def admit(self, worker: Worker, details: bytes) -> bytes:
        """As of `Service`."""
        member = ClusterWorker(worker)
        member.kin = self._kinship is None
        self._members[worker.name] = member
        worker.state = "idle" if member.kin else "starting"
        worker.detail = "" if member.kin else "showing that its bits are the run's"
        probe = None if self._kinship is None else self._kinship.probe()
        if self._kinship is not None and self._crew is not None:
            self._tasks.start_soon(self._kinship.begin)
        return encode(msgspec.structs.replace(self._terms, probe=probe, versions=tuple(sorted(self._versions()))))

    def renew(self, worker: Worker, held: Sequence[str], pulled: int) -> Sequence[str]:
        """As of `Service`."""
        member, crew = self._members[worker.name], self._crew
        for number in [number for number in member.pulls if number <= pulled]:
            if member.pulls[number].answered.is_set():
                del member.pulls[number]
        if crew is None or member.worker is not worker:
            return held
        on_their_way = [part.name for pull in member.pulls.values() for part in pull.parts]
        leased = [*held, *on_their_way, *self._trust.audits.waiting_of(member.name)]
        self._trust.audits.renew(member.name, leased)
        drop = [name for name in crew.renew(member, leased) if not self._trust.audits.is_second(name, member.name)]
        worker.leases["generate"] = tuple(name for name in held if name not in drop)
        if worker.here and worker.state != "starting":
            worker.state = "working" if worker.leases["generate"] else "idle"
        return [name for name in drop if name in held]

    def state(self, worker: Worker) -> bytes:
        """As of `Service`."""
        crew = self._crew
        versions = tuple(sorted(self._versions()))
        waiting = 0 if crew is None else crew.queued
        newest = versions[-1] if versions else -1
        return encode(GenerateState(newest=newest, wanted=versions, open_parts=waiting, share=self._share(4096)))

    def gone(self, worker: Worker, reason: str) -> None:
        """As of `Service`."""
        member = self._members.get(worker.name)
        if member is None or member.worker is not worker:
            return
        member.pulls.clear()
        if member.scope is not None:
            member.scope.cancel()
        self._trust.audits.gone(member.name)
        if (crew := self._crew) is not None:
            crew.renew(member, ())  # which no part is to blame for: cables are pulled, and machines sleep
            crew.report.forget_member(member.name)

    def _kin_here(self) -> list[ClusterWorker]:
        here = [self._members.get(worker.name) for worker in self._roster.here("generate")]
        return [member for member in here if member is not None and member.kin]

    def _share(self, most: int) -> int:
        """Of the parts that nobody has, what one who asks should have."""
        waiting = 0 if self._crew is None else self._crew.queued
        return max(1, min(most, math.ceil(waiting / max(1, len(self._kin_here())))))

    def _member(self, name: str) -> ClusterWorker:
        """The one that asks, where it may have work."""
        self._roster.worker(name)
        member = self._members.get(name)
        if member is None or not member.kin:
            raise OffenceError(f"worker {name} asks as one that generates, and is not admitted to it")
        return member

    async def _kin(self, name: str, body: bytes) -> bytes:
        answer, worker = decode_kin(body), self._roster.worker(name)
        member = self._members.get(name)
        if member is None:
            raise OffenceError("it does not offer to generate")
        if self._kinship is not None and not member.kin:
            reason = await self._kinship.why_not(answer, worker.facts)
            if reason is None:
                return encode(KinVerdict(admitted=False, probe=self._kinship.probe()))
            if reason:
                self._roster.refuse(worker, reason)
                raise DeclineError(reason)
        member.kin, worker.state, worker.detail = True, "idle", ""
        return encode(KinVerdict(admitted=True))

    async def _pull(self, name: str, body: bytes) -> bytes:
        ask, member = decode_pull(body), self._member(name)
        if self._crew is None or self._roster.run_state() == "ended":
            await anyio.sleep(1.0)  # between two actors; whoever asks comes back at once
            return encode(Pulled(parts=()))
        pull = member.pulls.get(ask.number)
        if pull is None:
            if ask.number <= member.newest_pull:
                return encode(Pulled(parts=()))  # what it had then it has lost since
            pull = member.pulls[ask.number] = Pull(ask.number)
            member.newest_pull = ask.number
            self._tasks.start_soon(self._take, self._crew, member, pull, ask.most)
        with anyio.move_on_after(PULL_WAIT_S):
            await pull.answered.wait()
            for version in {part.version for part in pull.parts if part.version is not None}:
                await self._until_there(version)  # before that it could do nothing but ask for it
        return encode(Pulled(parts=tuple(map(frame_of, pull.parts))))

    async def _take(self, crew: Crew, member: ClusterWorker, pull: Pull, most: int) -> None:
        """Parts for a pull: another's to be audited, or open ones."""
        try:
            with anyio.move_on_after(ANSWER_S) as member.scope:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._take_audit, member, pull, tasks.cancel_scope)
                    parts = await crew.take(member, most=self._share(most))
                    pull.parts += parts
                    tasks.cancel_scope.cancel()
        finally:
            for part in pull.parts:
                self._remember(part, member.name)
                if crew.pinned and not self._limits.acts:
                    self._trust.audits.given(part, member.name)
            pull.answered.set()

    async def _take_audit(self, member: ClusterWorker, pull: Pull, scope: anyio.CancelScope) -> None:
        part = await self._trust.audits.take(member.name)
        pull.parts.append(part)
        scope.cancel()

    def _remember(self, part: Part, name: str) -> None:
        for prompt in part.prompts:
            part, names = self._asked.get(prompt.gid) or (part, set())
            self._asked.add(prompt.gid, (part, names | {name}))

    def _part_of(self, name: str, gid: int) -> Part | None:
        """The part of a group, where this worker has had it."""
        part, names = self._asked.get(gid) or (None, set[str]())
        return part if name in names else None

    async def _done(self, name: str, body: bytes) -> bytes:
        done, member = decode_done(body), self._member(name)
        part = self._part_of(name, done.completed.gid)
        if part is None:
            raise OffenceError(f"it completed group {done.completed.gid}, which it was not asked for")
        prompt, crew = part.prompt_of(done.completed.gid), self._crew
        try:
            group = checked_group(
                done.completed,
                prompt,
                self._limits.of(part),
                version=part.version,
                newest=0 if crew is None else crew.board.version,  # a server begun anew holds no version for a moment
                decode_text=self._decode_text,
            )
        except MessageError as error:
            self._desk.put_out(name, f"what it sent cannot be: {error}")
            raise DeclineError(str(error)) from None
        if crew is None:
            return encode(Accepted(verdict="foreign"))
        if self._trust.audits.concerns(part.name, name):
            verdict, is_whole = self._trust.audited(name, part, group)
            if is_whole:
                self._tasks.start_soon(self._settle, crew, part.name)
            return encode(Accepted(verdict=verdict))
        verdict = await crew.completed(member, group)
        if verdict == "differs":
            self._desk.put_out(name, f"it answered group {prompt.gid} once more, and otherwise")
        elif verdict == "taken" and self._trust.estimates is not None and self._trust.estimates.chooses(part):
            self._tasks.start_soon(self._trust.estimate, name, group)
        return encode(Accepted(verdict=verdict))

    async def _settle(self, crew: Crew, part: str) -> None:
        """Hand over what an audit says that holds."""
        name, groups = await self._trust.settle(part, lambda: len(self._kin_here()) > 1)
        member = self._members.get(name)
        for group in groups:
            if member is not None and await crew.completed(member, group) == "differs":
                self._desk.put_out(name, f"it answered group {group.prompt.gid} once more, and otherwise")

    async def _turn(self, name: str, body: bytes) -> bytes:
        ended, member = _decode_turn(body), self._member(name)
        part = self._part_of(name, ended.gid)
        if part is None:
            raise OffenceError(f"it tells of a turn in group {ended.gid}, which it was not asked for")
        if self._crew is not None:
            taken = unpack_turn(ended, part.prompt_of(ended.gid))
            if not 0 <= taken.sample < self._limits.num_generations:
                raise OffenceError(f"it tells of a turn of sample {taken.sample}")
            await self._crew.turn_taken(member, taken)
        return b""

    async def _observe(self, name: str, body: bytes) -> bytes:
        ask = decode_observe(body)
        return encode(await self._member(name).observed(ask.after))

    async def _dropped(self, name: str, body: bytes) -> bytes:
        dropped, member = decode_dropped(body), self._member(name)
        if self._crew is not None:
            self._crew.lost(member, f"its generator: {dropped.reason}", dropped.parts)
            self._trust.audits.renew(name, ())
        return b""

    async def _full(self, name: str, body: bytes) -> bytes:
        wanted = decode_whole(body).version
        self._roster.worker(name)
        if self._put_whole is not None and wanted in self._versions():
            await self._put_whole(wanted)
        return b""

    async def _span(self, name: str, body: bytes) -> bytes:
        spans, worker = decode_spans(body).spans, self._roster.worker(name)
        if self._crew is not None:
            now_s, shift_s = time.perf_counter(), worker.shift_s
            for span in spans:
                start_s, end_s = span.start_s + shift_s, span.end_s + shift_s
                if math.isfinite(start_s) and start_s <= now_s and (end_s == math.inf or start_s <= end_s <= now_s):
                    told = msgspec.structs.replace(
                        span, actor="generator", member=name, start_s=start_s, end_s=end_s, gid=None, gids=()
                    )
                    self._crew.report.forward(told)
        return b""
