"""MemberStatus: what is known of one that does a run's work in a process of its own, here or elsewhere."""

from typing import Literal, TypeAlias

import msgspec

MemberKind: TypeAlias = Literal["process", "worker", "engine", "rank"]
MemberState: TypeAlias = Literal["starting", "idle", "working", "waiting", "silent", "lost", "refused", "ended"]

_GONE = frozenset({"silent", "lost", "refused", "ended"})


class MemberStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One process of the generator, worker, external engine or rank of the learner, as of now."""

    name: str
    """One of a kind in its run, as on the timeline."""
    kind: MemberKind
    state: MemberState
    offers: tuple[str, ...] = ("generate",)
    """What it does: generate, rewards, environments, learn."""
    leases: tuple[str, ...] = ()
    """Names of the parts, or of other work, that it has."""
    tokens_per_second: float | None = None
    """Of late; None where it generates nothing."""
    last_beat_s: float | None = None
    """Seconds since it was heard of last; None where its end would be seen at once."""
    version: int | None = None
    """Of the policy that it holds."""
    device: str = ""
    """That it computes on, in words."""
    detail: str = ""
    """Why it is in this state, where that needs words."""

    @property
    def is_here(self) -> bool:
        """Whether it may still do work."""
        return self.state not in _GONE
