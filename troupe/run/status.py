"""What a run is doing, read off its actors and mailboxes when somebody asks; before and after they run, a `Progress`
says it.

The functions take the actors in the order in which work flows, and times on `time.perf_counter`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from troupe.messages import (
    NOTHING_TOLD,
    Activity,
    GroupClosed,
    Incident,
    LiveGroup,
    Prompt,
    RolloutGroup,
    ScoredGroup,
    Slot,
    Span,
    TurnTaken,
)
from troupe.rewards import Wait
from troupe.runtime.actor import Actor

_AT_LEARNER = "learner"
_ENVIRONMENT = "environment"
_TOLD_AFTER_S, _LONG_S = 2.0, 10.0
"""A wait for an environment is told of, and something may be wrong with it."""
_BESIDE = ("checkpointer", "teacher")
"""Told of only while who is before them does nothing."""
_MOST_NAMED, _LONGEST_NAME = 3, 60
DEVICE_ACTORS = frozenset({"generator", "learner", "checkpointer", "evaluator", "teacher"})
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
        case RolloutGroup() | TurnTaken():
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
    alike = Counter(span.name for span in going_on)
    many = {name: count for name, count in alike.items() if count > most}
    words = []
    for name, count in list(many.items())[:most]:
        longest_s = max(now_s - span.start_s for span in going_on if span.name == name)
        words.append(f"{count} × {name}, the longest for {longest_s:.1f} s")
    others = [span for span in going_on if span.name not in many]
    room = most - len(words)
    words += [
        f"{'waits: ' if span.kind == 'wait' else ''}{span.name}{'' if span.gid is None else f' of group {span.gid}'}"
        f"{f' at {span.member}' if span.member else ''} for {now_s - span.start_s:.1f} s"
        for span in others[:room]
    ]
    more = max(0, len(many) - most) + max(0, len(others) - room)
    return ", ".join([*words, *([f"and {more} more"] if more > 0 else [])]) or NOTHING_TOLD


_AT_LEAST_S = 1.0
"""What has taken less is told without its time."""


class Progress:
    """What is done while no actor runs: a few fields that whoever does it sets, from any thread."""

    def __init__(self) -> None:
        self.what = ""
        """Empty: nothing."""
        self.done = self.total = 0
        """How far it is; a total of 0 is not told."""
        self.since_s = 0.0

    @contextmanager
    def at(self, what: str) -> Iterator[Progress]:
        """The body does this."""
        self.what, self.done, self.total, self.since_s = what, 0, 0, time.perf_counter()
        try:
            yield self
        finally:
            self.what = ""

    def activity(self, now_s: float) -> Activity | None:
        """In words; None where nothing is done."""
        if not self.what:
            return None
        far = f" {min(self.done, self.total):,} / {self.total:,}" if self.total else ""
        return Activity(what=self.what, detail=far + _lasting(now_s - self.since_s))


def of_actors(actors: Iterable[Actor], now_s: float, most_tokens: int) -> Activity | None:
    """What the actors are at; None where none works on a step. `most_tokens`: of a completion."""
    parts: list[str] = []
    begun_s: list[float] = []
    far: list[str] = []
    environment: Activity | None = None
    for actor in actors:
        if actor.name == _ENVIRONMENT:
            environment = _waits_of(actor.report.doing, now_s)
            continue
        spans = [span for span in actor.report.doing if span.kind == "work"]
        told = actor.activity or _of(actor.name, spans)
        if told is None or (actor.name in _BESIDE and parts):
            continue
        parts.append(told)
        begun_s.append(min((span.start_s for span in spans), default=now_s))
        progress = actor.progress
        if told.startswith("generating") and actor.made:
            progress = f"{actor.made:,} of at most {most_tokens:,} tokens"
        far += [progress] if progress else []
    if not parts:
        return environment
    beside = "" if environment is None else f"; {environment.text}"
    detail = f": {', '.join(far)}" if far else ""
    return Activity(what=", ".join(parts), detail=detail + _lasting(now_s - min(begun_s)) + beside)


def _waits_of(going_on: Sequence[Span], now_s: float) -> Activity | None:
    """That answers of environments and tools are waited for; None where none has been for a while."""
    waited_s = max((now_s - span.start_s for span in going_on if span.kind == "work"), default=0.0)
    if waited_s < _TOLD_AFTER_S:
        return None
    names = list(dict.fromkeys(_asked(span.name) for span in going_on if span.kind == "work"))
    told = [*names[:_MOST_NAMED], *([f"{len(names) - _MOST_NAMED} more"] if len(names) > _MOST_NAMED else [])]
    is_long = waited_s >= _LONG_S
    return Activity(what=f"waiting for {' and '.join(told)}", detail=_lasting(waited_s), waiting=is_long)


def _asked(span: str) -> str:
    """Who is asked, by the name of a span: `tool NAME`, `step NAME`, `reset NAME`."""
    kind, _, name = span.partition(" ")
    if kind == "tool":
        return span[:_LONGEST_NAME]
    return f"environment {name[:_LONGEST_NAME]}" if kind in ("step", "reset") and name else "environments"


def with_needs(activity: Activity | None, actors: Iterable[Actor]) -> Activity | None:
    """The same, and before it what an actor must be given from outside."""
    needs = [actor.needs for actor in actors if actor.needs]
    if not needs:
        return activity
    rest = "" if activity is None else f"; {activity.text}"
    return Activity(what="; ".join(needs), detail=rest, waiting=True)


def with_waits(activity: Activity | None, waits: Mapping[str, Wait], of: str = "reward") -> Activity | None:
    """The same, and before it what it waits for. `of`: what those are that are waited for."""
    if not waits:
        return activity
    told = [f"{wait.why} ({_counted(wait.tries, 'try', 'tries')}, {_time(wait.for_s)})" for wait in waits.values()]
    rest = "" if activity is None else f"; {activity.text}"
    what = f"waiting for {of} {' and '.join(waits)}"
    return Activity(what=what, detail=f": {'; '.join(told)}{rest}", waiting=True)


def _of(actor: str, spans: Sequence[Span]) -> str | None:
    for span in spans:
        step = "" if span.step is None else f" step {span.step + 1:,}"
        match actor, span.name:
            case "generator", "generate":
                return f"generating{step}"
            case "generator", "start process":
                return "starting the generator"
            case "teacher", "teach":
                return f"asking the teacher{step and f' about{step}'}"
            case "scorer", name if name.startswith("score "):
                return f"scoring{step}"
            case "learner", "learn":
                return f"learning{step}"
            case "checkpointer", _:
                return "saving" if span.step is None else f"saving step {span.step:,}"
    return None


def _lasting(seconds: float) -> str:
    return f" ({_time(seconds)})" if seconds >= _AT_LEAST_S else ""


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    return f"{minutes} min" if not hours else f"{hours} h {minutes % 60:02d} min"


def _counted(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"
