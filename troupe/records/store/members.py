"""Members in run.sqlite: who did a start's work in a process of its own, from when to when, and how it ended."""

import sqlite3
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from troupe.messages import MemberStatus
from troupe.records.store.text import safe_text

MEMBERS = (
    "CREATE TABLE IF NOT EXISTS members (start INTEGER, name TEXT, kind TEXT, device TEXT, offers TEXT, joined REAL,"
    " seen REAL, losses INTEGER, tokens REAL, state TEXT, detail TEXT, PRIMARY KEY (start, name))"
)
"""One row a member and start. `joined`, `seen`: when it was here first and last; `losses`: how often it went without
having ended; `tokens`: about as many as it generated; `state`, `detail`: those that it was left with."""
_PUT = "INSERT OR REPLACE INTO members VALUES ((SELECT max(start) FROM starts),?,?,?,?,?,?,?,?,?,?)"
_EVERY_S = 30.0
_LONGEST_LOOK_S = 10.0
"""Between two looks, in which the speed is taken to be the same."""

_Statement = tuple[str, tuple[Any, ...]]


class StoredMember(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a member in one start of the run."""

    start: int
    name: str
    kind: str
    device: str
    offers: str
    joined_unix_s: float
    seen_unix_s: float
    losses: int
    """Times that it was lost or put out."""
    tokens: float
    """About as many as it generated."""
    state: str
    detail: str


class _Known:
    """One member as it was seen so far."""

    def __init__(self, now_s: float) -> None:
        self.joined_s = self.seen_s = self.looked_s = now_s
        self.losses, self.tokens = 0, 0.0
        self.was_here = False
        self.newest: MemberStatus | None = None

    def look(self, member: MemberStatus, now_s: float) -> bool:
        """Take over what it is now → whether it has come, gone or is told of for another reason."""
        before = self.newest
        gap_s = min(max(0.0, now_s - self.looked_s), _LONGEST_LOOK_S)
        if member.is_here:
            self.seen_s = max(self.seen_s, now_s)
            if member.state == "working":
                self.tokens += gap_s * (member.tokens_per_second or 0.0)
        elif self.was_here and member.state != "ended":
            self.losses += 1
        self.looked_s, self.was_here, self.newest = now_s, member.is_here, member
        return before is None or before.is_here != member.is_here or before.detail != member.detail

    def row(self) -> tuple[Any, ...]:
        assert self.newest is not None
        member = self.newest
        texts = (safe_text(member.name), member.kind, safe_text(member.device), safe_text(", ".join(member.offers)))
        figures = (self.joined_s, self.seen_s, self.losses, round(self.tokens))
        return (*texts, *figures, member.state, safe_text(member.detail))


class MemberBook:
    """What is to be written of members, from what they are at every look."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: unix seconds."""
        self._clock = clock
        self._known: dict[str, _Known] = {}
        self._written_s = float("-inf")
        self._unwritten: set[str] = set()

    def look(self, members: Iterable[MemberStatus]) -> list[_Statement]:
        """The statements that are due: at once for who comes or goes, now and then for all."""
        now_s = self._clock()
        changed = set()
        for member in members:
            if self._known.setdefault(member.name, _Known(now_s)).look(member, now_s):
                changed.add(member.name)
        if now_s >= self._written_s + _EVERY_S:
            self._written_s, changed = now_s, set(self._known)
        self._unwritten = self._known.keys() - changed
        return self._rows(changed)

    def rest(self) -> list[_Statement]:
        """What was not due yet; at the end."""
        return self._rows(self._unwritten)

    def _rows(self, names: Iterable[str]) -> list[_Statement]:
        return [(_PUT, self._known[name].row()) for name in sorted(names)]


def stored_members(connection: sqlite3.Connection) -> Iterator[StoredMember]:
    """Those of all starts, in the order in which they came; none in a store of an older version."""
    if not connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'members'").fetchone()[0]:
        return
    for row in connection.execute("SELECT * FROM members ORDER BY start, joined, name"):
        yield StoredMember(**dict(zip(StoredMember.__struct_fields__, row, strict=True)))
