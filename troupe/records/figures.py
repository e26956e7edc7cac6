"""The figures of a step: each metric once, with how it is labelled, written and drawn, wherever it is shown.

The console, `troupe status`, the report and the live page read this table; a new metric is one more line of FIGURES.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

_HUGE = 1e9


class Figure(msgspec.Struct, frozen=True):
    """How a metric is shown; it is left out where the field of a place is empty."""

    spec: str = ""
    """Python's format of its value on the console."""
    line: str = ""
    """Its label in the console's lines."""
    panel: tuple[str, str] = ("", "")
    """The heading that it stands under on the console's display, and its label there."""
    unit: str = ""
    """What follows it there."""
    status: str = ""
    """Its format in `troupe status`, where its name is its label."""
    chart: str = ""
    """Its chart's key in CHARTS."""
    name: str = ""
    """The name of its line in the chart; empty: the chart's title."""
    of: Literal["step", "loss", "episodes", "curriculum", "machinery"] = "step"
    """step: every step has it; loss: whether a step has it depends on the loss, the weights or what is sampled;
    episodes: where the policy acts; curriculum: where rows are drawn by their pass rates; machinery: of queues and of
    time."""


class ChartSpec(msgspec.Struct, frozen=True):
    """Lines over steps that are looked at together."""

    section: str
    title: str
    about: str = ""
    """What it shows, in a sentence."""
    format: str = "number"
    """A name that `format.js` knows."""
    least: float | None = 0.0
    """A value that the vertical axis reaches."""
    smooth: bool = True
    bands: tuple[tuple[str, str], ...] = ()
    """The metrics that are the lower and the upper edge of bands about the first line, the widest first."""
    spread: tuple[str, ...] = ()
    """Where no such band is measured: metrics of which the first that is there is the half width of one, which ends
    where the line itself is highest and lowest."""
    parts: bool = False
    """Whether the means of the reward functions belong to it."""
    of_names: tuple[str, str] | None = None
    """Every metric that begins and ends so is a line of it, named by what is between."""


_SPREADS = "reward_std_within_groups", "reward_std"
_LENGTHS = (("completions/min_length", "completions/max_length"),)
_QUANTILES = ("reward/q10", "reward/q90"), ("reward/q25", "reward/q75")

