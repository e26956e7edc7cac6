"""What a run came to, in figures that can be set beside those of others: how high, how soon, for how much."""

from collections.abc import Iterator, Sequence
from math import floor, fsum, log10
from statistics import median

import msgspec

from troupe.records.curves import Thinned

_PART = 10
"""A figure is a mean over one of so many parts of the shortest run, so that no single lucky step makes it."""
_WAY = 0.9


class Level(msgspec.Struct, frozen=True, kw_only=True):
    """What all runs are measured by."""

    window: int
    """Steps over which a reward is averaged."""
    steps: int
    """That all runs have made."""
    reward: float | None
    """The reward that it is counted how soon a run has it; None where there is none."""


class RunFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What a run came to; None where nothing tells it."""

    first: float | None
    """Mean reward of its first steps, as many as the level's window has."""
    last: float | None
    """That of its newest steps."""
    best: float | None
    """That of the best steps."""
    best_step: int | None
    """The last of those."""
    area: float | None
    """Mean reward over the steps that all runs have made: the area under its curve, divided by their number."""
    reached_step: int | None
    """After which the mean was at the level's reward for the first time."""
    reached_s: float | None
    reached_tokens: float | None


def level_of(runs: Sequence[Thinned], reward: float | None = None) -> Level:
    """What the runs are measured by. `reward`: None for nine tenths of the way, rounded down, from where the middle one
    of the runs began to where the best one came."""
    steps = min((run.steps[-1] for run in runs if run.steps), default=0)
    window = max(1, steps // _PART)
    means = [[mean for _, mean in _means(run, window)] for run in runs]
    if reward is None and any(means):
        start, best = median(one[0] for one in means if one), max(max(one) for one in means if one)
        reward = _rounded_down(start + _WAY * (best - start))
    return Level(window=window, steps=steps, reward=reward)


def figures_of_run(run: Thinned, level: Level) -> RunFigures:
    """The figures of one."""
    means = list(_means(run, level.window))
    best = max(means, key=lambda one: one[1], default=None)
    at = next((at for at, mean in means if level.reward is not None and mean >= level.reward), None)
    values = run.curves["reward"].mean if "reward" in run.curves else ()
    common = [
        (run.steps[i], value) for i, value in enumerate(values) if value is not None and run.steps[i] <= level.steps
    ]
    return RunFigures(
        first=means[0][1] if means else None,
        last=means[-1][1] if means else None,
        best=best[1] if best else None,
        best_step=run.steps[best[0]] if best else None,
        area=_area(common),
        reached_step=None if at is None else run.steps[at],
        reached_s=run.seconds[at] if at is not None and run.seconds else None,
        reached_tokens=run.tokens[at] if at is not None and run.tokens else None,
    )


def _means(run: Thinned, window: int) -> Iterator[tuple[int, float]]:
    """(place, mean reward over the points up to there), for each point that has a whole window before it."""
    values = run.curves["reward"].mean if "reward" in run.curves else ()
    points = max(1, round(window / run.steps_a_point))
    known: list[float] = []
    for at, value in enumerate(values):
        if value is not None:
            known.append(value)
            if len(known) >= min(points, len(values)):
                yield at, fsum(known[-points:]) / len(known[-points:])


def _area(points: Sequence[tuple[int, float]]) -> float | None:
    """The mean over steps of a curve whose points stand for the steps since the point before."""
    before, sums, steps = 0, 0.0, 0
    for step, value in points:
        sums, steps, before = sums + value * (step - before), steps + step - before, step
    return sums / steps if steps else None


def _rounded_down(value: float) -> float:
    """To two digits, and never above it."""
    if value == 0:
        return 0.0
    unit = 10.0 ** (floor(log10(abs(value))) - 1)
    return float(f"{floor(value / unit + 1e-9) * unit:.6g}")
