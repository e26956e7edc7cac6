"""Entropies and ratios of tokens: they are what was learned from, and change nothing of it."""

from __future__ import annotations

from math import exp, fsum
from pathlib import Path

import mlx.core as mx
import pytest

from tests.support.runs import column, completions, policy_of, train


@pytest.mark.slow
@pytest.mark.parametrize("passes", [1, 2])
def test_they_are_what_was_learned_from(ragged_model: Path, tmp_path: Path, passes: int) -> None:
    settings = {"learner__num_iterations": passes, "learner__gradient_accumulation_steps": 2, "learner__lr": 1e-3}
    settings |= {"learner__max_steps": 2}
    (tmp_path / "plain").mkdir()
    (tmp_path / "kept").mkdir()
    plain = train(ragged_model, tmp_path / "plain", **settings)
    kept = train(
        ragged_model,
        tmp_path / "kept",
        metrics__store_token_figures=True,
        metrics__store_log_probs=True,
        **settings,
    )
    weights, again = policy_of(plain.folder), policy_of(kept.folder)
    assert all(mx.array_equal(weights[name], again[name]) for name in weights)
    assert {one.entropies for one in completions(plain.folder)} == {None}
    for step, entropy in enumerate(column(kept.folder, "entropy"), 1):
        trained = completions(kept.folder, step=step, state="trained")
        assert all(one.entropies and len(one.entropies) == len(one.token_ids) for one in trained)
        tokens = [value for one in trained for value in one.entropies or () if value is not None]
        ratios = [value for one in trained for value in one.ratios or () if value is not None]
        assert len(tokens) == len(ratios) == sum(len(one.token_ids) for one in trained)
        if passes == 1:
            assert fsum(tokens) / len(tokens) == pytest.approx(entropy, rel=1e-4)
            assert ratios == pytest.approx([1.0] * len(ratios), rel=1e-3)
        else:
            assert any(abs(ratio - 1.0) > 1e-3 for ratio in ratios), "the last pass has other weights"
            assert all(exp(-5) < ratio < exp(5) for ratio in ratios)
