"""Filters and penalties against hand-worked numbers and numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import troupe  # noqa: F401 – loads OpenBLAS before mlx
from tests.policy.distributions import INF, kept, log
from troupe.policy.decode.filters import (
    apply_frequency_penalty,
    apply_logit_bias,
    apply_min_p,
    apply_presence_penalty,
    apply_repetition_penalty,
    apply_top_k,
    apply_top_p,
    apply_xtc,
)

# --- filters, by hand -----------------------------------------------------------------------------------------------

HAND = log(0.4, 0.3, 0.2, 0.1)
RISING = log(1e-30, 0.5, 0.4, 0.1)
FALLING = log(0.5, 0.25, 0.2, 0.05)
ONE_LIKELY = mx.stack([log(0.9, 0.05, 0.03, 0.02), log(0.02, 0.03, 0.05, 0.9)])


@pytest.mark.parametrize(
    ("filtered", "expected"),
    [
        pytest.param(lambda: apply_top_k(mx.stack([HAND, HAND[::-1]]), 1), [[0], [3]], id="top_k, row by row"),
        pytest.param(lambda: apply_top_k(mx.zeros((2, 6)), 4), [[0, 1, 2, 3]] * 2, id="top_k of equal tokens"),
        *((lambda k=k: apply_top_k(HAND, k), [0, 1, 2, 3]) for k in (0, -1, 4, 5)),
        *((lambda p=p: apply_top_p(RISING, p), [1]) for p in (1e-9, 0.3, 0.5)),
        *((lambda p=p: apply_top_p(RISING, p), [1, 2]) for p in (0.51, 0.9)),
        (lambda: apply_top_p(RISING, 0.91), [1, 2, 3]),
        (lambda: apply_top_p(RISING, 1.0), [0, 1, 2, 3]),
        pytest.param(lambda: apply_top_p(log(0.4, 0.2, 0.2, 0.2), 0.4), [0], id="top_p, reached by the first"),
        pytest.param(lambda: apply_top_p(log(0.4, 0.2, 0.2, 0.2), 0.5), [0, 1, 2, 3], id="top_p, as likely as that"),
        # after top_k 2 of (.5, .3, .2) the shares are .625 and .375, so .6 is reached by the first alone
        pytest.param(lambda: apply_top_p(apply_top_k(log(0.5, 0.3, 0.2), 2), 0.6), [0], id="top_p of what is left"),
        (lambda: apply_min_p(FALLING, 0.05), [0, 1, 2, 3]),
        (lambda: apply_min_p(FALLING, 0.3), [0, 1, 2]),
        (lambda: apply_min_p(FALLING, 0.5), [0, 1]),
        (lambda: apply_min_p(FALLING, 0.6), [0]),
        pytest.param(lambda: apply_min_p(ONE_LIKELY, 0.5, 3), [[0, 1, 2], [1, 2, 3]], id="min_p leaves three"),
        pytest.param(lambda: apply_min_p(ONE_LIKELY, 0.5, 4), [[0, 1, 2, 3]] * 2, id="min_p leaves four"),
        pytest.param(lambda: apply_min_p(log(0.7, 0.1, 0.1, 0.1), 0.5, 3), [0, 1, 2], id="min_p leaves three equals"),
        pytest.param(lambda: apply_xtc(HAND, 1.0, 0.15), [2, 3], id="xtc leaves the last of the top choices"),
        pytest.param(lambda: apply_xtc(log(0.9, 0.06, 0.04), 1.0, 0.1), [0, 1, 2], id="xtc needs two top choices"),
        pytest.param(lambda: apply_xtc(HAND, 1.0, 0.15, [0]), [0, 2, 3], id="xtc spares special tokens"),
        pytest.param(lambda: apply_xtc(HAND, 1.0, 0.15, [99, -1]), [2, 3], id="xtc, strange ids"),
        pytest.param(lambda: apply_xtc(HAND, 0.0, 0.15), [0, 1, 2, 3], id="xtc, off"),
        pytest.param(lambda: apply_xtc(log(0.4, 0.2, 0.2, 0.2), 1.0, 0.15), [1, 2, 3], id="xtc keeps ties"),
    ],
)
def test_what_is_kept(filtered: Callable[[], mx.array], expected: list[Any]) -> None:
    assert kept(filtered()) == expected


def test_what_is_kept_keeps_its_value() -> None:
    filtered = apply_top_k(log(0.1, 0.4, 0.2, 0.3), 2)
    np.testing.assert_allclose(np.array(filtered), [-INF, math.log(0.4), -INF, math.log(0.3)], rtol=1e-6)


def test_top_p_at_the_size_of_a_real_vocabulary() -> None:
    V = 151_936
    logits = np.linspace(0.0, -0.2, V)
    expected = int(np.sum(np.cumsum(np.exp(logits)) < 0.5 * np.exp(logits).sum())) + 1
    count = len(kept(apply_top_p(mx.array(logits.astype(np.float32)), 0.5)))
    assert abs(count - expected) < V * 5e-4


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        *((lambda p=p: apply_top_p(HAND, p), r"top_p is .*above 0") for p in (0.0, -0.1, math.nan)),
        *((lambda p=p: apply_min_p(HAND, p), r"min_p is .*\[0, 1\)") for p in (-0.1, 1.0, math.nan)),
        (lambda: apply_min_p(HAND, 0.5, 0), "min_tokens_to_keep is 0"),
        (lambda: apply_xtc(HAND, 1.1, 0.1), "xtc_probability"),
        (lambda: apply_xtc(HAND, 1, 0.6), "xtc_threshold"),
        (lambda: apply_repetition_penalty(HAND, [0], 0.0), "penalty"),
        (lambda: apply_repetition_penalty(HAND, [0], INF), "penalty"),
        (lambda: apply_repetition_penalty(HAND, [0], 2.0, 0), "context"),
        (lambda: apply_logit_bias(HAND, {-1: 1.0}), "token id -1"),
        (lambda: apply_logit_bias(HAND, {0: INF}), "token 0 is inf"),
        (lambda: apply_logit_bias(HAND, {0: math.nan}), "nan"),
    ],
)
def test_settings_out_of_bounds_are_refused(apply: Callable[[], mx.array], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply()


def test_filters_keep_the_dtype() -> None:
    values = mx.array([0.5, 2.0, 1.0, -1.0], dtype=mx.bfloat16)
    for filtered in (apply_top_k(values, 1), apply_top_p(values, 0.1), apply_min_p(values, 0.9)):
        assert filtered.dtype == mx.bfloat16
        assert kept(filtered.astype(mx.float32)) == [1]


# --- xtc and penalties ----------------------------------------------------------------------------------------------


def test_xtc_draws_per_row() -> None:
    rows = mx.broadcast_to(HAND, (4000, 4))
    hit = (np.array(apply_xtc(rows, 0.3, 0.15, key=mx.random.key(3))) == -INF)[:, 0]
    assert abs(hit.mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 4000)


def test_xtc_removes_where_the_rows_number_lies_below_the_probability() -> None:
    rows = mx.broadcast_to(HAND, (3, 4))
    filtered = apply_xtc(rows, 0.5, 0.15, uniforms=mx.array([0.0, 0.49, 0.5]))
    assert kept(filtered) == [[2, 3], [2, 3], [0, 1, 2, 3]]
    assert kept(apply_xtc(rows[0], 0.5, 0.15, uniforms=mx.array(0.49))) == [2, 3]


def test_repetition_penalty_by_hand() -> None:
    logits = mx.array([[1.0, -1.0, 2.0, 3.0], [4.0, 5.0, -6.0, 0.0]])
    same_for_all = apply_repetition_penalty(logits, [0, 1, 1, 99, -1], 2.0)
    assert same_for_all.tolist() == [[0.5, -2.0, 2.0, 3.0], [2.0, 2.5, -6.0, 0.0]]
    per_row = apply_repetition_penalty(logits, mx.array([[0, -1], [2, 3]]), 2.0)
    assert per_row.tolist() == [[0.5, -1.0, 2.0, 3.0], [4.0, 5.0, -12.0, 0.0]]
    assert apply_repetition_penalty(logits[0], [3, 2, 0], 2.0, context_size=2).tolist() == [0.5, -1.0, 1.0, 3.0]


def test_repetition_penalty_off() -> None:
    logits = mx.array([1.0, 2.0])
    assert apply_repetition_penalty(logits, [0], 1.0).tolist() == [1.0, 2.0]
    assert apply_repetition_penalty(logits, [], 2.0).tolist() == [1.0, 2.0]


def test_presence_is_subtracted_once_and_frequency_every_time() -> None:
    logits = mx.array([[1.0, -1.0, 2.0, 3.0], [4.0, 5.0, -6.0, 0.0]])
    recent = mx.array([[-1, 3, 0, 3], [2, 2, 2, 9]])
    assert apply_presence_penalty(logits, recent, 0.5).tolist() == [[0.5, -1.0, 2.0, 2.5], [4.0, 5.0, -6.5, 0.0]]
    assert apply_frequency_penalty(logits, recent, 0.5).tolist() == [[0.5, -1.0, 2.0, 2.0], [4.0, 5.0, -7.5, 0.0]]
    assert apply_frequency_penalty(logits[0], [3, 0, 3, -1], 0.5).tolist() == [0.5, -1.0, 2.0, 2.0]
    assert apply_presence_penalty(logits[0], [3, 0, 3], -0.5).tolist() == [1.5, -1.0, 2.0, 3.5]


@pytest.mark.parametrize("apply", [apply_repetition_penalty, apply_presence_penalty, apply_frequency_penalty])
def test_every_penalty(apply: Any) -> None:
    """Looks at the newest ids alone, changes nothing where nothing came, leaves the banned banned, keeps the dtype."""
    logits, recent = mx.array([[1.0, 2.0, 3.0, 4.0]]), [0, 1, 2, 3]
    assert apply(logits, recent, 2.0, context_size=2).tolist() == apply(logits, [2, 3], 2.0).tolist()
    assert apply(logits, recent, 2.0, context_size=99).tolist() == apply(logits, recent, 2.0).tolist()
    banned = mx.array([[1.0, -INF, 3.0]])
    for nothing in ([], [-1, -1], [3, 7, -1]):
        assert apply(banned, nothing, 2.0).tolist() == banned.tolist()
    changed = apply(banned[0].astype(mx.bfloat16), [1, 1, 2], 2.0)
    assert changed.dtype == mx.bfloat16
    assert changed.astype(mx.float32).tolist() == [1.0, -INF, 1.5 if apply is apply_repetition_penalty else 1.0]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), W=st.integers(1, 12), context=st.integers(1, 12))
def test_penalties_agree_with_numpy(seed: int, W: int, context: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(3, 6)).astype(np.float32)
    recent = rng.integers(-1, 8, size=(3, W)).astype(np.int32)
    window = recent[:, -context:]
    counts = np.stack([[np.sum(row == v) for v in range(6)] for row in window])
    p = np.float32(1.3)
    expected = {
        apply_repetition_penalty: np.where(counts > 0, np.where(logits < 0, logits * p, logits / p), logits),
        apply_presence_penalty: logits - p * (counts > 0),
        apply_frequency_penalty: logits - p * counts,
    }
    for apply, values in expected.items():
        np.testing.assert_allclose(
            np.array(apply(mx.array(logits), mx.array(recent), 1.3, context)), values, rtol=1e-6, atol=2e-6
        )


def test_logit_bias_adds_bans_and_ignores_ids_beyond_the_vocabulary() -> None:
    logits = mx.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert apply_logit_bias(logits, {0: 1.5, 2: -INF, 9: 1.0}).tolist() == [[2.5, 2.0, -INF], [5.5, 5.0, -INF]]
    assert apply_logit_bias(logits[0], {1: -1.0}).tolist() == [1.0, 1.0, 3.0]
    assert apply_logit_bias(logits, {3: 1.0}) is logits


@pytest.mark.parametrize("offset", [-1000.0, -30.0, 0.0, 50.0, 1000.0])
def test_shares_do_not_depend_on_a_common_offset_of_the_logits(offset: float) -> None:
    logits = mx.array([4.0, 3.0, 1.0, -3.0]) + offset
    assert kept(apply_top_p(logits, 0.9)) == [0, 1]
    assert kept(apply_xtc(logits, 1.0, 0.2)) == [1, 2, 3]