CHARTS = {
    "reward": ChartSpec(
        "Reward",
        "Reward",
        "Weighted sum of all rewards: mean of a step, and about it where 80 % and 50 % of its completions lie "
        "(of runs of older versions: the standard deviation within groups).",
        least=None,
        bands=_QUANTILES,
        spread=_SPREADS,
        parts=True,
    ),
    "spread": ChartSpec(
        "Reward",
        "Spread of the reward",
        "Standard deviation of rewards: the mean of the groups' own, which is what is learned from, and that of all "
        "completions of a step.",
    ),
    "no_signal": ChartSpec(
        "Reward",
        "Groups without signal",
        "Part of the groups whose rewards are all equal: they teach nothing.",
        "percent",
    ),
    "loss": ChartSpec(
        "Learning",
        "Loss",
        "What the optimizer lowers. In sampled steps near 0 by construction, so that its size says little; in "
        "supervised ones nats a token.",
        least=None,
    ),
    "token_accuracy": ChartSpec(
        "Learning", "Token accuracy", "Of supervised steps: part of the tokens than which none is likelier.", "percent"
    ),
    "kl": ChartSpec(
        "Learning", "KL to the reference", "How far the policy has moved from where it began, nats a token."
    ),
    "teacher_kl": ChartSpec(
        "Learning", "KL to the teacher", "By the sampled tokens, nats a token: what on-policy distillation lowers."
    ),
    "entropy": ChartSpec("Learning", "Entropy", "Nats a token: near 0 the policy writes the same again and again."),
    "clip_ratio": ChartSpec(
        "Learning", "Clipped tokens", "Part of the tokens whose ratio lies outside the clip range.", "percent"
    ),
    "grad_norm": ChartSpec("Learning", "Gradient norm", "Before clipping (learner.max_grad_norm)."),
    "moved": ChartSpec(
        "Learning",
        "Weights that an update moves",
        "Part of the 16-bit weights that are another number afterwards.",
        "percent",
    ),
    "learning_rate": ChartSpec("Learning", "Learning rate", "Of the step's last update.", "scientific", smooth=False),
    "advantages": ChartSpec("Learning", "Advantages", "Of the completions trained on."),
    "lengths": ChartSpec(
        "Completions", "Tokens a completion", "Mean, and between shortest and longest of a step.", bands=_LENGTHS
    ),
    "clipped_ratio": ChartSpec(
        "Completions", "Cut at the limit", "Part of the completions that did not end by themselves.", "percent"
    ),
    "groups": ChartSpec(
        "Completions",
        "Groups by how they ended",
        "Trained on; left out without signal; too old; too few scores.",
        smooth=False,
    ),
    "pools": ChartSpec(
        "Prompts",
        "Rows by pool",
        "By how often completions of a row pass; rows that were never seen are normal.",
        smooth=False,
    ),
    "pool_shares": ChartSpec("Prompts", "Prompts by pool", "Where the rows of a step's groups came from.", "percent"),
    "turns": ChartSpec(
        "Episodes",
        "Turns an episode",
        "Mean, and between the least and the most of a step.",
        bands=(("turns/min", "turns/max"),),
    ),
    "observations": ChartSpec(
        "Episodes", "Tokens read", "What tools and environments answered in an episode; the policy did not write it."
    ),
    "calls": ChartSpec("Episodes", "Calls of tools", "In an episode, on average."),
    "failures": ChartSpec("Episodes", "Calls that failed", "Part of all calls of tools.", "percent"),
    "failed_episodes": ChartSpec(
        "Episodes",
        "Episodes that failed",
        "Part of which the environment did not answer; they have no reward.",
        "percent",
    ),
    "waits": ChartSpec(
        "Episodes",
        "Waited for, an episode",
        "Seconds that an episode waits in all for answers of its environment and its tools.",
        "seconds",
        of_names=("environments/", "/wait_s"),
    ),
    "tool_waits": ChartSpec(
        "Episodes", "A call takes", "Seconds of a call, by tool.", "seconds", of_names=("tools/", "/wait_s")
    ),
    "staleness": ChartSpec(
        "The run", "Staleness", "Versions between the weights that wrote a token and those that learned from it."
    ),
    "importance_ratio": ChartSpec(
        "The run",
        "Importance ratio",
        "Learner's over sampler's probability of a token; 1 where both agree.",
        least=None,
    ),
    "tokens_per_second": ChartSpec("The run", "Tokens a second", "Sampled tokens over the step's time."),
    "step_time": ChartSpec("The run", "Time of a step", "From the end of the step before to its own.", "seconds"),
    "exposed": ChartSpec(
        "The run",
        "Training left waiting for",
        "Seconds of a step in which these were at work and the device did nothing for training.",
        "seconds",
        smooth=False,
    ),
    "cluster_speed": ChartSpec(
        "The run", "Tokens a second elsewhere", "Of workers and engines together, at the end of a step."
    ),
    "cluster_members": ChartSpec(
        "The run", "Workers and engines", "That were there at the end of a step.", smooth=False
    ),
    "peak_memory": ChartSpec("The run", "Peak memory", "Most that the arrays took in a step.", "gigabytes"),
    "queues": ChartSpec("The run", "Waiting in queues", "Messages, at the end of a step.", smooth=False),
}
"""Key, which names files too → chart, in the order in which they are looked at."""
OVERVIEW = ("reward", "loss", "kl", "entropy", "lengths", "tokens_per_second")
"""The most telling ones."""
OF_EPISODES = ("turns", "calls", "failures")
"""The most telling ones, where the policy acts."""

