"""The policy terms by hand, one token each. TRL's figures are in test_trl_vectors.py."""

from __future__ import annotations

import math
from typing import Any, get_args

import mlx.core as mx
import pytest

from troupe.grpo.config import LossConfig, LossType
from troupe.grpo.objectives import OBJECTIVES, PolicyInputs


def term(loss_type: LossType, ratio: float, advantage: float, rho: float | None = None, **settings: Any) -> float:
    """The policy term of one token whose log-prob is −2."""
    x = PolicyInputs(
        log_probs=mx.array([[-2.0]]),
        log_ratio=mx.array([[math.log(ratio)]]),
        ratio=mx.array([[ratio]]),
        advantages=mx.array([[advantage]]),
        mask=mx.ones((1, 1)),
        token_mask=mx.ones((1, 1)),
        sampler_ratio=None if rho is None else mx.array([[rho]]),
    )
    loss, _ = OBJECTIVES[loss_type].policy_term(x, LossConfig(loss_type=loss_type, **settings))
    return float(loss.item())  # type: ignore[arg-type]


def test_every_loss_type_has_its_line() -> None:
    assert set(OBJECTIVES) == set(get_args(LossType))


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
