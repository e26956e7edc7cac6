"""Which figures a step has, known before the first: what `checkpoint.metric_for_best` may name."""

import difflib
from collections.abc import Sequence

from troupe.errors import ConfigError
from troupe.records.figures import FIGURES
from troupe.rewards import Reward, RewardActor
from troupe.rewards.convention import Signature

_KEY = "checkpoint.metric_for_best"


def known_metrics(rewards: Sequence[str]) -> list[str]:
    """All names that Troupe itself gives to figures of a step, with rewards of these names."""
    ours = [metric for metric, figure in FIGURES.items() if figure.of != "machinery"]
    return [*ours, *(f"rewards/{name}/{kind}" for name in rewards for kind in ("mean", "std"))]


def check_metric(metric: str, names: Sequence[str], rewards: Sequence[Reward]) -> str | None:
    """What to tell of a metric that only a reward may log; None of one that is Troupe's own.

    `names`: of the rewards, in order. ConfigError where nothing can have that name: it begins as Troupe's own do, or
    looks like one of them, or no reward takes `log_metric`.
    """
    known = known_metrics(names)
    if metric in known:
        return None
    signatures = [Signature.of(reward) for reward in rewards if not isinstance(reward, RewardActor)]
    asks_for_it = any("log_metric" in signature.names for signature in signatures)
    may_log = asks_for_it or any(signature.takes_all for signature in signatures)
    is_ours = metric.partition("/")[0] in {name.partition("/")[0] for name in known if "/" in name}
    close = difflib.get_close_matches(metric, known, n=3)
    if is_ours or not may_log or (close and not asks_for_it):
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"
        raise ConfigError(f"{_KEY} is {metric!r}, which no step has; {hint}")
    return (
        f"{_KEY} is {metric!r}, which is none of Troupe's own metrics: unless a reward logs it (log_metric), no "
        f"checkpoint is the best{f'; did you mean {close[0]}?' if close else ''}"
    )
