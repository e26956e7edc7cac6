"""The entropy controller by hand. TRL's figures are in test_trl_vectors.py."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest

from troupe.grpo.config import LossConfig
from troupe.grpo.entropy import EntropyControl, entropy_control

ON = LossConfig(
    use_adaptive_entropy=True,
    entropy_coef=0.02,
    entropy_coef_delta=0.01,
    entropy_target=1.0,
    entropy_coef_min=0.015,
    entropy_coef_max=0.035,
)


@pytest.mark.parametrize(
    ("coef", "entropy", "expected"),
    [(0.02, 0.9, 0.03), (0.02, 1.0, 0.03), (0.03, 0.9, 0.035), (0.03, 1.1, 0.02), (0.02, 1.1, 0.015)],
)
def test_the_coefficient_rises_at_or_below_the_target_and_falls_above(
    coef: float, entropy: float, expected: float
) -> None:
    control = EntropyControl(coef, 0.0).after_update(entropy, ON)
    assert control.coef == pytest.approx(expected)
    assert control.last_entropy == entropy


def test_the_bonus_counts_only_after_an_entropy_at_or_below_the_target() -> None:
    control = entropy_control({}, ON)
    assert control == EntropyControl(0.02, math.inf)
    assert control.in_force(ON) == 0.0
    low, high = control.after_update(0.5, ON), control.after_update(1.5, ON)
    assert low.in_force(ON) == pytest.approx(0.03)
    assert high.in_force(ON) == 0.0
    assert high.coef == 0.015


def test_the_state_of_the_optimizer_keeps_it() -> None:
    control = EntropyControl(0.25, 0.5)
    state = control.as_state(ON)
    assert {name: (array.dtype, array.shape) for name, array in state.items()} == {
        "entropy_coef": (mx.float32, ()),
        "last_entropy": (mx.float32, ()),
    }
    assert entropy_control({"step": mx.array(3.0)} | state, ON) == control


def test_a_fixed_coefficient_stays() -> None:
    config = LossConfig(entropy_coef=0.1)
    control = entropy_control({"entropy_coef": mx.array(0.7), "last_entropy": mx.array(0.0)}, config)
    assert control.in_force(config) == 0.1
    assert control.after_update(5.0, config) == control
    assert control.as_state(config) == {}
