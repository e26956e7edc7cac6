"""Members of a run (workers, processes, engines, ranks) in words; `show.js` mirrors them."""

from collections.abc import Iterable, Sequence

from troupe.messages import MemberKind, MemberState, MemberStatus
from troupe.records import text as words

_PLURALS: dict[MemberKind, str] = {"process": "processes", "worker": "workers", "engine": "engines", "rank": "ranks"}
_MOST_LEASES = 3
_QUIET_S = 5.0
"""Without a word from a member, before that is told."""


def worth_telling(members: Sequence[MemberStatus]) -> bool:
    """Whether they say more than the run itself: its one generator in a process is no crowd."""
    return len(members) > 1 or any(member.kind != "process" for member in members)


def called(members: Sequence[MemberStatus]) -> str:
    """What they are together."""
    kinds = {member.kind for member in members}
    return _PLURALS[kinds.pop()] if len(kinds) == 1 else _PLURALS["worker"]


def summary(members: Sequence[MemberStatus]) -> str:
    """How many are at work, and how fast they are together: `2 of 3 at work, 612 tokens/s`."""
    here = [member for member in members if member.is_here]
    at_work = sum(member.state == "working" for member in here)
    rates = [member.tokens_per_second for member in here if member.tokens_per_second is not None]
    gone = len(members) - len(here)
    told = [f"{at_work} of {len(here)} at work" if here else "none is here"]
    told += [f"{sum(rates):,.0f} tokens/s"] if rates else []
    return ", ".join(told + ([f"{gone} gone"] if gone else []))


def cluster_figures(members: Iterable[MemberStatus]) -> dict[str, float]:
    """What of workers and engines is measured at the end of a step; nothing where there have been none."""
    outside = [member for member in members if member.kind in ("worker", "engine")]
    if not outside:
        return {}
    here = [member for member in outside if member.is_here]
    return {
        "cluster/members": float(len(here)),
        "cluster/tokens_per_second": sum(member.tokens_per_second or 0.0 for member in here),
    }


class Comings:
    """Who of the workers and engines has come, or come back, since the last look. Of those that go there are
    incidents."""

    def __init__(self) -> None:
        self._here: set[str] = set()

    def look(self, members: Iterable[MemberStatus]) -> list[str]:
        """A line for each."""
        outside = [member for member in members if member.kind in ("worker", "engine")]
        came = [member for member in outside if member.is_here and member.name not in self._here]
        self._here = {member.name for member in outside if member.is_here}
        return [
            f"{member.kind} {member.name} is here" + (f": {member.device}" if member.device else "") for member in came
        ]


def at_a_glance(member: MemberStatus) -> str:
    """In as few words as say how it is: its speed, or what keeps it from work."""
    if member.state == "working" and member.tokens_per_second is not None:
        return f"{member.tokens_per_second:,.0f}"
    quiet = member.state == "silent" and member.last_beat_s is not None
    return f"silent {member.last_beat_s:.0f} s" if quiet else member.state


def told(member: MemberStatus) -> str:
    """All that is known of it, on one line."""
    return ", ".join(
        part
        for part in (
            doing(member),
            f"{member.tokens_per_second:,.0f} tokens/s" if member.is_here and member.tokens_per_second else "",
            f"version {member.version:,}" if member.is_here and member.version is not None else "",
            _silence(member),
            "" if member.offers == ("generate",) else f"offers {', '.join(member.offers)}",
            member.device,
        )
        if part
    )


def doing(member: MemberStatus) -> str:
    """What it is at, with the names of its leases, and why it is not at work where that is known."""
    text = _state(member.state, member.leases)
    return f"{text}: {member.detail}" if member.detail else text


def _state(state: MemberState, leases: Sequence[str]) -> str:
    if state != "working" or not leases:
        return state
    more = len(leases) - _MOST_LEASES
    return f"working on {', '.join(leases[:_MOST_LEASES])}" + (f" and {more} more" if more > 0 else "")


def _silence(member: MemberStatus) -> str:
    if member.last_beat_s is None or (member.is_here and member.last_beat_s < _QUIET_S):
        return ""
    return f"heard of {words.seconds(member.last_beat_s)} ago"
