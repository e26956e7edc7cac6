"""Who watches the rules: a finding begins when its rule has held for some steps, and ends when it has not for more."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from troupe.messages import Finding
from troupe.records.diagnosis.history import History
from troupe.records.diagnosis.rules import RULES, Found, Rule

RELEASE = 20
"""Steps in a row without it after which a finding is over."""
METRIC = "diagnosis/"
"""How the metrics begin that say which findings hold."""


class Diagnosis:
    """Takes the metrics of steps in order; a function of them and the config alone.

    A rule that holds for a while makes a finding, which stays until the rule has not held for longer: what lies about a
    bound does not come and go.
    """

    def __init__(self, config: Mapping[str, Any], rules: Sequence[Rule] = RULES) -> None:
        """`config`: of the run, as run.toml has it. `rules`: the most serious first."""
        self._history = History(config)
        self._watches = [_Watch(rule) for rule in rules]
        self._over: list[Finding] = []
        self._evaluations: list[tuple[int, Mapping[str, Any]]] = []
        """Those that no step has come after."""

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One more step; one that is not past all before is left out, as is a supervised one."""
        if step <= self._history.step or step <= self._history.supervised:
            return
        for version, figures in [told for told in self._evaluations if told[0] < step]:
            self._history.add_evaluation(version, figures)
        self._evaluations = [told for told in self._evaluations if told[0] >= step]
        self._history.add(step, metrics)
        for watch in self._watches:
            if (over := watch.look(self._history)) is not None:
                self._over.append(over)

    def add_evaluation(self, version: int, metrics: Mapping[str, Any]) -> None:
        """What a version of the policy came to on one set; it counts from the next step on that is later than it."""
        self._evaluations.append((version, metrics))

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Those that hold, the most serious first."""
        return tuple(watch.finding for watch in self._watches if watch.finding is not None)

    @property
    def all_findings(self) -> tuple[Finding, ...]:
        """Those that hold and, behind them, those that are over, the newest first."""
        return (*self.findings, *reversed(self._over))

    @property
    def metrics(self) -> dict[str, float]:
        """`diagnosis/RULE`: 1 while it holds, 0 when it has; rules that never held are left out."""
        held = {watch.rule.name for watch in self._watches if watch.finding is not None}
        ever = held | {finding.rule for finding in self._over}
        names = [watch.rule.name for watch in self._watches if watch.rule.name in ever]
        return {f"{METRIC}{name}": float(name in held) for name in names}


class _Watch:
    """One rule and the finding that it makes."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.finding: Finding | None = None
        self._seen = self._unseen = 0
        """Steps in a row."""

    def look(self, history: History) -> Finding | None:
        """Look at the newest step; the finding where it is over with it."""
        found = self.rule.look(history)
        self._seen, self._unseen = (self._seen + 1, 0) if found else (0, self._unseen + 1)
        if found and (self.finding is not None or self._seen >= self.rule.hold):
            since = history.step - self._seen + 1 if self.finding is None else self.finding.since
            self.finding = self._told(found, since)
        elif self.finding is not None and self._unseen >= RELEASE:
            over, self.finding = self.finding, None
            return msgspec.structs.replace(over, until=history.step)
        return None

    def _told(self, found: Found, since: int) -> Finding:
        return Finding(
            rule=self.rule.name,
            title=self.rule.title,
            since=since,
            evidence=found.evidence,
            remedy=found.remedy,
        )
