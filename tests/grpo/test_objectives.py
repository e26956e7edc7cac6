"""The formulas of a loss by hand, and tallies of parts that merge into the metrics of the whole.

TRL's figures are in test_trl_vectors.py.
"""

from __future__ import annotations

import math
from typing import Any, get_args

import mlx.core as mx
import numpy as np
import pytest

from troupe.grpo import comparisons
from troupe.grpo.config import CorrectionMode, LossConfig, LossType
from troupe.grpo.objectives import OBJECTIVES, SUPERVISED
from troupe.grpo.policy_terms import PolicyInputs
from troupe.grpo.tallies import averages, merge, nan_max, nan_min, row_fractions, tally


def term(
    loss_type: LossType,
    ratio: float,
    advantage: float,
    rho: float | None = None,
    chosen: float | None = None,
    **settings: Any,
) -> float:
    """The policy term of one token whose log-prob is −2."""
    x = PolicyInputs(
        log_probs=mx.array([[-2.0]]),
        log_ratio=mx.array([[math.log(ratio)]]),
        ratio=mx.array([[ratio]]),
        advantages=mx.array([[advantage]]),
        mask=mx.ones((1, 1)),
        token_mask=mx.ones((1, 1)),
        sampler_ratio=None if rho is None else mx.array([[rho]]),
        sampling_log_probs=mx.array([[-2.0 - math.log(ratio)]]),
        chosen=None if chosen is None else mx.array([[chosen]]),
    )
    loss, _ = OBJECTIVES[loss_type].policy_term(x, LossConfig(loss_type=loss_type, **settings))
    return float(loss.item())  # type: ignore[arg-type]


def test_every_loss_type_has_its_line() -> None:
    assert set(OBJECTIVES) - {SUPERVISED} == set(get_args(LossType))


@pytest.mark.parametrize(
    ("ratio", "advantage", "settings", "expected"),
    [
        (1.5, 1.0, {}, -1.2),
        (1.5, 1.0, {"epsilon_high": 0.3}, -1.3),
        (1.5, -1.0, {}, 1.5),
        (5.0, -1.0, {"delta": 3.0}, 3.0),
        (0.5, 1.0, {}, -0.5),
        (0.5, -1.0, {}, 0.8),
    ],
)
def test_clipped(ratio: float, advantage: float, settings: dict[str, float], expected: float) -> None:
    assert term("grpo", ratio, advantage, **settings) == pytest.approx(expected)


def test_cispo() -> None:
    assert term("cispo", 1.5, 1.0, epsilon_high=5.0) == pytest.approx(3.0)
    assert term("cispo", 9.0, -1.0, epsilon_high=5.0) == pytest.approx(-10.0)


def test_sapo() -> None:
    assert term("sapo", 1.0, 1.0) == pytest.approx(-2.0)
    assert term("sapo", 2.0, -1.0) == pytest.approx(4 / 1.05 / (1 + math.exp(-1.05)))


def test_vespo() -> None:
    assert term("vespo", 1.0, 1.0) == pytest.approx(2.0)
    assert term("vespo", 2.0, -1.0) == pytest.approx(-2.0 * 8 * math.exp(-2.0))
    assert term("vespo", 2.0, 1.0, rho=0.5) == pytest.approx(2.0)
    # e^115 has no float32
    assert term("vespo", math.exp(11.5), 1.0, vespo_k_pos=10.0, vespo_lambda_pos=1e-4) == 0.0


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [(2.0, 1.0, -math.exp(0.2)), (2.0, -1.0, 2.0), (0.5, 1.0, -0.5), (0.5, -1.0, math.exp(-0.2))],
)
def test_gmpo(ratio: float, advantage: float, expected: float) -> None:
    assert term("gmpo", ratio, advantage) == pytest.approx(expected)


def test_dr_grpo_needs_the_length_limit() -> None:
    with pytest.raises(ValueError, match="max_completion_length, which is None"):
        OBJECTIVES["dr_grpo"].normalizer(4, 10.0, None)
    assert OBJECTIVES["dr_grpo"].normalizer(4, 10.0, 16) == 64.0


MASK = mx.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])


def test_ratios_of_tokens_and_of_sequences() -> None:
    log_ratio = mx.array([[0.5, -0.1, 7.0], [3.0, 3.0, 3.0]])
    token = comparisons.importance_ratio(log_ratio, MASK, "token")
    np.testing.assert_allclose(np.array(token)[0, :2], [math.exp(0.5), math.exp(-0.1)], rtol=1e-6)
    sequence = comparisons.importance_ratio(log_ratio, MASK, "sequence")
    np.testing.assert_allclose(np.array(sequence), [[math.exp(0.2)], [1.0]], rtol=1e-6)


def test_what_overflows_under_the_mask_leaves_no_gradient() -> None:
    def loss(new: mx.array) -> mx.array:
        difference = comparisons.masked_difference(new, mx.zeros_like(new), MASK)
        return mx.sum(comparisons.masked_sum(mx.exp(difference), MASK))

    grad = mx.grad(loss)(mx.array([[0.0, math.log(2.0), 1e4], [1e4, 1e4, 1e4]]))
    np.testing.assert_allclose(np.array(grad), [[1, 2, 0], [0, 0, 0]], rtol=1e-6)


