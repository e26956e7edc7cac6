"""Crew: the open parts of a run's prompts, and who is decoding which.

What is here is the only truth about them. Members come and go as they like: a part belongs to the step, not to who has
it, and goes to another when its member is lost. A group may come more than once; by its gid it counts once.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Collection, Sequence
from itertools import count
from typing import Literal, Protocol, TypeAlias

import anyio
import msgspec

from troupe.actors.generator.parts import Part
from troupe.actors.generator.queue import PartQueue
from troupe.actors.generator.remembered import Remembered
from troupe.errors import RunError
from troupe.messages import Incident, MemberStatus, Observation, Prompt, RolloutGroup, TurnTaken
from troupe.policy import Weights
from troupe.runtime.board import PolicyBoard
from troupe.runtime.reporter import Reporter

Verdict: TypeAlias = Literal["taken", "known", "differs", "foreign"]
"""Of a group that a member has completed. `known`: it was there already, and the same; `differs`: it was there and is
another, though the schedule is pinned; `foreign`: nobody asked this member for it."""

_LEASES = count(1)
_REMEMBERED = 4096  # groups that are over


class Member(Protocol):
    """One that decodes parts."""

    @property
    def name(self) -> str:
        """One of its kind in the run."""

    async def observe(self, observation: Observation) -> None:
        """An answer to a turn of a part that it has; `asker` is what it called itself. Never raises for its end."""


class Members(Protocol):
    """A source of members."""

    async def run(self, crew: "Crew") -> None:
        """Have members take parts until cancelled. Raises TroupeError where the run must end, anything else where the
        actor is to be made anew."""

    @property
    def needs(self) -> str:
        """What must come from outside before the work goes on, as `Actor.needs`."""

    def statuses(self) -> Sequence[MemberStatus]:
        """What is known of each, now."""

    async def finish(self) -> None:
        """No more parts will come: let members end well."""


class _Work:
    """One open part."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.left = {prompt.gid for prompt in part.prompts}
        self.holder: Member | None = None
        self.lease = 0
        """Number of the newest lease, unlike all others of this process."""
        self.asker = 0
        """What its holder calls itself where it asks about turns."""
        self.asked: set[str] = set()
        """Names of all who have had it."""
        self.losses = 0
        """Members that were lost on it since a group of it came last."""


class _Over(msgspec.Struct, frozen=True):
    """A group that was taken."""

    prompt: Prompt
    asked: set[str]
    digest: bytes


class _Waiting:
    """One who waits for parts."""

    def __init__(self, member: Member, most: int, *, rows: bool) -> None:
        self.member, self.most, self.rows = member, most, rows
        self.given: list[Part] = []
        self.came = anyio.Event()


