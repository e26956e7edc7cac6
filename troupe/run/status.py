"""What a run is doing, read off its actors and mailboxes when somebody asks. It changes nothing.

The functions take the actors in the order in which work flows, and times on `time.perf_counter`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from troupe.messages import (
    NOTHING_TOLD,
    GroupClosed,
    Incident,
    LiveGroup,
    Prompt,
    RolloutGroup,
    ScoredGroup,
    Slot,
    Span,
)
from troupe.runtime.actor import Actor

_AT_LEARNER = "learner"
DEVICE_ACTORS = frozenset({"generator", "learner", "checkpointer"})
"""Actors whose work is long by nature, and cannot be told from a hang but by its name."""


def live_groups(
    alive: Mapping[int, tuple[Slot, float]], actors: Sequence[Actor], now_s: float, *, handed_over: Collection[int] = ()
) -> tuple[LiveGroup, ...]:
    """Every group between prompting and the end of its training, with who has it; the oldest first.

    `alive`: gid → slot, and when it was prompted. `handed_over`: groups that the first actor down the line that has
    them in hand has sent on already. A group that nobody has in a mailbox or in hand is one that the learner collects.
    """
    owners: dict[int, tuple[str, bool]] = {}
    for actor in actors:
        for messages, waiting in ((actor.inbox.in_hand, False), (actor.inbox.waiting, True)):
            for message in messages:
                gid = gid_of(message)
                if gid is not None and not (isinstance(message, Prompt) and gid in handed_over):
                    owners[gid] = actor.name, waiting
    groups = []
    for gid, (slot, since_s) in alive.items():
        owner, waiting = owners.get(gid, (_AT_LEARNER, False))
        groups.append(LiveGroup(gid=gid, slot=slot, owner=owner, waiting=waiting, age_s=now_s - since_s))
    return tuple(sorted(groups, key=lambda group: -group.age_s))


def gid_of(message: object) -> int | None:
    """The group that a message carries."""
    match message:
        case Prompt() | GroupClosed():
            return message.gid
        case RolloutGroup():
            return message.prompt.gid
        case ScoredGroup():
            return message.group.prompt.gid
    return None


def queues(actors: Iterable[Actor]) -> dict[str, int]:
    """Channel → messages that wait in it, control channels left out."""
    return {
        stats.name: stats.depth
        for actor in actors
        for stats in (channel.stats() for channel in actor.inbox.channels if not channel.side)
    }


def doing(actors: Iterable[Actor], now_s: float) -> dict[str, str]:
    """Actor → what it does or waits for, and since when, in words."""
    return {actor.name: _in_words(actor.report.doing, now_s) for actor in actors}


def last_movement_s(actors: Iterable[Actor]) -> float:
    """When a message was last taken, or the work of a device begun that is going on."""
    times = []
    for actor in actors:
        if not actor.leaves_last:  # it takes what others tell, which is no movement
            times += [actor.inbox.moved_s, *(work.start_s for work in _device_work(actor))]
    return max(times, default=0.0)


def stall(groups: Sequence[LiveGroup], actors: Sequence[Actor], now_s: float, still_s: float) -> Incident:
    """What to tell when nothing has moved for `still_s` seconds: `stalled`, or `long_work` where a device computes."""
    at_work = [work for actor in actors for work in _device_work(actor)]
    parts = [f"nothing has moved for {still_s:.0f} s"]
    parts += [f"{work.actor} is computing `{work.name}` since {now_s - work.start_s:.0f} s" for work in at_work[:1]]
    for oldest in groups[:1]:
        where = f"waiting for {oldest.owner}" if oldest.waiting else f"with {oldest.owner}"
        slot = oldest.slot
        parts.append(
            f"the oldest group is {oldest.gid} (step {slot.step}, place {slot.place}, attempt {slot.attempt}), "
            f"{where}, {oldest.age_s:.0f} s old"
        )
    parts += [f"{name}: {what}" for name, what in doing(actors, now_s).items()]
    return Incident(
        actor="supervisor",
        kind="long_work" if at_work else "stalled",
        message="; ".join(parts),
        gid=groups[0].gid if groups else None,
    )


def _device_work(actor: Actor) -> list[Span]:
    return [span for span in actor.report.doing if span.kind == "work" and actor.name in DEVICE_ACTORS]


def _in_words(going_on: Sequence[Span], now_s: float, most: int = 3) -> str:
    words = [
        f"{'waits: ' if span.kind == 'wait' else ''}{span.name}{'' if span.gid is None else f' of group {span.gid}'} "
        f"for {now_s - span.start_s:.1f} s"
        for span in going_on[:most]
    ]
    more = len(going_on) - most
    return ", ".join([*words, *([f"and {more} more"] if more > 0 else [])]) or NOTHING_TOLD
