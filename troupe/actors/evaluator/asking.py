"""Evaluations: the learner's side. It has versions evaluated when they are due, and knows when a run is to end."""

from collections.abc import Mapping

from troupe.actors.evaluator.ledger import EarlyStop, EvaluationLedger
from troupe.actors.evaluator.settings import EvaluationConfig
from troupe.messages import Evaluate
from troupe.policy import Weights
from troupe.runtime.mailbox import Channel
from troupe.runtime.reporter import Reporter


class Evaluations:
    """At most one evaluation is open: where the one before is not over when the next is due, the learner waits."""

    def __init__(
        self,
        channel: Channel[Evaluate],
        config: EvaluationConfig,
        ledger: EvaluationLedger,
        *,
        report: Reporter,
        stop: EarlyStop | None = None,
        overdue: Mapping[int, Weights] | None = None,
    ) -> None:
        """`stop`: what may end the run. `overdue`: versions of an earlier start that it had not done with."""
        self.channel = channel
        self._config, self._ledger, self._stop = config, ledger, stop
        self._report = report
        self._overdue = dict(overdue or {})

    @property
    def pending(self) -> Mapping[int, Weights]:
        """Versions that are to be evaluated still, for a checkpoint."""
        return {**self._overdue, **self._ledger.pending}

    async def begin(self, version: int, weights: Weights) -> None:
        """Have what is overdue evaluated, and the version that learning begins with where it is due."""
        if self._config.is_due(version):
            self._overdue[version] = weights
        for each in sorted(self._overdue):
            await self._ask(each, self._overdue.pop(each))

    async def ask(self, version: int, weights: Weights) -> None:
        """A version was published."""
        if self._config.is_due(version):
            with self._report.span("wait for evaluation", step=version, kind="wait"):
                await self.channel.settled()
            await self._ask(version, weights)

    async def ask_last(self, version: int, weights: Weights) -> None:
        """No other version will come."""
        if self._config.at_end:
            await self._ask(version, weights)

    async def end_run(self, version: int) -> bool:
        """Whether no step is to be made any more; waits for results that might say so."""
        if self._stop is None:
            return False
        if self._stop.may_end(self._values, self._ledger.pending):
            with self._report.span("wait for evaluation", step=version, kind="wait"):
                await self.channel.settled()
        if self._stop.ends(self._values):
            self._ledger.ends_run.set()
        return self._ledger.ends_run.is_set()

    @property
    def _values(self) -> Mapping[int, float]:
        assert self._stop is not None
        return self._ledger.values(self._stop.metric)

    async def _ask(self, version: int, weights: Weights) -> None:
        if version not in self._ledger.pending and self._ledger.lacks(version):
            message = Evaluate(version=version, weights=weights)
            self._ledger.begin(message)
            await self.channel.send(message)
