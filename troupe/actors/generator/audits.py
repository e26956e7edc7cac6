"""Audits: some parts are decoded by a second member before they are used, and where they differ by the run itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from typing import Literal, Protocol, TypeAlias

import anyio

from troupe.actors.generator.checks import bits_of
from troupe.actors.generator.parts import Part
from troupe.messages import RolloutGroup

_WAITS_S = 10.0
"""For a second member to begin, before the run decodes the part itself."""

Differing: TypeAlias = Literal["tokens", "log-probs"]


class Judge(Protocol):
    """The run's own decoding, which answers are compared with."""

    async def decode(self, part: Part) -> list[RolloutGroup]:
        """All groups of a part, with the version that it names. LookupError where that is gone."""


class _Audit:
    """One part that is decoded twice."""

    def __init__(self, part: Part, first: str) -> None:
        self.part = part
        self.first = first
        self.second: str | None = None
        self.answers: dict[str, dict[int, RolloutGroup]] = {first: {}}
        """Member → its groups so far."""
        self.settling = False
        self.changed = anyio.Event()

    def is_whole(self, name: str | None) -> bool:
        """Whether one has completed all of it."""
        return name is not None and len(self.answers.get(name, ())) == len(self.part.prompts)

    def tell(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()

    def bits(self, name: str) -> tuple[str, str]:
        return bits_of(self.answers[name].values())


class Settled:
    """What came of an audit."""

    def __init__(self) -> None:
        self.liars: dict[str, Differing] = {}
        """Members whose answers are not the run's, and what in them is not."""
        self.first = ""
        self.groups: list[RolloutGroup] = []
        """The first member's, where they hold."""


class Audits:
    """The audits under way. Which parts there are audits of is a function of their names and the seed alone."""

    def __init__(self, share: float, *, seed: int = 0, judge: Judge | None = None) -> None:
        """`share`: of all parts, 0 to 1. `judge`: decodes where two differ, and where there is no second member."""
        self._share, self._seed, self._judge = share, seed, judge
        self._open: dict[str, _Audit] = {}
        self._wanted = anyio.Event()

    def begin(self) -> None:
        """Forget those under way: their parts are given out anew."""
        self._open.clear()

    def given(self, part: Part, name: str) -> None:
        """A member has been given a part; it is audited where its name says so."""
        audit = self._open.get(part.name)
        if audit is not None and audit.second == name:
            return
        if self._judge is not None and drawn(self._seed, part.name) < self._share:
            self._open[part.name] = _Audit(part, name)

    def forget(self, part: str) -> None:
        """An audit has come to nothing."""
        self._open.pop(part, None)

    def concerns(self, part: str, name: str) -> bool:
        """Whether the answers of a member to a part are kept for an audit."""
        audit = self._open.get(part)
        return audit is not None and name in audit.answers

    def add(self, part: str, name: str, group: RolloutGroup) -> Literal["kept", "differs", "whole"]:
        """One more group. `differs`: it has answered otherwise before; `whole`: `settle` is to be called, once."""
        audit = self._open[part]
        before = audit.answers[name].setdefault(group.prompt.gid, group)
        if before is not group and bits_of([before]) != bits_of([group]):
            return "differs"
        if audit.is_whole(audit.second):
            audit.tell()
        if not audit.is_whole(audit.first) or audit.settling:
            return "kept"
        audit.settling = True
        self._wanted.set()
        return "whole"

    async def take(self, name: str) -> Part:
        """A part that a member is to decode as the second one, as soon as there is one."""
        while True:
            for audit in self._open.values():
                if audit.settling and audit.second is None and audit.first != name:
                    audit.second = name
                    audit.answers[name] = {}
                    audit.tell()
                    return audit.part
            self._wanted = anyio.Event() if self._wanted.is_set() else self._wanted
            await self._wanted.wait()

    def waiting_of(self, name: str) -> list[str]:
        """Parts that a member has decoded and that are not handed over yet: they are still its own."""
        return [part for part, audit in self._open.items() if audit.first == name and audit.settling]

    def is_second(self, part: str, name: str) -> bool:
        """Whether a member has a part for its audit."""
        audit = self._open.get(part)
        return audit is not None and audit.second == name

    def renew(self, name: str, held: Collection[str]) -> None:
        """A member has these parts in hand; what it was to decode as the second one and does not have, it has lost."""
        for part, audit in self._open.items():
            if audit.second == name and part not in held and not audit.is_whole(name):
                self._lose_second(audit)

    def gone(self, name: str) -> None:
        """A member is gone: parts that it had first are given out anew, as is what it had second."""
        for part, audit in list(self._open.items()):
            if audit.first == name:
                del self._open[part]
                audit.tell()
            elif audit.second == name and not audit.is_whole(name):
                self._lose_second(audit)

    def _lose_second(self, audit: _Audit) -> None:
        audit.answers.pop(audit.second or "", None)
        audit.second = None
        audit.tell()
        self._wanted.set()

    async def settle(self, part: str, others: Callable[[], bool]) -> Settled:
        """Wait for a second opinion on a part that one has decoded. `others`: whether somebody else could give it."""
        settled, audit, judge = Settled(), self._open[part], self._judge
        assert judge is not None
        while self._open.get(part) is audit and not audit.is_whole(audit.second):
            if audit.second is None and not others():
                break
            with anyio.move_on_after(_WAITS_S) as waiting:
                await audit.changed.wait()
            if waiting.cancelled_caught and audit.second is None:
                break
        if self._open.get(part) is not audit:
            return settled  # whoever had it is gone
        names = [audit.first, *([audit.second] if audit.second and audit.is_whole(audit.second) else [])]
        bits = {name: audit.bits(name) for name in names}
        if len(names) == 1 or len(set(bits.values())) > 1:
            own = bits_of(await judge.decode(audit.part))
            settled.liars = {
                name: "tokens" if theirs[0] != own[0] else "log-probs" for name, theirs in bits.items() if theirs != own
            }
        if self._open.get(part) is audit:
            del self._open[part]
            if audit.first not in settled.liars:
                settled.first, settled.groups = audit.first, list(audit.answers[audit.first].values())
        return settled


def drawn(seed: int, name: str) -> float:
    """A number in [0, 1) that follows from seed and name."""
    return int.from_bytes(hashlib.sha256(f"audit {seed} {name}".encode()).digest()[:8], "big") / 2**64
