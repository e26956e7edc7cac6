"""What evaluations came to is kept whole, and an early end follows from results alone."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from troupe.actors.evaluator.ledger import EarlyStop, EvaluationLedger
from troupe.actors.evaluator.settings import EvaluationConfig
from troupe.messages import Evaluate, Evaluated
from troupe.records.evaluations import read_evaluations
from troupe.records.layout import EVALUATIONS


def result(version: int, name: str = "a", value: float = 0.5) -> Evaluated:
    return Evaluated(version=version, name=name, metrics={f"eval/{name}/avg@1": value}, rows=(), seconds=1.5)


def stop(patience: int = 2, **settings: object) -> EarlyStop:
    config = EvaluationConfig(every=10, patience=patience, min_delta=float(settings.pop("min_delta", 0.0)))  # type: ignore[arg-type]
    return EarlyStop(config=config, metric="m", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ([0.1, 0.2, 0.3], False),
        ([0.3, 0.2, 0.4], False),
        ([0.3, 0.2, 0.3], True),
        ([0.3, 0.2, 0.4, 0.1, 0.4], True),
    ],
)
def test_a_run_ends_when_enough_in_a_row_were_no_better(values: list[float], ends: bool) -> None:
    by_version = {10 * place: value for place, value in enumerate(values)}
    assert stop().ends(by_version) is ends
    mirrored = {version: -value for version, value in by_version.items()}
    assert stop(greater_is_better=False).ends(mirrored) is ends


def test_a_version_off_the_schedule_and_one_without_the_metric_count_nothing() -> None:
    assert not stop().ends({0: 0.3, 10: 0.2, 13: 0.1})
    assert stop().ends({0: 0.3, 10: 0.2, 30: 0.1})
    assert stop(min_delta=0.2).ends({0: 0.3, 10: 0.4, 20: 0.5})


def test_learning_waits_only_for_a_result_that_might_end_the_run() -> None:
    assert not stop().may_end({0: 0.3, 10: 0.4}, [20])
    assert stop().may_end({0: 0.3, 10: 0.2}, [20])
    assert not stop().may_end({0: 0.3, 10: 0.2}, [])


def test_results_outlive_the_process(tmp_path: Path) -> None:
    ledger = EvaluationLedger(["a", "b"], run=tmp_path)
    ledger.begin(Evaluate(version=3, weights={}))
    ledger.add(result(3))
    ledger.write()
    assert (ledger.lacks(3), list(ledger.pending)) == (["b"], [3])
    ledger.add(result(3, "b"))
    ledger.write()
    ledger.end(3)
    again = EvaluationLedger(["a", "b", "new"], read_evaluations(tmp_path), tmp_path)
    assert again.results == (result(3, "a"), result(3, "b"))
    assert (again.lacks(3), dict(ledger.pending), again.values("eval/b/avg@1")) == (["new"], {}, {3: 0.5})
    (tmp_path / EVALUATIONS).write_bytes(b'{"version": 3, "na')
    assert read_evaluations(tmp_path) == ()


def test_results_of_other_conditions_do_not_count(tmp_path: Path) -> None:
    def of(version: int, value: float, rows: str) -> Evaluated:
        return msgspec.structs.replace(result(version, value=value), conditions={"rows": rows})

    before = (result(0, value=0.1), of(10, 0.9, "400"))
    same = EvaluationLedger(["a"], before, tmp_path, {"a": {"rows": "400"}})
    assert same.values("eval/a/avg@1") == {0: 0.1, 10: 0.9}
    ledger = EvaluationLedger(["a"], before[1:], tmp_path, {"a": {"rows": "200"}})
    assert ledger.values("eval/a/avg@1") == {}
    assert ledger.values("eval/a/avg@1", or_before=True) == {10: 0.9}
    ledger.add(of(20, 0.3, "200"))
    ledger.write()
    assert ledger.values("eval/a/avg@1", or_before=True) == {20: 0.3}
    assert read_evaluations(tmp_path) == (of(10, 0.9, "400"), of(20, 0.3, "200"))
