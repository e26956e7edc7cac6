"""EvaluationLedger: what evaluations came to, in `evaluations.jsonl` of the run folder, and which are under way; and
whether a run that gets no better is to end."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import anyio
import msgspec

from troupe.actors.evaluator.settings import EvaluationConfig
from troupe.messages import Evaluate, Evaluated
from troupe.messages.evaluations import changed
from troupe.policy import Weights
from troupe.records.evaluations import write_evaluations


class EvaluationLedger:
    """Outlives the Evaluator, and by its file the process. Read in any thread, changed on the event loop only.

    A version counts as pending from the moment in which the learner asks until each set has its result and that is
    told to the sinks: checkpoints that are cut meanwhile hold its weights, so that whoever resumes from one looks at it
    again.
    """

    def __init__(
        self,
        names: Sequence[str] = (),
        results: Iterable[Evaluated] = (),
        run: Path | None = None,
        conditions: Mapping[str, Mapping[str, str]] | None = None,
        *,
        hold: Callable[[Mapping[int, Weights]], None] = lambda pending: None,
    ) -> None:
        """`names`: of the sets. `results`: of an earlier start, up to the step that this one goes on from. `run`:
        the folder. `conditions`: those of each set now; without, those of its newest result. `hold`: is told which
        versions are pending, whenever others are."""
        self.names = tuple(names)
        self._run, self._hold = run, hold
        self._results = {(result.version, result.name): result for result in results}
        self._conditions = {result.name: result.conditions for result in self.results} | dict(conditions or {})
        self._pending: dict[int, Weights] = {}
        self.ends_run = anyio.Event()
        """Set when the run is to end with the newest version, since it gets no better."""

    @property
    def pending(self) -> Mapping[int, Weights]:
        """Versions that are asked for and not done with."""
        return self._pending

    @property
    def results(self) -> tuple[Evaluated, ...]:
        """All, by version."""
        return tuple(self._results[key] for key in sorted(self._results))

    @property
    def first_and_newest(self) -> tuple[Evaluated, ...]:
        """Of each set, of those that can be compared; without their conditions."""
        told: list[Evaluated] = []
        for name in self.names:
            of = [result for result in self.results if result.name == name]
            of = [result for result in of if not changed(result.conditions, of[-1].conditions)]
            told += [*of[:1], *of[1:][-1:]]
        return tuple(msgspec.structs.replace(result, conditions={}) for result in told)

    def lacks(self, version: int) -> list[str]:
        """Sets without a result of this version."""
        return [name for name in self.names if (version, name) not in self._results]

    def values(self, metric: str, *, or_before: bool = False) -> dict[int, float]:
        """Version → what it has of a metric, of those results that can be compared with one of now. `or_before`: where
        there is none, with the newest one."""
        there = [result for result in self.results if metric in result.metrics]
        same = [result for result in there if not changed(result.conditions, self._conditions[result.name])]
        if not same and or_before:
            same = [result for result in there if not changed(result.conditions, there[-1].conditions)]
        return {result.version: result.metrics[metric] for result in same}

    def metrics_of(self, version: int, name: str) -> Mapping[str, float]:
        """What a version came to on a set; empty where that is not known."""
        found = self._results.get((version, name))
        return {} if found is None else found.metrics

    def begin(self, message: Evaluate) -> None:
        """A version is asked for."""
        self._pending = {**self._pending, message.version: message.weights}
        self._hold(self._pending)

    def add(self, result: Evaluated) -> None:
        """A set is done with."""
        kept = msgspec.structs.replace(result, rows=())
        self._results = {**self._results, (result.version, result.name): kept}
        self._conditions[result.name] = result.conditions

    def end(self, version: int) -> None:
        """A version is done with."""
        self._pending = {pending: weights for pending, weights in self._pending.items() if pending != version}
        self._hold(self._pending)

    def write(self) -> None:
        """Put all results into the file, whole or not at all. OSError where the disk fails."""
        if self._run is not None:
            write_evaluations(self._run, self.results)


class EarlyStop(msgspec.Struct, frozen=True, kw_only=True):
    """Ends a run of which `patience` evaluations in a row were no better than the best before them. A function of
    results alone; an evaluation without the metric is passed over."""

    config: EvaluationConfig
    metric: str
    greater_is_better: bool = True

    def ends(self, values: Mapping[int, float]) -> bool:
        """Whether the run is to end, by version → metric."""
        return self._bad(values, ()) >= self.config.patience

    def may_end(self, values: Mapping[int, float], pending: Collection[int]) -> bool:
        """Whether it might, once the pending versions are known."""
        return len(pending) > 1 or (bool(pending) and self._bad(values, pending) >= self.config.patience)

    def reason(self, values: Mapping[int, float]) -> str:
        """Why a run ended, in words."""
        version, best = next(reversed(values)), values[self._best(values)]
        return (
            f"{self.metric} was no better than {best:.4g} at step {self._best(values):,} in the last "
            f"{self.config.patience} evaluations (evaluation.patience), so the run ended with step {version:,}"
        )

    def _best(self, values: Mapping[int, float]) -> int:
        due = [version for version in values if self.config.is_due(version)]
        return max(due, key=lambda version: values[version] if self.greater_is_better else -values[version])

    def _bad(self, values: Mapping[int, float], pending: Collection[int]) -> int:
        best, bad, sign = None, 0, 1.0 if self.greater_is_better else -1.0
        for version in sorted({*values, *pending}):
            if not self.config.is_due(version):  # the last one of a start that was drained
                continue
            value = None if version in pending else sign * values[version]
            if value is not None and (best is None or value > best + self.config.min_delta):
                best, bad = value, 0
            else:
                bad += 1
        return bad
