"""Ratios, KL, masks and corrections by hand. TRL's figures are in test_trl_vectors.py."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from troupe.grpo import ratios
from troupe.grpo.config import CorrectionMode

MASK = mx.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])


def test_ratios_of_tokens_and_of_sequences() -> None:
    log_ratio = mx.array([[0.5, -0.1, 7.0], [3.0, 3.0, 3.0]])
    token = ratios.importance_ratio(log_ratio, MASK, "token")
    np.testing.assert_allclose(np.array(token)[0, :2], [math.exp(0.5), math.exp(-0.1)], rtol=1e-6)
    sequence = ratios.importance_ratio(log_ratio, MASK, "sequence")
    np.testing.assert_allclose(np.array(sequence), [[math.exp(0.2)], [1.0]], rtol=1e-6)


def test_what_overflows_under_the_mask_leaves_no_gradient() -> None:
    def loss(new: mx.array) -> mx.array:
        difference = ratios.masked_difference(new, mx.zeros_like(new), MASK)
        return mx.sum(ratios.masked_sum(mx.exp(difference), MASK))

    grad = mx.grad(loss)(mx.array([[0.0, math.log(2.0), 1e4], [1e4, 1e4, 1e4]]))
    np.testing.assert_allclose(np.array(grad), [[1, 2, 0], [0, 0, 0]], rtol=1e-6)


def test_the_kl_estimate_is_zero_at_the_reference_and_positive_elsewhere() -> None:
    log_probs = mx.array([[-1.0, -2.0, -3.0]])
    ref = mx.array([[-1.0, -2.5, -2.0]])
    kl = ratios.reference_kl(log_probs, ref, mx.ones((1, 3)))
    np.testing.assert_allclose(np.array(kl), [[0, math.exp(-0.5) - 0.5, math.e - 2]], atol=1e-6)


def test_the_off_policy_mask_drops_bad_rows_that_the_policy_has_left() -> None:
    sampling = mx.array([[0.0, 0.0], [0.0, 0.0], [0.0, math.nan], [0.0, 0.0]])
    now = mx.array([[-1.0, -1.0], [-1.0, -1.0], [-1.0, -1.0], [1.0, 1.0]])
    advantages = mx.array([[1.0], [-1.0], [-1.0], [-1.0]])
    kept = ratios.off_policy_mask(now, sampling, advantages, mx.ones((4, 2)), 0.6)
    assert kept.tolist() == [[1.0], [0.0], [1.0], [1.0]]


def test_the_entropy_threshold_is_numpys_quantile_of_the_unmasked() -> None:
    rng = np.random.default_rng(3)
    entropies, mask = rng.random((4, 7)).astype(np.float32), (rng.random((4, 7)) < 0.5).astype(np.float32)
    for top in (0.0, 0.2, 0.5, 0.99, 1.0):
        threshold = ratios.entropy_threshold(mx.array(entropies), mx.array(mask), top)
        np.testing.assert_allclose(threshold.item(), np.quantile(entropies[mask > 0], 1 - top), rtol=1e-6)


def test_no_token_reaches_the_threshold_of_nothing() -> None:
    threshold = ratios.entropy_threshold(mx.ones((2, 3)), mx.zeros((2, 3)), 0.5)
    assert threshold.item() == math.inf
    assert mx.sum(ratios.high_entropy_mask(mx.ones((2, 3)), mx.ones((2, 3)), threshold)).item() == 0.0


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
        ratio = ratios.sampler_correction(old, sampling, mask, mode, 0.5, 1.5)
        np.testing.assert_allclose(np.array(ratio), [row], rtol=1e-6)
    unbounded = ratios.sampler_correction(old, sampling, mask, "token_mask", None, None)
    np.testing.assert_allclose(np.array(unbounded), [[2.0, 0.25, 1.0]], rtol=1e-6)
