"""Which charts a run gets: metrics by their names → sections of charts. Knows neither pages nor pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import msgspec

from troupe.records.report.picture import RunPicture

Values = tuple[float | None, ...]

_MOST_LINES = 6
"""In one chart of rewards; more make another chart."""
_MOST_OTHERS = 24
"""Charts of metrics that are not ours."""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a chart, a value a point of the run's curves."""

    name: str
    y: Values
    low: Values = ()
    """The lower edge of a band about the line; empty where it has none."""
    high: Values = ()
    colour: int | None = None
    """1 to 8; None: by its place among the lines."""


class Chart(msgspec.Struct, frozen=True, kw_only=True):
    """Lines over steps."""

    key: str
    """A name for files."""
    title: str
    lines: tuple[Line, ...]
    format: str = "number"
    """A name that `charts.js` knows."""
    about: str = ""
    """What it shows, in a sentence."""
    least: float | None = None
    """A value that the vertical axis reaches."""
    smooth: bool = True


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """Charts that are looked at together."""

    title: str
    charts: tuple[Chart, ...]
    flat: tuple[str, ...] = ()
    """Titles of those that were 0 throughout, and are left out."""


class _Plan(msgspec.Struct, frozen=True):
    """A chart, if the run has any of its metrics."""

    key: str
    title: str
    lines: tuple[tuple[str, str], ...]
    """(metric, name)."""
    format: str = "number"
    about: str = ""
    least: float | None = None
    smooth: bool = True


def _plan(key: str, title: str, metric: str, about: str, **options: object) -> _Plan:
    return msgspec.structs.replace(_Plan(key, title, ((metric, title),), about=about), **options)


_LEARNING = (
    _plan(
        "loss",
        "Loss",
        "loss",
        "What the optimizer lowers; near 0 by construction, so its size says little.",
    ),
    _plan(
        "kl", "KL to the reference", "kl", "How far the policy has moved from where it began, nats a token.", least=0.0
    ),
    _plan(
        "entropy", "Entropy", "entropy", "Nats a token: near 0 the policy writes the same again and again.", least=0.0
    ),
    _Plan(
        "clip_ratio",
        "Clipped tokens",
        (
            ("clip_ratio/region_mean", "either side"),
            ("clip_ratio/low_mean", "below"),
            ("clip_ratio/high_mean", "above"),
            ("cispo_clip_ratio", "clipped weight"),
        ),
        "percent",
        "Part of the tokens whose ratio lies outside the clip range.",
        0.0,
    ),
    _plan("grad_norm", "Gradient norm", "grad_norm", "Before clipping (learner.max_grad_norm).", least=0.0),
    _plan(
        "learning_rate",
        "Learning rate",
        "learning_rate",
        "Of the step's last update.",
        format="scientific",
        least=0.0,
        smooth=False,
    ),
    _Plan(
        "advantages",
        "Advantages",
        (("advantages/abs_mean", "mean size"), ("advantages/std", "spread")),
        about="Of the completions trained on.",
        least=0.0,
    ),
)
_COMPLETIONS = (
    _plan(
        "clipped_ratio",
        "Cut at the limit",
        "completions/clipped_ratio",
        "Part of the completions that did not end by themselves.",
        format="percent",
        least=0.0,
    ),
    _Plan(
        "groups",
        "Groups by how they ended",
        (
            ("groups/trained", "trained"),
            ("groups/filtered", "filtered"),
            ("groups/stale", "stale"),
            ("groups/quarantined", "quarantined"),
        ),
        about="Trained on; left out without signal; too old; too few scores.",
        least=0.0,
        smooth=False,
    ),
)
_PLAY = (
    _Plan(
        "staleness",
        "Staleness",
        (("staleness", "mean"), ("staleness/max", "most")),
        about="Versions between the weights that wrote a token and those that learned from it.",
        least=0.0,
    ),
    _plan(
        "importance_ratio",
        "Importance ratio",
        "sampling/importance_sampling_ratio/mean",
        "Learner's over sampler's probability of a token; 1 where both agree.",
    ),
    _plan(
        "tokens_per_second",
        "Tokens a second",
        "tokens_per_second",
        "Sampled tokens over the step's time.",
        least=0.0,
    ),
    _Plan(
        "step_time",
        "Time of a step",
        (("step_time", "whole step"), ("learn_time", "learning")),
        "seconds",
        "From the end of the step before to its own.",
        0.0,
    ),
    _Plan(
        "exposed",
        "Device left waiting for",
        (
            ("time/reward/exposed_s", "rewards"),
            ("time/checkpoint/exposed_s", "checkpoints"),
            ("time/logging/exposed_s", "logging"),
        ),
        "seconds",
        "Seconds of a step in which these were at work and the device was not.",
        0.0,
        smooth=False,
    ),
    _plan(
        "peak_memory",
        "Peak memory",
        "peak_memory_gb",
        "Most that the arrays took in a step.",
        format="gigabytes",
        least=0.0,
    ),
    _Plan(
        "queues",
        "Waiting in queues",
        (
            ("queue/prompts/depth", "prompts"),
            ("queue/rollouts/depth", "rollouts"),
            ("queue/scored/depth", "scored"),
            ("queue/snapshots/depth", "snapshots"),
        ),
        about="Messages, at the end of a step.",
        least=0.0,
        smooth=False,
    ),
)
_OURS = ("rewards/", "completions/", "advantages/", "clip_ratio/", "sampling/", "groups/", "queue/", "time/", "tokens/")
"""How metrics begin that are no reward's own, and the names of those that begin otherwise."""
_OUR_NAMES = frozenset(
    [
        "reward",
        "reward_std",
        "reward_std_within_groups",
        "frac_reward_zero_std",
        "num_tokens",
        "nonfinite",
        "epoch",
        "learn_tokens_per_second",
        "spans_dropped",
    ]
)


