"""avg@k, pass@k, maj@k and paired tests against numpy, enumeration and published tables."""

import math
from collections.abc import Mapping
from itertools import combinations, product

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from troupe.actors.evaluator.settings import EvaluationSet
from troupe.messages import EvaluatedRow, EvaluatedSample
from troupe.rewards.estimates import (
    Comparison,
    Estimate,
    Scores,
    answer_in,
    average,
    compared,
    figures_of,
    majority,
    pass_at,
    pass_at_k,
    scores_by_row,
    sign_test,
    t_test,
)

Array = npt.NDArray[np.float64]


def _table(random: np.random.Generator, rows: int, samples: int, missing: float = 0.1) -> Array:
    table: Array = random.integers(0, 3, (rows, samples)) / 2
    table[random.random(table.shape) < missing] = np.nan
    return table


def _scores(table: Array) -> list[Scores]:
    return [[None if math.isnan(x) else float(x) for x in row] for row in table]


def _by_hand(values: Array) -> tuple[float, float]:
    """Mean and standard error of at least two values."""
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def _check(estimate: Estimate | None, values: Array) -> None:
    if not len(values):
        assert estimate is None
        return
    assert estimate is not None
    assert estimate.rows == len(values)
    assert estimate.mean == pytest.approx(values.mean(), abs=1e-12)
    assert estimate.se == (pytest.approx(_by_hand(values)[1], abs=1e-12) if len(values) > 1 else None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_average_and_pass_at_k_are_those_of_numpy_on_10_000_random_tables() -> None:
    random = np.random.default_rng(0)
    for _ in range(10_000):
        table = _table(random, int(random.integers(1, 8)), int(random.integers(1, 7)))
        known = ~np.isnan(table)
        has = known.any(axis=1)
        _check(average(_scores(table)), np.nanmean(table[has], axis=1))
        k = int(random.integers(1, table.shape[1] + 1))
        n, c = known.sum(axis=1), (known & (np.nan_to_num(table) >= 1)).sum(axis=1)
        enough = n >= k
        missed = [math.comb(a - b, k) / math.comb(a, k) for a, b in zip(n[enough], c[enough], strict=True)]
        _check(pass_at(_scores(table), k), 1 - np.array(missed))


def test_pass_at_k_is_the_share_of_subsets_in_which_one_passes_and_stays_exact_for_many_samples() -> None:
    for n, c in product(range(1, 7), range(7)):
        for k in range(1, n + 1) if c <= n else ():
            shares = [min(subset) < c for subset in combinations(range(n), k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(shares) / len(shares), abs=1e-15)
    exact = 1 - math.comb(9_990, 100) / math.comb(10_000, 100)
    assert pass_at_k(10_000, 10, 100) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"<think>\boxed{9}</think> so \boxed{1} or \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("it is <answer> 42 </answer>", "42"),
        ("6 * 7 = 42\n#### 1,042.0", "1042"),
        ("<answer>1</answer> no, <answer>2</answer> <answer>", "2"),
        ("<answer>" * 10**5, "<answer>" * 10**5),
        (" Paris ", "Paris"),
        ("$0.50$", "1/2"),
        ("", ""),
        (r"\boxed{never closed", r"\boxed{never closed"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_answers_are_read_from_what_was_said(text: str, answer: str) -> None:
    assert answer_in(text) == answer


def test_the_commonest_answer_counts_and_of_equally_common_ones_their_mean() -> None:
    rows: list[tuple[list[str], Scores]] = [
        (["7", "7.0", "8"], [1.0, 1.0, 0.0]),
        (["7", "8"], [1.0, 0.0]),
        (["8", "8", "7"], [0.0, 0.0, 1.0]),
        (["8", "8", "7"], [None, None, 1.0]),
        (["7"], [None]),
    ]
    estimate = majority(rows)
    assert estimate is not None
    assert estimate.mean == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert estimate.rows == 4


@pytest.mark.parametrize(
    ("t", "degrees"), [(12.7062, 1), (2.26216, 9), (2.04841, 28), (1.96234, 1_000), (1.95996, 10**7)]
)
def test_students_t_is_that_of_the_tables(t: float, degrees: int) -> None:
    assert t_test(t, degrees) == pytest.approx(0.05, rel=1e-4)
    assert t_test(0.0, degrees) == 1.0


def test_the_sign_test_is_exact() -> None:
    for wins, losses in product(range(8), range(8)):
        n = wins + losses
        tail = sum(math.comb(n, i) for i in range(n + 1) if i <= min(wins, losses) or i >= max(wins, losses))
        assert sign_test(wins, losses) == pytest.approx(min(1.0, tail / 2**n), abs=1e-15)
    assert 0 < sign_test(4_000, 6_000) < 1e-80


def test_pairs_of_policies_are_compared_on_the_rows_that_both_have_scores_of() -> None:
    passes = _compared(
        {0: [0.0], 1: [1.0], 2: [0.0], 3: [None], 5: [0.0]}, {0: [1.0], 1: [1.0], 2: [1.0], 3: [1.0], 4: [1]}
    )
    assert (passes.rows, passes.left_out, passes.better, passes.worse, passes.ties) == (3, 3, (0, 2), (), 1)
    assert (passes.test, passes.p, passes.is_more_than_noise) == ("sign", 0.5, False)
    random = np.random.default_rng(1)
    first, second = random.random((40, 4)), random.random((40, 4)) + 0.3
    means = _compared(dict(enumerate(first.tolist())), dict(enumerate(second.tolist())))
    differences = second.mean(axis=1) - first.mean(axis=1)
    mean, se = _by_hand(differences)
    assert means.test == "t"
    assert means.p == pytest.approx(t_test(mean / se, 39))
    assert means.is_more_than_noise
    assert [means.low, means.high] == pytest.approx([mean - 2.02269 * se, mean + 2.02269 * se], abs=1e-5)
    assert compared({0: [1.0]}, {1: [1.0]}) is None
    assert _compared({0: [0.5]}, {0: [0.7]}).low is None


def _compared(first: Mapping[int, Scores], second: Mapping[int, Scores]) -> Comparison:
    comparison = compared(first, second)
    assert comparison is not None
    return comparison


def _row(number: int, answer: str, *samples: EvaluatedSample) -> EvaluatedRow:
    return EvaluatedRow(row=number, prompt="p", columns={"answer": answer}, samples=samples)


def _sample(
    text: str, score: float | None, *, tokens: int = 2, finish_reason: str = "stop", **scores: float | None
) -> EvaluatedSample:
    return EvaluatedSample(text=text, tokens=tokens, finish_reason=finish_reason, score=score, scores=scores)


def test_the_figures_of_a_set_leave_out_what_is_missing_and_count_it() -> None:
    rows = [
        _row(0, "7", _sample("7", 1.0, judge=1.0), _sample("7", 1.0, judge=1.0)),
        _row(
            1,
            "8",
            _sample("7", 0.0, judge=0.0, length=3.0),
            _sample("8", None, tokens=4, finish_reason="length", judge=None),
        ),
    ]
    figures = figures_of("math", rows)
    assert figures == {
        "eval/math/avg@2": 0.5,
        "eval/math/avg@2_se": pytest.approx(0.5),
        "eval/math/pass@1": 0.5,
        "eval/math/pass@1_se": pytest.approx(0.5),
        "eval/math/pass@2": 1.0,
        "eval/math/maj@2": 0.5,
        "eval/math/maj@2_se": pytest.approx(0.5),
        "eval/math/accuracy": 0.75,
        "eval/math/accuracy_se": pytest.approx(0.25),
        "eval/math/length": 2.5,
        "eval/math/clipped": 0.25,
        "eval/math/missing": 0.25,
        "eval/math/judge": pytest.approx(2 / 3),
        "eval/math/reward/length": 3.0,
    }
    set_of_them = EvaluationSet(name="math", path="math.json", num_samples=2, temperature=1.0)
    named = set_of_them.metrics(["judge", "length"], answers=True)
    assert {figure for figure in figures if not figure.endswith("_se")} == set(named)
    assert scores_by_row(rows, "judge") == {0: [1.0, 1.0], 1: [0.0, None]}
    assert figures_of("empty", []) == {}
    alone = msgspec.structs.replace(_row(0, "7", _sample("7", 0.5, accuracy=0.5)), columns={})
    named_alike = figures_of("math", [alone])
    assert named_alike["eval/math/reward/accuracy"] == 0.5
    assert "eval/math/accuracy" not in named_alike
