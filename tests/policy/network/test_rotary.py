"""Rotary frequencies against transformers' own float32 numbers, and the attention factor against the paper."""

from __future__ import annotations

import math

import pytest

from troupe.errors import ModelError
from troupe.policy.network.rotary import YarnScaling, attention_factor, inverse_frequencies

QWEN3 = YarnScaling(factor=4.0, original_max_position_embeddings=32768)
NARROW = YarnScaling(factor=8.0, original_max_position_embeddings=256, beta_fast=16.0, beta_slow=2.0, truncate=False)
WITH_SCALES = YarnScaling(factor=8.0, original_max_position_embeddings=256, mscale=0.7, mscale_all_dim=0.3)

THEIRS = [  # transformers 5.23, head size 16, base 1e6
    (QWEN3, "1.0 1.6c310ep-3 1.030dc6p-5 1.1466eap-8 1.0624dep-11 1.74eea6p-15 1.094564p-17 1.796182p-20"),
    (NARROW, "1.0 1.e5921ep-4 1.030dc6p-8 1.708938p-11 1.0624dep-13 1.74eea6p-16 1.094564p-18 1.796182p-21"),
    (WITH_SCALES, "1.0 1.01f814p-3 1.afc1a0p-7 1.708938p-11 1.0624dep-13 1.74eea6p-16 1.094564p-18 1.796182p-21"),
]


@pytest.mark.parametrize(("scaling", "theirs"), THEIRS)
def test_frequencies_are_those_of_transformers_to_the_last_bit(scaling: YarnScaling, theirs: str) -> None:
    assert list(inverse_frequencies(16, 1e6, scaling)) == [float.fromhex(number) for number in theirs.split()]


def test_plain_frequencies_are_powers_of_the_base() -> None:
    assert inverse_frequencies(8, 1e4) == pytest.approx([1.0, 0.1, 0.01, 0.001], rel=1e-7)


def test_a_base_past_float32_stands_still() -> None:
    assert inverse_frequencies(4, 1e80) == (1.0, 0.0)


def test_fast_pairs_stay_and_slow_pairs_are_divided() -> None:
    plain, stretched = inverse_frequencies(128, 1e6), inverse_frequencies(128, 1e6, QWEN3)
    # pairs that turn 32 times and once in 32,768 positions: 128 ln(32768 / 2πβ) / (2 ln 1e6) = 23.6 and 39.65
    assert stretched[:24] == plain[:24]
    assert stretched[40:] == tuple(frequency / 4 for frequency in plain[40:])
    assert stretched[30] == pytest.approx(plain[30] * (10 / 17 + 7 / 17 / 4), rel=1e-6)


def test_a_range_without_width_is_a_step() -> None:
    cliff = YarnScaling(factor=4.0, original_max_position_embeddings=1, beta_fast=1.0, beta_slow=1.0)
    assert inverse_frequencies(8, 1e4, cliff) == pytest.approx([1.0, 0.025, 0.0025, 0.00025], rel=1e-6)


@pytest.mark.parametrize(
    ("scaling", "factor"),
    [
        (None, 1.0),
        (QWEN3, 1.138629436111989),
        (WITH_SCALES, 1.0782934613857693),
        (YarnScaling(factor=4.0, original_max_position_embeddings=8, attention_factor=1.5), 1.5),
        (YarnScaling(factor=1.0, original_max_position_embeddings=8), 1.0),
    ],
)
def test_attention_factor(scaling: YarnScaling | None, factor: float) -> None:
    assert attention_factor(scaling) == pytest.approx(factor, rel=1e-15)


def test_positions_are_stretched() -> None:
    assert QWEN3.max_positions == 131072


@pytest.mark.parametrize("factor", [0.9, math.inf, math.nan])
def test_a_factor_that_stretches_nothing_is_refused(factor: float) -> None:
    with pytest.raises(ModelError, match=r"^factor: "):
        YarnScaling(factor=factor, original_max_position_embeddings=8)