class Crew:
    """Open parts, and the members that have them on lease. For the event loop of the run only.

    Open parts are taken in the order of `PartQueue`, and of an evaluation's nobody has more than one. Of several who
    wait for work, each next part goes to the one that has the fewest.
    """

    def __init__(
        self,
        hand_over: Callable[[RolloutGroup], Awaitable[None]],
        *,
        board: PolicyBoard[Weights],
        report: Reporter,
        pinned: bool,
        turns: Callable[[TurnTaken], Awaitable[None]] | None = None,
        most_losses: int = 5,
    ) -> None:
        """`hand_over`: is given each group once. `turns`: is given turns to be answered, where the policy acts.
        `most_losses`: so many members lost in a row on one part, with nothing of it done, end the run."""
        self.board, self.report, self.pinned = board, report, pinned
        self._hand_over, self._turns = hand_over, turns
        self._most_losses = most_losses
        self._open: dict[str, _Work] = {}
        self._by_gid: dict[int, _Work] = {}
        """Also groups that are over, of parts that are open: who has such a part decodes all of it."""
        self._over: Remembered[_Over] = Remembered(_REMEMBERED, self.is_open)
        self._queue = PartQueue(self._is_free)
        self._waiting: list[_Waiting] = []
        self._dealing = False
        self._made: dict[str, int] = {}
        self._fault: RunError | None = None
        self._failed = anyio.Event()

    @property
    def queued(self) -> int:
        """Parts that nobody has."""
        return sum(work.holder is None for work in self._open.values())

    @property
    def made(self) -> int:
        """Tokens of the longest completion under way, as far as members have said."""
        return max(self._made.values(), default=0)

    def leases(self, member: Member) -> tuple[str, ...]:
        """Names of the parts that it has."""
        return tuple(name for name, work in self._open.items() if work.holder is member)

    def is_open(self, gid: int) -> bool:
        """Whether a group's part is, though the group itself may be over."""
        return gid in self._by_gid

    def prompt(self, gid: int) -> Prompt:
        """Of a group that is open, or is over since a short time. LookupError for others."""
        return self._by_gid[gid].part.prompt_of(gid) if gid in self._by_gid else self._over[gid].prompt

    def submit(self, part: Part) -> None:
        """A part is to be decoded. ValueError where it is open already."""
        if part.name in self._open:
            raise ValueError(f"part {part.name} is open already")
        work = self._open[part.name] = _Work(part)
        self._by_gid |= dict.fromkeys(work.left, work)
        for gid in work.left:  # of an earlier time: what comes from now on is asked anew
            self._over.forget(gid)
        self._enqueue(work, is_new=True)

    async def take(self, member: Member, *, most: int = 1, rows: bool = True) -> list[Part]:
        """Up to `most` parts, leased to the member; waits until there is one. `rows`: whether it takes one of an
        evaluation, too."""
        waiting = _Waiting(member, most, rows=rows)
        self._waiting.append(waiting)
        self._deal_soon()
        try:
            await waiting.came.wait()
        except BaseException:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            self._free(waiting.given)
            raise
        return waiting.given

    def renew(self, member: Member, held: Collection[str]) -> list[str]:
        """It says that it has these parts. Others that it had go back; → those of them that it should drop.

        What it had, lost, and nobody else has taken meanwhile, it has again.
        """
        self._free([work.part for work in self._held_by(member) if work.part.name not in held])
        drop = []
        for name in held:
            work = self._open.get(name)
            if work is not None and work.holder is None and member.name in work.asked:
                self._lease(work, member)
            elif work is None or work.holder is not member:
                drop.append(name)
        return drop

    def lost(self, member: Member, reason: str, names: Collection[str] | None = None) -> None:
        """It has died, or is out of reach: its parts (None: all of them) go to others. Too many members lost on one
        part end the run, as `watch` tells."""
        self._made.pop(member.name, None)
        for work in self._held_by(member):
            if names is not None and work.part.name not in names:
                continue
            work.losses += 1
            self._free([work.part])
            if work.losses >= self._most_losses and self._fault is None:
                self._fault = RunError(
                    f"step {work.part.step}: {work.losses} members in a row were lost while they decoded "
                    f"{_described(work.part)}, the last one {member.name}: {reason}; mend the cause, then go on with "
                    "--resume"
                )
                self._failed.set()

    async def watch(self) -> None:
        """Wait until a part has cost too many members, and raise RunError."""
        await self._failed.wait()
        assert self._fault is not None
        raise self._fault

    async def completed(self, member: Member, group: RolloutGroup) -> Verdict:
        """A member has completed a group: it is handed over the first time that it comes."""
        gid = group.prompt.gid
        if gid in self._over:
            return await self._compare(member, group, self._over[gid])
        work = self._by_gid.get(gid)
        if work is None or member.name not in work.asked:
            return "foreign"
        work.left.remove(gid)
        work.losses = 0
        self._over.add(gid, _Over(work.part.prompt_of(gid), work.asked, _digest(group) if self.pinned else b""))
        if not work.left:
            self._close(work)
        await self._hand_over(group)
        if work.holder is not None and not self._held_by(work.holder):
            self._made.pop(work.holder.name, None)
        return "taken"

    def progress(self, member: Member, tokens: int) -> None:
        """The longest completion that it is at has so many tokens."""
        self._made[member.name] = tokens

    async def turn_taken(self, member: Member, turn: TurnTaken) -> None:
        """A sample of a part that the member has waits for an answer. One of others' parts is passed over."""
        work = self._by_gid.get(turn.prompt.gid)
        if work is None or work.holder is not member or self._turns is None:
            return
        work.asker = turn.asker
        prompt = work.part.prompt_of(turn.prompt.gid)
        await self._turns(msgspec.structs.replace(turn, prompt=prompt, asker=work.lease))

    async def observe(self, observation: Observation) -> None:
        """An answer goes to who asked; one whose asker has lost the part is of no use to another."""
        work = self._by_gid.get(observation.gid)
        if work is not None and work.holder is not None and work.lease == observation.asker:
            await work.holder.observe(msgspec.structs.replace(observation, asker=work.asker))

    async def _compare(self, member: Member, group: RolloutGroup, over: _Over) -> Verdict:
        if member.name not in over.asked:
            return "foreign"
        if not self.pinned or over.digest == _digest(group):
            return "known"
        gid = group.prompt.gid
        message = (
            f"{member.name} completed group {gid} otherwise than it had been completed before, though both had the "
            "same weights; its answer was not used"
        )
        await self.report.incident(Incident(actor=self.report.actor, kind="answers_differ", message=message, gid=gid))
        return "differs"

    def _close(self, work: _Work) -> None:
        del self._open[work.part.name]
        for prompt in work.part.prompts:
            del self._by_gid[prompt.gid]
        self._deal_soon()  # who had rows may have others

    def _is_free(self, name: str) -> bool:
        return name in self._open and self._open[name].holder is None

    def _held_by(self, member: Member) -> list[_Work]:
        return [work for work in self._open.values() if work.holder is member]

    def _lease(self, work: _Work, member: Member) -> None:
        work.holder, work.lease = member, next(_LEASES)
        work.asked.add(member.name)

    def _free(self, parts: Collection[Part]) -> None:
        for part in parts:
            work = self._open.get(part.name)
            if work is not None:
                work.holder = None
                self._enqueue(work, is_new=False)

    def _enqueue(self, work: _Work, *, is_new: bool) -> None:
        self._queue.add(work.part, is_new=is_new)
        self._deal_soon()

    def _deal_soon(self) -> None:
        """When all that comes at this moment has come, so that it is dealt evenly."""
        if self._waiting and not self._dealing:
            self._dealing = True
            asyncio.get_running_loop().call_soon(self._deal)

    def _deal(self) -> None:
        self._dealing = False
        held = {id(waiting): len(self.leases(waiting.member)) for waiting in self._waiting}
        evaluating = {id(work.holder) for work in self._open.values() if work.part.set is not None}
        while self._waiting:
            able = [each for each in self._waiting if each.rows and id(each.member) not in evaluating]
            if (name := self._queue.pop(rows=bool(able))) is None:
                break
            work = self._open[name]
            # the first of them where they are equal
            waiting = min(self._waiting if work.part.set is None else able, key=lambda each: held[id(each)])
            if work.part.set is not None:
                evaluating.add(id(waiting.member))
            self._lease(work, waiting.member)
            waiting.given.append(work.part)
            held[id(waiting)] += 1
            waiting.came.set()
            if len(waiting.given) >= waiting.most:
                self._waiting.remove(waiting)
        self._waiting = [waiting for waiting in self._waiting if not waiting.given]


def _described(part: Part) -> str:
    if part.set is not None:
        rows = f"{part.prompts[0].row} to {part.prompts[-1].row}"  # a piece of a set is a range of it
        return f"rows {rows} that are evaluated (part {part.name})"
    places = ", ".join(str(prompt.slot.place) for prompt in part.prompts)
    return f"the prompts at places {places} (part {part.name})"


def _digest(group: RolloutGroup) -> bytes:
    """Of all that decoding has made of it, to the bit."""
    made = msgspec.msgpack.encode((group.prompt_experts, group.rollouts))
    return hashlib.sha256(made).digest()