def sections_of(run: RunPicture) -> tuple[Section, ...]:
    """The charts of a run, in the order in which they are looked at; those without a value are left out."""
    found = {
        "Reward": _reward_charts(run),
        "Learning": _charts(run, _LEARNING),
        "Completions": (*_lengths(run), *_charts(run, _COMPLETIONS)),
        "The play": _charts(run, _PLAY),
        "Other metrics": _others(run),
    }
    return tuple(_section(title, charts) for title, charts in found.items() if charts)


def _section(title: str, charts: Sequence[Chart]) -> Section:
    flat = [chart for chart in charts if chart.least == 0.0 and not any(any(line.y) for line in chart.lines)]
    shown = tuple(chart for chart in charts if chart not in flat)
    return Section(title=title, charts=shown, flat=tuple(chart.title for chart in flat))


def _charts(run: RunPicture, plans: Sequence[_Plan]) -> list[Chart]:
    return [chart for plan in plans if (chart := _chart(run, plan)) is not None]


def _chart(run: RunPicture, plan: _Plan) -> Chart | None:
    there = [(metric, name) for metric, name in plan.lines if _has(run, metric)]
    if not there:
        return None
    return Chart(
        key=plan.key,
        title=plan.title,
        lines=tuple(_line(run, metric, name, band=len(there) == 1) for metric, name in there),
        format=plan.format,
        about=plan.about,
        least=plan.least,
        smooth=plan.smooth,
    )


def _line(run: RunPicture, metric: str, name: str, *, band: bool = False) -> Line:
    curve = run.metrics.curves[metric]
    if band:
        return Line(name=name, y=curve.mean, low=curve.low, high=curve.high)
    return Line(name=name, y=curve.mean)


def _has(run: RunPicture, metric: str) -> bool:
    curve = run.metrics.curves.get(metric)
    return curve is not None and any(value is not None for value in curve.mean)


def _reward_charts(run: RunPicture) -> list[Chart]:
    charts = []
    if _has(run, "reward"):
        charts.append(_reward(run))
    parts = [name for name in run.metrics.curves if name.startswith("rewards/") and name.endswith("/mean")]
    parts = [name for name in parts if _has(run, name)]
    if len(parts) > 1 or (parts and not charts):
        for start in range(0, len(parts), _MOST_LINES):
            lines = [
                _line(run, name, name.removeprefix("rewards/").removesuffix("/mean"))
                for name in parts[start : start + _MOST_LINES]
            ]
            number = "" if start == 0 else f"_{start // _MOST_LINES + 1}"
            charts.append(
                Chart(
                    key=f"reward_parts{number}",
                    title="Parts of the reward",
                    lines=tuple(lines),
                    about="Mean score of each reward function, not weighted.",
                )
            )
    zero = _Plan(
        "no_signal",
        "Groups without signal",
        (("frac_reward_zero_std", "all rewards equal"),),
        "percent",
        "Part of the groups whose rewards are all equal: they teach nothing.",
        0.0,
    )
    spread = _Plan(
        "spread",
        "Spread of the reward",
        (("reward_std_within_groups", "within a group"), ("reward_std", "over the batch")),
        about="Standard deviation of rewards: the mean of the groups' own, which is what is learned from, and that of "
        "all completions of a step.",
        least=0.0,
    )
    return [*charts, *_charts(run, (spread, zero))]


def _reward(run: RunPicture) -> Chart:
    mean = run.metrics.curves["reward"].mean
    measured = [name for name in ("reward_std_within_groups", "reward_std") if _has(run, name)]
    spread: Values = run.metrics.curves[measured[0]].mean if measured else ()
    line = Line(
        name="mean",
        y=mean,
        low=tuple(_sum(m, s, -1.0) for m, s in zip(mean, spread, strict=True)) if spread else (),
        high=tuple(_sum(m, s, 1.0) for m, s in zip(mean, spread, strict=True)) if spread else (),
    )
    about = "Weighted sum of all rewards: mean of a step, and about it the standard deviation "
    about += "over the batch." if measured == ["reward_std"] else "within groups."
    return Chart(key="reward", title="Reward", lines=(line,), about=about)


def _sum(mean: float | None, spread: float | None, sign: float) -> float | None:
    return None if mean is None or spread is None else mean + sign * spread


def _lengths(run: RunPicture) -> Iterator[Chart]:
    names = "completions/mean_length", "completions/min_length", "completions/max_length"
    if not all(_has(run, name) for name in names):
        return
    mean, low, high = (run.metrics.curves[name] for name in names)
    edges = Line(name="all completions", y=mean.mean, low=low.low or low.mean, high=high.high or high.mean)
    lines = [edges]
    if _has(run, "completions/mean_terminated_length"):
        lines.append(_line(run, "completions/mean_terminated_length", "those that ended by themselves"))
    about = "Mean, and between the shortest and the longest of a step."
    yield Chart(key="lengths", title="Tokens a completion", lines=tuple(lines), about=about, least=0.0)


def _others(run: RunPicture) -> list[Chart]:
    known = {metric for plan in (*_LEARNING, *_COMPLETIONS, *_PLAY) for metric, _ in plan.lines}
    names = [
        name
        for name in run.metrics.curves
        if name not in known | _OUR_NAMES and not name.startswith(_OURS) and _has(run, name)
    ]
    return [
        Chart(key=f"logged_{number}", title=name, lines=(_line(run, name, name, band=True),))
        for number, name in enumerate(names[:_MOST_OTHERS], 1)
    ]


def rounded(value: float | None) -> float | None:
    """Five digits: more than any chart shows."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")
