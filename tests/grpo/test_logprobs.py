"""Log-probs and entropies against numpy in float64."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from troupe.grpo.logprobs import entropy_from_logits, selective_log_softmax


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(*shape, 11)) * 3
    ids = rng.integers(0, 11, size=shape)
    expected = log_softmax(logits)
    chosen = selective_log_softmax(mx.array(logits.astype(np.float32)), mx.array(ids))
    assert chosen.shape == shape
    np.testing.assert_allclose(np.array(chosen), np.take_along_axis(expected, ids[..., None], -1)[..., 0], atol=2e-6)
    entropy = entropy_from_logits(mx.array(logits.astype(np.float32)))
    np.testing.assert_allclose(np.array(entropy), -(np.exp(expected) * expected).sum(-1), atol=2e-6)


def test_low_precision_logits_are_computed_in_float32() -> None:
    logits = mx.array([[1.0, 2.0, 3.0]], dtype=mx.bfloat16)
    chosen = selective_log_softmax(logits, mx.array([2]))
    assert chosen.dtype == entropy_from_logits(logits).dtype == mx.float32
    assert chosen.item() == pytest.approx(3 - math.log(math.exp(1) + math.exp(2) + math.exp(3)), abs=1e-6)


def test_an_excluded_token_adds_nothing_to_the_entropy() -> None:
    logits = mx.array([0.0, -math.inf, 0.0])
    assert entropy_from_logits(logits).item() == pytest.approx(math.log(2.0))


def test_large_logits_do_not_overflow() -> None:
    logits = mx.array([1e4, 1e4 - 1.0, -1e4])
    p = 1 / (1 + math.exp(-1.0))
    assert selective_log_softmax(logits, mx.array(0)).item() == pytest.approx(math.log(p), abs=1e-3)
    assert entropy_from_logits(logits).item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), abs=1e-3)
