"""A run's status as a person reads it at a glance."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from troupe.messages import NOTHING_TOLD, LiveGroup, MemberStatus, Status
from troupe.records.diagnosis import in_full
from troupe.records.evaluations import read_evaluations
from troupe.records.figures import FIGURES, function_of, written
from troupe.records.held_out import Standings
from troupe.records.members import called, summary, told, worth_telling
from troupe.records.trend import Trend, area, measured, stored_rewards, trend_of
from troupe.runtime.terminal import arrows, one_line

_WIDTH = 14
"""Of the labels."""
_CURVE_WIDTH = 30
"""Of the reward, in letters, at most."""
_MOST_MEMBERS = 32
"""That have a line each."""


class Past(msgspec.Struct, frozen=True, kw_only=True):
    """What a run came to so far."""

    reward: Trend = msgspec.field(default_factory=Trend)
    """Or, where nothing is scored, the loss."""
    held_out: Standings = msgspec.field(default_factory=Standings)
    held_out_loss: tuple[tuple[int, float], ...] = ()
    """(step, loss) of held-out rows of supervised steps, wherever it was measured."""
    encoding: str = "utf-8"
    """Of what is printed."""


def read_past(folder: Path) -> Past:
    """As far as the files in a run folder say it."""
    trend, losses = trend_of(stored_rewards(folder)), tuple[tuple[int, float], ...]()
    if trend.first is None:
        trend, losses = trend_of(stored_rewards(folder, figure="loss"), "loss"), measured(folder, "eval_loss")
    held_out, encoding = Standings(read_evaluations(folder)), sys.stdout.encoding or "utf-8"
    return Past(reward=trend, held_out=held_out, held_out_loss=losses, encoding=encoding)


def describe(status: Status, name: str, past: Past | None = None) -> str:
    """A Status as a person reads it at a glance: several lines, without a newline at the end; what somebody should look
    at comes first."""
    lines = [headline(status, name)]

    def add(label: str, text: str) -> None:
        lines.append(row(label, text))

    if status.notice:
        add("notice", status.notice)
    if status.restarting is not None:
        failure = status.restarting
        when = f"in {failure.next_try_s:.0f} s" if failure.next_try_s else "now"
        add("restarting", f"start {failure.attempt} of {failure.limit} {when}; {failure.reason}")
    if status.activity is not None:
        add("now", status.activity.text)
    for reason in status.held:
        add("held", reason)
    for reward, reason in status.rewards_down.items():
        add("down", f"{reward}: {reason}")
    for finding in status.findings:
        add("diagnosis", in_full(finding, name))
    if status.incidents:
        add("incidents", _counts(status.incidents))
    lines += [] if past is None else describe_past(past)
    lines += _figures(status.metrics)
    lines += _members(status.members)
    if status.groups:
        add("groups", _groups(status.groups))
    for actor, what in status.doing.items():
        if what != NOTHING_TOLD:
            add(actor, what)
    if status.restarts:
        add("new actors", _counts(status.restarts))
    return "\n".join(lines)


def describe_past(past: Past) -> list[str]:
    """The way of the reward: its first value, its newest, and a curve between; and of each set with held-out rows. No
    line where there is nothing."""
    held_out = [row("held-out", f"{name}  {told}".strip()) for name, told in past.held_out.lines(past.encoding)]
    if past.held_out_loss:
        step, best = min(past.held_out_loss, key=lambda point: point[1])
        at, loss = past.held_out_loss[-1]
        figures = f"loss {loss:.4f} at step {at:,}, best {best:.4f} at step {step:,}"
        held_out.append(row("held-out", figures))
    trend = past.reward
    if trend.first is None or trend.newest is None:
        return held_out
    first, newest = (written(value, ".4f") for value in (trend.first, trend.newest))
    if trend.steps[0] == trend.steps[1]:
        return [row(trend.of, newest), *held_out]
    [curve] = area(trend.values, min(_CURVE_WIDTH, len(trend.values)), encoding=past.encoding)
    steps = f"steps {trend.steps[0]:,} to {trend.steps[1]:,}"
    return [row(trend.of, f"{arrows(f'{first} → {newest}', past.encoding)}  {curve}  {steps}"), *held_out]


def _figures(metrics: Mapping[str, float]) -> list[str]:
    """Those of the newest step."""
    told = [
        f"{metric} {written(metrics[metric], figure.status)}"
        for metric, figure in FIGURES.items()
        if figure.status and metric in metrics
    ]
    lines = [row("" if at else "newest step", "  ".join(told[at : at + 5])) for at in range(0, len(told), 5)]
    means = {name: value for key, value in sorted(metrics.items()) if (name := function_of(key)) is not None}
    return lines + [
        row("" if at else "rewards", f"{name} {written(means[name], '.4f')}") for at, name in enumerate(means)
    ]


def _members(members: Sequence[MemberStatus]) -> list[str]:
    """All of them, and each on a line of its own; nothing where they say no more than the run itself."""
    if not worth_telling(members):
        return []
    more = len(members) - _MOST_MEMBERS
    return [
        row(called(members), summary(members)),
        *(row("", f"{member.name}: {told(member)}") for member in members[:_MOST_MEMBERS]),
        *([row("", f"and {more:,} more")] if more > 0 else []),
    ]


def row(label: str, text: str) -> str:
    """One line below the headline."""
    return f"  {label:<{_WIDTH}}{one_line(text)}"


def headline(status: Status, name: str) -> str:
    """Where the run stands, on one line."""
    line = f"{one_line(name)}: {status.phase}"
    if status.total_steps:
        line += f", step {status.step:,} of {status.total_steps:,} ({status.step / status.total_steps:.0%})"
    left_s = (status.total_steps - status.step) * status.metrics.get("step_time", 0.0)
    if left_s > 0 and status.phase == "running":
        line += f", about {duration(left_s)} left at the newest step's pace"
    return line


def duration(seconds: float) -> str:
    """A time in the two units that matter: `3 h 05 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _groups(groups: tuple[LiveGroup, ...]) -> str:
    owners = Counter(group.owner for group in groups)
    waiting = Counter(group.owner for group in groups if group.waiting)
    who = [
        f"{owner} {count}" + (f" ({waiting[owner]} waiting)" if waiting[owner] else "")
        for owner, count in owners.items()
    ]
    return f"{len(groups)} alive: {', '.join(who)}; the oldest is {duration(max(g.age_s for g in groups))} old"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
