"""Sampling against hand-worked numbers, a float64 numpy oracle and counts."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import troupe  # noqa: F401 – loads OpenBLAS before mlx
from troupe.policy.sampling import (
    Sampler,
    SamplingConfig,
    apply_min_p,
    apply_repetition_penalty,
    apply_top_k,
    apply_top_p,
    apply_xtc,
    categorical_sample,
)

INF = math.inf


def log(*probs: float) -> mx.array:
    with np.errstate(divide="ignore"):
        return mx.array(np.log(np.array(probs)).astype(np.float32))


def kept(logprobs: mx.array) -> list[Any]:
    """Ids that survive, per row."""
    alive = np.array(logprobs) > -INF
    return [np.flatnonzero(row).tolist() for row in alive] if alive.ndim == 2 else np.flatnonzero(alive).tolist()


def log_softmax(logits: npt.NDArray[Any], temperature: float) -> npt.NDArray[np.float64]:
    scaled = logits.astype(np.float64) / temperature
    scaled = scaled - scaled.max(-1, keepdims=True)
    return np.asarray(scaled - np.log(np.exp(scaled).sum(-1, keepdims=True)))


def numpy_filter(logits: npt.NDArray[Any], config: SamplingConfig) -> list[list[int]]:
    """Ids kept, per row, by sorting each row in float64."""
    rows = []
    for row in log_softmax(logits, config.temperature or 1.0):
        order = list(np.argsort(-row, kind="stable"))
        if 0 < config.top_k < len(order):
            order = order[: config.top_k]
        mass = np.exp(row[order])
        before = np.concatenate([[0.0], np.cumsum(mass)[:-1]]) / mass.sum()
        order = [i for i, b in zip(order, before, strict=True) if config.top_p == 1.0 or b < config.top_p]
        floor = math.log(config.min_p) + row[order[0]] if config.min_p else -INF
        rows.append(sorted(int(i) for n, i in enumerate(order) if row[i] >= floor or n < config.min_tokens_to_keep))
    return rows


# --- filters, by hand -----------------------------------------------------------------------------------------------


def test_top_k_keeps_the_likeliest_and_their_values() -> None:
    filtered = apply_top_k(log(0.1, 0.4, 0.2, 0.3), 2)
    np.testing.assert_allclose(np.array(filtered), [-INF, math.log(0.4), -INF, math.log(0.3)], rtol=1e-6)


def test_top_k_works_row_by_row() -> None:
    rows = mx.stack([log(0.1, 0.4, 0.2, 0.3), log(0.7, 0.1, 0.15, 0.05)])
    assert kept(apply_top_k(rows, 1)) == [[1], [0]]


def test_top_k_of_equal_tokens_keeps_exactly_k_with_the_lower_ids() -> None:
    assert kept(apply_top_k(mx.zeros((2, 6)), 4)) == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("top_k", [0, -1, 4, 5])
def test_top_k_off(top_k: int) -> None:
    values = log(0.1, 0.4, 0.2, 0.3)
    assert np.array_equal(np.array(apply_top_k(values, top_k)), np.array(values))


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(0.3, [1]), (0.5, [1]), (0.51, [1, 2]), (0.9, [1, 2]), (0.91, [1, 2, 3]), (1.0, [0, 1, 2, 3]), (1e-9, [1])],
)
def test_top_p_keeps_the_fewest_that_reach_the_share(top_p: float, expected: list[int]) -> None:
    assert kept(apply_top_p(log(1e-30, 0.5, 0.4, 0.1), top_p)) == expected


def test_top_p_of_equal_tokens_keeps_no_more_than_needed() -> None:
    assert kept(apply_top_p(log(0.25, 0.25, 0.25, 0.25), 0.5)) == [0, 1]


def test_top_p_counts_shares_of_what_is_left() -> None:
    # After top_k 2 of (.5, .3, .2) the shares are .625 and .375, so .6 is reached by the first alone.
    assert kept(apply_top_p(apply_top_k(log(0.5, 0.3, 0.2), 2), 0.6)) == [0]


def test_top_p_at_the_size_of_a_real_vocabulary() -> None:
    V = 151_936
    count = len(kept(apply_top_p(mx.full((V,), -math.log(V)), 0.5)))
    assert abs(count - V / 2) < V * 5e-4


@pytest.mark.parametrize(("min_p", "expected"), [(0.05, [0, 1, 2, 3]), (0.3, [0, 1, 2]), (0.5, [0, 1]), (0.6, [0])])
def test_min_p_removes_below_a_fraction_of_the_largest(min_p: float, expected: list[int]) -> None:
    assert kept(apply_min_p(log(0.5, 0.25, 0.2, 0.05), min_p)) == expected


def test_min_p_leaves_as_many_as_asked() -> None:
    rows = mx.stack([log(0.9, 0.05, 0.03, 0.02), log(0.02, 0.03, 0.05, 0.9)])
    assert kept(apply_min_p(rows, 0.5, 3)) == [[0, 1, 2], [1, 2, 3]]
    assert kept(apply_min_p(rows, 0.5, 4)) == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("top_p", [0.0, -0.1, math.nan])
def test_top_p_is_refused_at_and_below_zero(top_p: float) -> None:
    with pytest.raises(ValueError, match=r"top_p is .*above 0"):
        apply_top_p(log(0.5, 0.5), top_p)


@pytest.mark.parametrize("min_p", [-0.1, 1.0, math.nan])
def test_min_p_is_refused_outside_its_bounds(min_p: float) -> None:
    with pytest.raises(ValueError, match=r"min_p is .*\[0, 1\)"):
        apply_min_p(log(0.5, 0.5), min_p)


def test_min_tokens_to_keep_is_refused_below_one() -> None:
    with pytest.raises(ValueError, match="min_tokens_to_keep is 0"):
        apply_min_p(log(0.5, 0.5), 0.5, 0)


def test_filters_keep_the_dtype() -> None:
    values = mx.array([0.5, 2.0, 1.0, -1.0], dtype=mx.bfloat16)
    for filtered in (apply_top_k(values, 1), apply_top_p(values, 0.1), apply_min_p(values, 0.9)):
        assert filtered.dtype == mx.bfloat16
        assert kept(filtered.astype(mx.float32)) == [1]


# --- xtc and repetition penalty -------------------------------------------------------------------------------------


def test_xtc_leaves_only_the_last_of_the_top_choices() -> None:
    assert kept(apply_xtc(log(0.4, 0.3, 0.2, 0.1), 1.0, 0.15)) == [2, 3]


def test_xtc_needs_two_top_choices() -> None:
    assert kept(apply_xtc(log(0.9, 0.06, 0.04), 1.0, 0.1)) == [0, 1, 2]


def test_xtc_spares_special_tokens_and_does_nothing_at_probability_zero() -> None:
    values = log(0.4, 0.3, 0.2, 0.1)
    assert kept(apply_xtc(values, 1.0, 0.15, [0])) == [0, 2, 3]
    assert kept(apply_xtc(values, 0.0, 0.15)) == [0, 1, 2, 3]


def test_xtc_draws_per_row() -> None:
    rows = mx.broadcast_to(log(0.4, 0.3, 0.2, 0.1), (4000, 4))
    hit = (np.array(apply_xtc(rows, 0.3, 0.15, key=mx.random.key(3))) == -INF)[:, 0]
    assert abs(hit.mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 4000)


@pytest.mark.parametrize(
    ("probability", "threshold", "name"), [(1.1, 0.1, "xtc_probability"), (1, 0.6, "xtc_threshold")]
)
def test_xtc_refuses_bad_settings(probability: float, threshold: float, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        apply_xtc(log(0.5, 0.5), probability, threshold)


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


@pytest.mark.parametrize(
    ("penalty", "context", "name"), [(0.0, 20, "penalty"), (INF, 20, "penalty"), (2.0, 0, "context")]
)
def test_repetition_penalty_refuses_bad_settings(penalty: float, context: int, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        apply_repetition_penalty(mx.array([1.0]), [0], penalty, context)


# --- configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": INF}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": 1.0}, "min_p is 1.0"),
        ({"min_tokens_to_keep": 0}, "min_tokens_to_keep is 0"),
    ],
)
def test_config_refuses_values_out_of_bounds(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**setting)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(setting, SamplingConfig)


def test_config_refuses_unknown_keys_and_defaults_are_off() -> None:
    with pytest.raises(msgspec.ValidationError, match="topp"):
        msgspec.convert({"topp": 0.5}, SamplingConfig)
    assert not Sampler(SamplingConfig()).is_filtering
    assert all(Sampler(SamplingConfig(**on)).is_filtering for on in ({"top_k": 1}, {"top_p": 0.9}, {"min_p": 0.1}))


# --- the sampler ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_scale_is_the_log_softmax_at_the_temperature(temperature: float) -> None:
    logits = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32) * 5
    scaled = Sampler(SamplingConfig(temperature=temperature)).scale(mx.array(logits))
    np.testing.assert_allclose(np.array(scaled), log_softmax(logits, temperature), rtol=2e-6, atol=2e-6)


def test_scale_at_temperature_zero_is_that_of_plain_logits_in_float32() -> None:
    scaled = Sampler(SamplingConfig(temperature=0.0)).scale(mx.array([[0.0, 0.0]], dtype=mx.bfloat16))
    assert scaled.dtype == mx.float32
    np.testing.assert_allclose(np.array(scaled), [[-math.log(2)] * 2], rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    V=st.integers(2, 40),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.integers(-1, 45),
    top_p=st.sampled_from([0.05, 0.37, 0.913, 1.0]),
    min_p=st.sampled_from([0.0, 0.013, 0.31]),
    keep=st.integers(1, 4),
)
def test_filter_agrees_with_numpy(
    seed: int, V: int, temperature: float, top_k: int, top_p: float, min_p: float, keep: int
) -> None:
    logits = np.random.default_rng(seed).normal(size=(3, V)).astype(np.float32) * 3
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, min_tokens_to_keep=keep)
    sampler = Sampler(config)
    logprobs = sampler.scale(mx.array(logits))
    filtered = sampler.filter(logprobs)
    assert kept(filtered) == numpy_filter(logits, config)
    alive = np.array(filtered) > -INF
    assert np.array_equal(np.array(filtered)[alive], np.array(logprobs)[alive])  # not renormalized


@pytest.mark.parametrize(
    ("uniform", "expected"), [(0.0, 1), (0.1, 1), (0.199, 1), (0.201, 3), (0.99, 3), (1.0 - 2**-24, 3), (1.0, 3)]
)
def test_draw_inverts_the_cumulative_distribution(uniform: float, expected: int) -> None:
    # Shares of what is left: 1 → 0.1/0.5, 3 → 0.4/0.5.
    filtered = mx.array([[-INF, math.log(0.1), -INF, math.log(0.4), -INF]])
    assert Sampler(SamplingConfig()).draw(filtered, mx.array([uniform])).tolist() == [expected]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), uniform=st.floats(0.0, 1.0, width=32))
def test_draw_never_takes_a_removed_id(seed: int, uniform: float) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(4, 30)).astype(np.float32) * 20
    values[rng.random((4, 30)) < 0.8] = -INF
    values[:, 7] = 0.0
    ids = np.array(Sampler(SamplingConfig()).draw(mx.array(values), mx.full((4,), uniform)))
    assert np.all(np.take_along_axis(values, ids[:, None].astype(np.int64), 1) > -INF)


def test_draw_at_the_size_of_a_real_vocabulary() -> None:
    V = 151_936
    values = np.full((3, V), -math.log(V / 2), dtype=np.float32)
    values[:, 1::2] = -INF
    ids = np.array(Sampler(SamplingConfig()).draw(mx.array(values), mx.array([0.0, 0.5, 1.0 - 2**-24])))
    assert ids[0] == 0
    assert abs(ids[1] - V / 2) < V * 5e-4
    assert V * 0.999 < ids[2] < V
    assert np.all(ids % 2 == 0)


def test_draw_is_argmax_at_temperature_zero() -> None:
    rows = mx.stack([log(0.3, 0.4, 0.3), log(0.5, 0.5, 1e-9)])
    assert Sampler(SamplingConfig(temperature=0.0)).draw(rows, mx.array([0.99, 0.99])).tolist() == [1, 0]


def chi_square(ids: npt.NDArray[Any], probs: npt.NDArray[Any]) -> float:
    expected = probs * len(ids)
    alive = probs > 0
    counts = np.bincount(ids, minlength=len(probs))
    assert counts[~alive].sum() == 0
    return float((((counts - expected) ** 2)[alive] / expected[alive]).sum())


PROBS = np.array([0.05, 0.15, 0.3, 0.1, 0.4])


@pytest.mark.parametrize("way", ["draw", "categorical", "per_row", "sample"])
def test_draws_follow_the_distribution(way: str) -> None:
    N = 8000
    temperature = 0.8
    logits = mx.broadcast_to(log(*PROBS), (N, 5))
    sampler = Sampler(SamplingConfig(temperature=temperature))
    key = mx.random.key(11)
    drawn = {
        "draw": lambda: sampler.draw(sampler.scale(logits), mx.random.uniform(shape=(N,), key=key)),
        "categorical": lambda: categorical_sample(logits, temperature, key),
        "per_row": lambda: categorical_sample(logits, temperature, mx.random.split(key, N)),
        "sample": lambda: sampler.sample(logits, key),
    }[way]()
    expected = PROBS ** (1 / temperature)
    assert chi_square(np.array(drawn), expected / expected.sum()) < 18.5  # 4 degrees of freedom, p = 0.001


def test_filtered_samples_follow_the_renormalized_rest() -> None:
    sampler = Sampler(SamplingConfig(top_k=3))
    ids = np.array(sampler.sample(mx.broadcast_to(log(*PROBS), (8000, 5)), mx.random.key(5)))
    rest = np.where(PROBS >= 0.15, PROBS, 0.0)
    assert chi_square(ids, rest / rest.sum()) < 13.9  # 2 degrees of freedom, p = 0.001


def test_a_row_with_its_own_key_draws_alone_what_it_draws_in_a_batch() -> None:
    logits = mx.random.normal((16, 40), key=mx.random.key(1))
    keys = mx.random.split(mx.random.key(2), 16)
    batch = categorical_sample(logits, 0.9, keys).tolist()
    assert batch == [categorical_sample(logits[i], 0.9, keys[i]).item() for i in range(16)]
    assert batch[3:5] == categorical_sample(logits[3:5], 0.9, keys[3:5]).tolist()


def test_categorical_sample_without_key_uses_the_threads_own_state() -> None:
    logits = mx.zeros((200, 50))
    mx.random.seed(4)
    first, second = categorical_sample(logits, 1.0).tolist(), categorical_sample(logits, 1.0).tolist()
    mx.random.seed(4)
    assert first == categorical_sample(logits, 1.0).tolist()
    assert first != second


def test_categorical_sample_at_temperature_zero_and_near_it_is_argmax() -> None:
    logits = mx.array([[1.0, 3.0, 2.0], [1e30, 0.0, -1e30]])
    for temperature in (0.0, 1e-9, 1e-300):
        assert categorical_sample(logits, temperature).tolist() == [1, 0]
    assert categorical_sample(logits[0], 0.0).item() == 1
    assert Sampler(SamplingConfig(temperature=0.0, top_k=2)).sample(logits).tolist() == [1, 0]


def test_categorical_sample_refuses_bad_arguments() -> None:
    with pytest.raises(ValueError, match="temperature is -1"):
        categorical_sample(mx.zeros((2, 3)), -1.0)
    with pytest.raises(ValueError, match=r"keys have shape \(3, 2\).*\(2, 3\)"):
        categorical_sample(mx.zeros((2, 3)), 1.0, mx.random.split(mx.random.key(0), 3))