def test_the_kl_estimate_is_zero_at_the_reference_and_positive_elsewhere() -> None:
    log_probs = mx.array([[-1.0, -2.0, -3.0]])
    ref = mx.array([[-1.0, -2.5, -2.0]])
    kl = comparisons.reference_kl(log_probs, ref, mx.ones((1, 3)))
    np.testing.assert_allclose(np.array(kl), [[0, math.exp(-0.5) - 0.5, math.e - 2]], atol=1e-6)


def test_the_off_policy_mask_drops_bad_rows_that_the_policy_has_left() -> None:
    sampling = mx.array([[0.0, 0.0], [0.0, 0.0], [0.0, math.nan], [0.0, 0.0]])
    now = mx.array([[-1.0, -1.0], [-1.0, -1.0], [-1.0, -1.0], [1.0, 1.0]])
    advantages = mx.array([[1.0], [-1.0], [-1.0], [-1.0]])
    kept = comparisons.off_policy_mask(now, sampling, advantages, mx.ones((4, 2)), 0.6)
    assert kept.tolist() == [[1.0], [0.0], [1.0], [1.0]]


def test_the_entropy_threshold_is_numpys_quantile_of_the_unmasked() -> None:
    rng = np.random.default_rng(3)
    entropies, mask = rng.random((4, 7)).astype(np.float32), (rng.random((4, 7)) < 0.5).astype(np.float32)
    for top in (0.0, 0.2, 0.5, 0.99, 1.0):
        threshold = comparisons.entropy_threshold(mx.array(entropies), mx.array(mask), top)
        np.testing.assert_allclose(threshold.item(), np.quantile(entropies[mask > 0], 1 - top), rtol=1e-6)


def test_no_token_reaches_the_threshold_of_nothing() -> None:
    threshold = comparisons.entropy_threshold(mx.ones((2, 3)), mx.zeros((2, 3)), 0.5)
    assert threshold.item() == math.inf
    assert mx.sum(comparisons.high_entropy_mask(mx.ones((2, 3)), mx.ones((2, 3)), threshold)).item() == 0.0


def test_sampler_corrections() -> None:
    old = mx.array([[math.log(2.0), math.log(0.25), 50.0]])
    mask, sampling = mx.array([[1.0, 1.0, 0.0]]), mx.zeros((1, 3))
    expected: dict[CorrectionMode, list[float]] = {
        "token_truncate": [1.5, 0.5, 1.0],
        "token_mask": [0.0, 0.0, 1.0],
        "sequence_truncate": [0.5],
        "sequence_mask": [0.5],
    }
    for mode, row in expected.items():
        ratio = comparisons.sampler_correction(old, sampling, mask, mode, 0.5, 1.5)
        np.testing.assert_allclose(np.array(ratio), [row], rtol=1e-6)
    unbounded = comparisons.sampler_correction(old, sampling, mask, "token_mask", None, None)
    np.testing.assert_allclose(np.array(unbounded), [[2.0, 0.25, 1.0]], rtol=1e-6)


def test_tallies_of_parts_make_the_mean_of_the_whole() -> None:
    rng = np.random.default_rng(1)
    x, mask = rng.normal(size=(6, 5)).astype(np.float32), (rng.random((6, 5)) < 0.6).astype(np.float32)
    parts = [{"x": tally(mx.array(x[i : i + 2]), mx.array(mask[i : i + 2]))} for i in (0, 2, 4)]
    np.testing.assert_allclose(averages(merge(parts))["x"].item(), (x * mask).sum() / mask.sum(), rtol=1e-6)


def test_one_column_counts_every_row() -> None:
    assert tally(mx.array([[2.0], [4.0]]), mx.zeros((2, 3))).tolist() == [6.0, 2.0]


def test_a_mean_of_nothing_is_zero() -> None:
    assert averages({"x": tally(mx.full((1, 2), math.nan), mx.zeros((1, 2)))})["x"].item() == 0.0


def test_extremes_pass_over_what_is_not_a_number() -> None:
    x = mx.array([math.nan, 3.0, -1.0])
    assert (nan_min(x).item(), nan_max(x).item()) == (-1.0, 3.0)
    assert math.isnan(nan_min(mx.array([math.nan])).item())  # type: ignore[arg-type]
    parts = [{"a_min": mx.array(low), "a/max": mx.array(high)} for low, high in ((0.5, 0.6), (0.25, math.nan))]
    merged = averages(merge(parts))
    np.testing.assert_allclose([merged["a_min"].item(), merged["a/max"].item()], [0.25, 0.6])


def test_row_fractions() -> None:
    x, mask = mx.array([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]]), mx.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    fractions = row_fractions(x, mask).tolist()
    assert fractions[0] == 0.5  # type: ignore[index]
    assert math.isnan(fractions[1])  # type: ignore[index, arg-type]
    assert row_fractions(x[:, :1], mask).tolist() == [1.0, 1.0]