_IN_FILES_ONLY = (
    "nonfinite", "advantages/mean", "advantages/frac_zero", "completions/min_length", "learn_tokens_per_second",
    "completions/min_terminated_length", "completions/max_terminated_length", "groups/resampled",
    "groups/filtered_token_fraction", "tokens/stale_fraction", "tokens/trained",
    "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max",
    "sampling/importance_sampling_ratio/min", "sampling/importance_sampling_ratio/max", "num_tokens", "epoch",
)  # fmt: skip
_OF_SOME_LOSSES = (
    "policy_loss", "aux_loss", "router/flips", "echo/loss", "entropy_coef", "controlled_entropy", "clip_ratio/low_min",
    "clip_ratio/high_max", "vespo/phi_seq_mean",
)  # fmt: skip
_POOLS = ("easy", "normal", "hard", "retired")
_BESIDE_DEVICE = {
    "environment": "environments", "reward": "rewards", "checkpoint": "checkpoints", "logging": "logging",
    "evaluation": "evaluation",
}  # fmt: skip
FIGURES = {
    "reward": Figure(".3f", "reward", ("reward", "reward"), status=".4f", chart="reward", name="mean"),
    "reward_std_within_groups": Figure(
        ".3f", "± within group", ("reward", "± in a group"), status=".4f", chart="spread", name="within a group"
    ),
    "reward_std": Figure(
        ".3f", "± over the batch", ("reward", "± in all"), status=".4f", chart="spread", name="over the batch"
    ),
    **dict.fromkeys(("reward/q10", "reward/q25", "reward/q50", "reward/q75", "reward/q90"), Figure()),
    "frac_reward_zero_std": Figure(chart="no_signal", name="all rewards equal"),
    "loss": Figure("+.4f", "loss", ("learning", "loss"), status="+.4f", chart="loss"),
    "mean_token_accuracy": Figure(
        ".1%", "token accuracy", ("learning", "right"), status=".3f", chart="token_accuracy", name="learned", of="loss"
    ),
    "eval_loss": Figure(".4f", "held-out loss", status=".4f", chart="loss", name="held out", of="loss"),
    "eval_mean_token_accuracy": Figure(".1%", "held out", chart="token_accuracy", name="held out", of="loss"),
    "kl": Figure(".4f", "KL", ("learning", "KL"), status=".4f", chart="kl", of="loss"),
    "teacher/kl": Figure(
        ".4f", "KL to teacher", ("learning", "teacher KL"), status=".4f", chart="teacher_kl", of="loss"
    ),
    "teacher/coef": Figure(of="loss"),
    "entropy": Figure(".3f", "entropy", ("learning", "entropy"), status=".3f", chart="entropy"),
    "clip_ratio/region_mean": Figure(
        ".1%", "clipped", ("learning", "clipped"), chart="clip_ratio", name="either side", of="loss"
    ),
    "clip_ratio/low_mean": Figure(chart="clip_ratio", name="below", of="loss"),
    "clip_ratio/high_mean": Figure(chart="clip_ratio", name="above", of="loss"),
    "cispo_clip_ratio": Figure(chart="clip_ratio", name="clipped weight", of="loss"),
    "covariance/chosen": Figure(chart="clip_ratio", name="chosen by covariance", of="loss"),
    "grad_norm": Figure(".3f", "gradient norm", ("learning", "gradient"), status=".3f", chart="grad_norm"),
    "weights/moved": Figure(chart="moved", of="loss"),
    "learning_rate": Figure(".2e", "learning rate", ("learning", "rate"), status=".2e", chart="learning_rate"),
    "advantages/abs_mean": Figure(chart="advantages", name="mean size"),
    "advantages/std": Figure(chart="advantages", name="spread"),
    "completions/mean_length": Figure(
        ".1f", "tokens a completion", ("completions", "tokens"), status=".1f", chart="lengths", name="all completions"
    ),
    "completions/max_length": Figure(",.0f", panel=("completions", "longest")),
    "completions/mean_terminated_length": Figure(chart="lengths", name="those that ended by themselves"),
    "completions/clipped_ratio": Figure(".1%", panel=("completions", "cut off"), chart="clipped_ratio"),
    "completions/clipped_in_thoughts": Figure(chart="clipped_ratio", name="before </think>", of="loss"),
    "turns/mean": Figure(".1f", "turns", status=".1f", chart="turns", name="mean", of="episodes"),
    "observations/mean_tokens": Figure(chart="observations", name="tokens", of="episodes"),
    "tools/call_frequency": Figure(".2f", "calls", chart="calls", name="calls", of="episodes"),
    "tools/failure_frequency": Figure(
        ".1%", "failed calls", status=".3f", chart="failures", name="failed", of="episodes"
    ),
    "environments/failed": Figure(".1%", "failed episodes", chart="failed_episodes", name="failed", of="episodes"),
    "environments/wait_s": Figure(".2f", "waited", chart="waits", name="all", of="episodes"),
    **dict.fromkeys(("turns/min", "turns/max", "turns/compared"), Figure(of="episodes")),
    "staleness": Figure(".1f", panel=("completions", "versions old"), chart="staleness", name="mean"),
    "staleness/max": Figure(chart="staleness", name="most"),
    "groups/trained": Figure(chart="groups", name="trained"),
    "groups/filtered": Figure(",.0f", panel=("completions", "no signal"), chart="groups", name="filtered"),
    "groups/stale": Figure(chart="groups", name="stale"),
    "groups/quarantined": Figure(",.0f", panel=("completions", "unscored"), chart="groups", name="quarantined"),
    **{
        f"curriculum/{pool}": Figure(",.0f", status=",.0f", chart="pools", name=pool, of="curriculum")
        for pool in _POOLS
    },
    "curriculum/unseen": Figure(",.0f", chart="pools", name="never seen", of="curriculum"),
    **{f"curriculum/share_{pool}": Figure(chart="pool_shares", name=pool, of="curriculum") for pool in _POOLS},
    "sampling/importance_sampling_ratio/mean": Figure(chart="importance_ratio"),
    "tokens_per_second": Figure(",.0f", "tokens/s", ("speed", "tokens/s"), status=",.0f", chart="tokens_per_second"),
    "step_time": Figure(
        ".2f", "seconds a step", ("speed", "step"), "s", status=".2f", chart="step_time", name="whole step"
    ),
    "learn_time": Figure(".2f", panel=("speed", "learning"), unit="s", chart="step_time", name="learning"),
    "peak_memory_gb": Figure(".2f", panel=("speed", "memory"), unit="GB", chart="peak_memory"),
    **dict.fromkeys(_IN_FILES_ONLY, Figure()),
    **dict.fromkeys(_OF_SOME_LOSSES, Figure(of="loss")),
    "spans_dropped": Figure(of="machinery"),
    "cluster/members": Figure(chart="cluster_members", name="there", of="machinery"),
    "cluster/tokens_per_second": Figure(chart="cluster_speed", name="all", of="machinery"),
    **{
        f"time/{work}/exposed_s": Figure(chart="exposed", name=name, of="machinery")
        for work, name in _BESIDE_DEVICE.items()
    },
    **{
        f"queue/{queue}/depth": Figure(chart="queues", name=queue, of="machinery")
        for queue in ("prompts", "rollouts", "scored", "snapshots")
    },
}
"""Metric → how it is shown, in the order of every list."""
OF_EVERY_STEP = tuple(metric for metric, figure in FIGURES.items() if figure.of == "step")
"""What the learner tells of a step, whatever the settings."""
LIVE = frozenset(
    {
        *(metric for metric, figure in FIGURES.items() if figure.status),
        *(metric for key in (*OVERVIEW, *OF_EPISODES) for metric in CHARTS[key].spread),
        *(metric for key in (*OVERVIEW, *OF_EPISODES) for band in CHARTS[key].bands for metric in band),
        *(metric for metric, figure in FIGURES.items() if figure.chart in OF_EPISODES),
        "num_tokens",
    }
)
"""What the live page keeps of a step, besides the means of the reward functions."""


