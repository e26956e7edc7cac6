"""What the rules look at: the newest steps of a run, its first ones, its evaluations and its config."""

import math
import re
from array import array
from collections import deque
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any, NamedTuple

WINDOW = 20
"""Steps that are looked at together: a step of GRPO has some hundred completions, too few to say anything by itself."""
EARLY = 8
"""Steps that the run began with, of which the mean is what it began at."""
LOOKED_AT = (
    "reward", "reward_std", "frac_reward_zero_std", "entropy", "kl", "learning_rate", "nonfinite", "weights/moved",
    "clip_ratio/region_mean", "completions/mean_length", "completions/clipped_ratio",
    "completions/clipped_in_thoughts", "epoch", "step_time", "time/reward/exposed_s",
)  # fmt: skip
"""The metrics that rules know of."""
_WITH_PEAKS = ("reward", "reward_std", "learning_rate")
_MAIN = re.compile(r"eval/.+/(avg@\d+|accuracy)")
"""The figures of an evaluation that say how good it was; of several the first counts."""


class Evaluation(NamedTuple):
    """What one set came to with one version."""

    step: int
    value: float
    error: float | None
    """Standard error; None where it was not told."""


class History:
    """Takes steps in order and forgets most of them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """`config`: of the run, as run.toml has it."""
        self._config = config
        self.step = 0
        """The newest."""
        self._steps = 0
        self._from_the_start = False
        self._columns = {name: _Column() for name in LOOKED_AT}
        self._means: dict[str, float | None] = {}
        self._peaks: dict[str, float] = {}
        self._rewards = array("d")
        """Mean of the window that ends with a step, by steps; NaN where there is none."""
        self._evaluations: dict[str, list[Evaluation]] = {}

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One more step."""
        if not self._steps:
            self._from_the_start = step == 1 + self.supervised
        self.step = step
        self._steps += 1
        for name, column in self._columns.items():
            column.add(_finite(metrics.get(name)))
        self._means.clear()
        for name in _WITH_PEAKS:
            if (mean := self.mean(name)) is not None:
                self._peaks[name] = max(mean, self._peaks.get(name, mean))
        mean = self.mean("reward")
        self._rewards.extend([math.nan] * (step - len(self._rewards)))
        self._rewards.append(math.nan if mean is None else mean)

    def add_evaluation(self, version: int, metrics: Mapping[str, Any]) -> None:
        """What one set came to; told once more, it takes the place of what was told."""
        for name, value in metrics.items():
            if _MAIN.fullmatch(name) is None or math.isnan(_finite(value)):
                continue
            error = _finite(metrics.get(f"{name}_se"))
            kept = [one for one in self._evaluations.get(name, ()) if one.step != version]
            kept.append(Evaluation(version, value, None if math.isnan(error) else error))
            self._evaluations[name] = sorted(kept)
            return

    def evaluations(self) -> Iterator[tuple[str, list[Evaluation]]]:
        """Metric → its values in order, one metric a set."""
        yield from self._evaluations.items()

    @property
    def supervised(self) -> float:
        """Steps at the beginning in which nothing is sampled, of which the rules know nothing."""
        if self._config.get("task") == "sft":
            return math.inf
        steps = self.setting("warm_start.steps", 0) if self.setting("warm_start.path") else 0
        return steps if isinstance(steps, int) else 0

    def setting(self, key: str, default: Any = None) -> Any:
        """The value of `section.key` in the config."""
        section, _, name = key.partition(".")
        table = self._config.get(section)
        return table.get(name, default) if isinstance(table, Mapping) else default

    @property
    def is_full(self) -> bool:
        """Whether there are enough steps to look at."""
        return self._steps >= WINDOW

    def values(self, name: str) -> list[float]:
        """Those of a metric in the newest steps that have it, in order."""
        return self._columns[name].newest()

    def mean(self, name: str) -> float | None:
        """Over the newest steps; None before there is a window of them, or where fewer than half of it have it."""
        if not self.is_full:
            return None
        if name not in self._means:
            self._means[name] = _mean(self.values(name), WINDOW // 2)
        return self._means[name]

    def median(self, name: str) -> float | None:
        """Likewise."""
        values = self.values(name)
        return median(values) if self.is_full and len(values) >= WINDOW // 2 else None

    def before(self, name: str) -> float | None:
        """The mean over the window before the newest one."""
        return _mean(self._columns[name].before(), WINDOW // 2)

    def start(self, name: str) -> float | None:
        """The mean over the steps that the run began with; None where those are not known, or a part of the window."""
        if not self._from_the_start or self._steps < EARLY + WINDOW:
            return None
        return _mean(self._columns[name].first, EARLY // 2)

    def peak(self, name: str) -> float | None:
        """The highest mean of any window so far, of `reward`, `reward_std` or `learning_rate`."""
        return self._peaks.get(name)

    def reward_at(self, step: int) -> float | None:
        """The mean reward of the window that ended with a step; of one before there was any, what the run began at."""
        if step < WINDOW:
            return self.start("reward")
        value = self._rewards[step] if step < len(self._rewards) else math.nan
        return None if math.isnan(value) else value


class _Column:
    """One metric, step by step; NaN where a step has none."""

    def __init__(self) -> None:
        self.first: list[float] = []
        """Of the steps that the run began with."""
        self._newest: deque[float] = deque(maxlen=2 * WINDOW)
        self._steps = 0

    def add(self, value: float) -> None:
        if self._steps < EARLY and not math.isnan(value):
            self.first.append(value)
        self._steps += 1
        self._newest.append(value)

    def newest(self) -> list[float]:
        return [value for value in list(self._newest)[-WINDOW:] if value == value]

    def before(self) -> list[float]:
        return [value for value in list(self._newest)[:-WINDOW] if value == value]


def _mean(values: list[float], least: int) -> float | None:
    return math.fsum(values) / len(values) if len(values) >= least else None


def _finite(value: Any) -> float:
    """NaN of what is no finite number."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan
