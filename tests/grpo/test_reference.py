"""The reference policy that follows. TRL's figures are in test_trl_vectors.py."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from troupe.grpo import sync_reference


def test_the_mixture_by_hand() -> None:
    reference = {"a": mx.array([1.0, 2.0]), "b": mx.array([[4.0]])}
    policy = {"a": mx.array([3.0, -2.0]), "b": mx.array([[0.0]])}
    mixed = sync_reference(reference, policy, 0.25)
    np.testing.assert_allclose(np.array(mixed["a"]), [1.5, 1.0])
    np.testing.assert_allclose(np.array(mixed["b"]), [[3.0]])
    assert reference["a"].tolist() == [1.0, 2.0]


def test_the_ends_are_exact_and_dtypes_stay() -> None:
    reference = {"a": mx.array([0.1, 1e-3], dtype=mx.bfloat16)}
    policy = {"a": mx.array([0.7, -3.0], dtype=mx.bfloat16)}
    for alpha, expected in ((0.0, reference), (1.0, policy)):
        mixed = sync_reference(reference, policy, alpha)
        assert mixed["a"].dtype == mx.bfloat16
        assert mixed["a"].tolist() == expected["a"].tolist()


def test_other_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not have the same weights \(b is in one alone\)"):
        sync_reference({"a": mx.zeros(1)}, {"a": mx.zeros(1), "b": mx.zeros(1)}, 0.5)