def lines_of(key: str) -> list[tuple[str, str]]:
    """(metric, name) of every line that a chart may have."""
    return [(metric, figure.name or CHARTS[key].title) for metric, figure in FIGURES.items() if figure.chart == key]


def live_charts() -> list[dict[str, Any]]:
    """The most telling charts as the script of the live page takes them; `optional`: those that not every run has."""
    told = []
    for key in (*OVERVIEW, *OF_EPISODES):
        is_optional = not any(figure.of == "step" for figure in FIGURES.values() if figure.chart == key)
        told.append(msgspec.to_builtins(CHARTS[key]) | {"key": key, "lines": lines_of(key), "optional": is_optional})
    return told


def written(value: float, spec: str, unit: str = "") -> str:
    """A figure on a terminal; one of a run that diverges is short, too, so that there is room for what it is of."""
    spec = ".2e" if abs(value) >= _HUGE and math.isfinite(value) else spec
    return f"{value:{spec}} {unit}".rstrip()


def function_of(metric: str) -> str | None:
    """The reward function whose mean score a metric is; None of others."""
    is_mean = metric.startswith("rewards/") and metric.endswith("/mean")
    return metric.removeprefix("rewards/").removesuffix("/mean") if is_mean else None


def named_by(metric: str, ends: tuple[str, str]) -> str | None:
    """What stands between the two ends of a metric's name; None where it has others."""
    begin, end = ends
    rest = metric.removeprefix(begin)
    return rest.removesuffix(end) if metric.startswith(begin) and rest.endswith(end) else None


def queue_depths(metrics: Mapping[str, float]) -> dict[str, int]:
    """Channel → messages waiting, from the metrics of a step."""
    return {
        name.removeprefix("queue/").removesuffix("/depth"): int(depth)
        for name, depth in metrics.items()
        if name.startswith("queue/") and name.endswith("/depth")
    }
