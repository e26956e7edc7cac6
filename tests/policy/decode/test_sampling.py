"""Sampling against hand-worked numbers, a float64 numpy oracle and counts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import troupe  # noqa: F401 – loads OpenBLAS before mlx
from tests.policy.distributions import INF, chi_square, kept, log
from tests.test_oracles import oracle
from troupe.policy.decode import filters
from troupe.policy.decode.sampling import Sampler, SamplingConfig, categorical_sample


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


# --- configuration --------------------------------------------------------------------------------------------------


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


# --- penalties, XTC and the whole chain -----------------------------------------------------------------------------


def test_config_takes_the_bias_of_ids_that_are_text_as_in_toml() -> None:
    config = msgspec.convert({"logit_bias": {"5": 1, "7": -2.5}}, SamplingConfig, str_keys=True)
    assert config.logit_bias == {5: 1.0, 7: -2.5}
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=SamplingConfig) == config
    assert msgspec.convert(msgspec.to_builtins(config, str_keys=True), SamplingConfig, str_keys=True) == config


def test_context_size_is_the_longest_window_of_the_penalties_that_are_on() -> None:
    assert Sampler(SamplingConfig(repetition_context_size=50)).context_size == 0
    assert Sampler(SamplingConfig(repetition_penalty=1.1, presence_context_size=50)).context_size == 20
    both = SamplingConfig(presence_penalty=1.0, presence_context_size=7, frequency_penalty=-1.0)
    assert Sampler(both).context_size == 20
    assert Sampler(SamplingConfig(logit_bias={1: 1.0})).context_size == 0


@pytest.mark.parametrize(
    "on",
    [
        {"logit_bias": {1: 1.0}},
        {"repetition_penalty": 1.1},
        {"presence_penalty": -0.1},
        {"frequency_penalty": 0.1},
        {"xtc_probability": 0.1},
    ],
)
def test_sampler_knows_that_its_distribution_is_another(on: dict[str, Any]) -> None:
    sampler = Sampler(SamplingConfig(**on))
    assert sampler.is_filtering
    assert sampler.is_adjusting == ("xtc_probability" not in on)
    assert sampler.needs_uniforms == ("xtc_probability" in on)
    assert not Sampler(SamplingConfig(xtc_probability=0.1, temperature=0.0)).is_filtering


def test_adjust_adds_the_bias_and_then_penalizes_in_order() -> None:
    config = SamplingConfig(logit_bias={3: 1.0}, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    logits = mx.array([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, -4.0]], dtype=mx.bfloat16)
    adjusted = Sampler(config).adjust(logits, mx.array([[-1, 3, 3], [-1, 0, 3]], dtype=mx.int32))
    assert adjusted.dtype == mx.float32
    # 4 gets the bias, is halved, and loses one presence and two frequencies; −4 + 1 is doubled
    assert adjusted.tolist() == [[1.0, 2.0, 3.0, 1.5], [-0.25, 2.0, 3.0, -6.75]]


def test_every_penalty_has_its_own_window() -> None:
    config = SamplingConfig(
        presence_penalty=1.0, presence_context_size=1, frequency_penalty=0.25, frequency_context_size=3
    )
    adjusted = Sampler(config).adjust(mx.zeros((1, 3)), [0, 0, 0, 1])
    assert adjusted.tolist() == [[-0.5, -1.25, 0.0]]


def test_xtc_works_on_what_the_other_filters_left() -> None:
    logprobs = log(0.5, 0.3, 0.12, 0.08)[None]
    # Alone .12 is the last above .1; of the two likeliest both are, at .625 and .375.
    alone = Sampler(SamplingConfig(xtc_probability=1.0))
    assert kept(alone.filter(logprobs)) == [[2, 3]]
    after_top_k = Sampler(SamplingConfig(xtc_probability=1.0, top_k=2))
    assert kept(after_top_k.filter(logprobs)) == [[1]]
    spared = Sampler(SamplingConfig(xtc_probability=1.0, top_k=2), special_ids=(0, 77))
    assert kept(spared.filter(logprobs)) == [[0, 1]]


def test_xtc_by_chance_needs_uniforms_and_greedy_none() -> None:
    config = SamplingConfig(xtc_probability=0.5)
    with pytest.raises(ValueError, match=r"xtc_probability is 0\.5, but filter got no uniforms"):
        Sampler(config).filter(log(0.5, 0.5))
    greedy = Sampler(msgspec.structs.replace(config, temperature=0.0))
    assert kept(greedy.filter(log(0.6, 0.4))) == [0, 1]
    assert greedy.sample(log(0.6, 0.4)).item() == 0


FULL = SamplingConfig(
    temperature=0.7,
    top_k=6,
    top_p=0.9,
    min_p=0.05,
    min_tokens_to_keep=2,
    xtc_probability=0.5,
    xtc_threshold=0.2,
    repetition_penalty=1.3,
    presence_penalty=0.2,
    frequency_penalty=0.1,
    logit_bias={4: 0.5},
)


@pytest.mark.parametrize("top_k", [0, 6])
def test_choose_is_filter_and_draw(top_k: int) -> None:
    sampler = Sampler(msgspec.structs.replace(FULL, top_k=top_k), special_ids=(3,))
    keys = mx.random.split(mx.random.key(8), 3)
    logprobs = sampler.scale(mx.random.normal((200, 30), key=keys[0]) * 3)
    uniforms, filter_uniforms = mx.random.uniform(shape=(2, 200), key=keys[1])
    ids, chosen = sampler.choose(logprobs, uniforms, filter_uniforms)
    filtered = sampler.filter(logprobs, filter_uniforms)
    assert ids.tolist() == sampler.draw(filtered, uniforms).tolist()
    rest = np.array(filtered, dtype=np.float64)
    expected = rest[np.arange(200), np.array(ids)] - np.log(np.exp(rest).sum(-1))
    np.testing.assert_allclose(np.array(chosen), expected, atol=2e-6)


def test_choose_at_temperature_zero_takes_the_likeliest() -> None:
    sampler = Sampler(SamplingConfig(temperature=0.0, top_k=2))
    ids, chosen = sampler.choose(log(0.2, 0.5, 0.3)[None], mx.array([0.99]))
    assert ids.tolist() == [1]
    np.testing.assert_allclose(np.array(chosen), [math.log(0.5 / 0.8)], rtol=1e-6)


def test_a_row_draws_the_same_through_the_whole_chain_whatever_stands_beside_it() -> None:
    sampler = Sampler(FULL)
    logits = mx.random.normal((12, 40), key=mx.random.key(1)) * 2
    recent = mx.random.randint(-1, 40, (12, 5), key=mx.random.key(2))
    keys = mx.random.split(mx.random.key(3), 12)
    batch = sampler.sample(logits, keys, recent).tolist()
    assert batch == [sampler.sample(logits[i : i + 1], keys[i : i + 1], recent[i : i + 1])[0].item() for i in range(12)]
    turned = mx.array(list(reversed(range(12))))
    assert batch[::-1] == sampler.sample(logits[turned], keys[turned], recent[turned]).tolist()


def test_samples_of_one_row_without_and_with_a_key() -> None:
    sampler = Sampler(FULL)
    logits = mx.array([0.0, 5.0, 1.0, 4.0, 0.0, 0.0, 0.0])
    key = mx.random.key(1)
    assert sampler.sample(logits, key).item() == sampler.sample(logits, key).item()
    mx.random.seed(3)
    assert {sampler.sample(logits).item() for _ in range(40)} <= {1, 3}


@pytest.mark.parametrize("way", ["sample", "choose"])
def test_draws_of_the_whole_chain_follow_its_distribution(way: str) -> None:
    N = 12_000
    row = log(*PROBS)
    config = SamplingConfig(
        temperature=0.8, top_k=4, xtc_probability=0.25, xtc_threshold=0.25, presence_penalty=0.5, logit_bias={0: 1.5}
    )
    sampler = Sampler(config)
    logits, recent = mx.broadcast_to(row, (N, 5)), [1]
    if way == "sample":
        ids = sampler.sample(logits, mx.random.key(4), recent)
    else:
        uniforms = mx.random.uniform(shape=(2, N), key=mx.random.key(6))
        ids, _ = sampler.choose(sampler.scale(sampler.adjust(logits, recent)), uniforms[0], uniforms[1])
    adjusted = np.log(PROBS) + np.array([1.5, -0.5, 0.0, 0.0, 0.0])
    shares = np.exp(adjusted / 0.8)
    assert shares.argmin() == 1
    shares[1] = 0.0
    shares /= shares.sum()
    assert np.flatnonzero(shares > 0.25).tolist() == [2, 4]
    without_top = np.where(np.arange(5) == 4, 0.0, shares)  # 4 is the likelier of the two top choices
    expected = 0.75 * shares + 0.25 * without_top / without_top.sum()
    assert chi_square(np.array(ids), expected) < 16.3  # 3 degrees of freedom, p = 0.001


# --- the table of edge values ---------------------------------------------------------------------------------------

EDGE_V = 6
EDGE_LOGITS = mx.array([[0.5, -1.0, 3.0, 1.0, 0.0, 2.0], [-0.5, 1.0, 4.0, 2.0, 0.0, 1.5]])
EDGE_RECENT = [2, 5, 2]


def edge_rows() -> list[tuple[str, str, str]]:
    """Setting, value and outcome of every value in the table of docs/sampling.md."""
    text = (Path(__file__).parents[3] / "docs" / "sampling.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", text, flags=re.MULTILINE)
    return [(name, value, outcome) for name, values, outcome in rows for value in re.findall("`(.+?)`", values)]


def edge_number(text: str) -> float:
    if text.startswith("V"):
        return EDGE_V + int(text[1:] or 0)
    return float(text) if re.search("[.e]|nan|inf", text) else int(text)


def edge_value(text: str) -> Any:
    if not text.startswith("{"):
        return edge_number(text)
    pairs = [pair.split(": ") for pair in text.strip("{}").split(", ") if pair]
    return {edge_number(id_): float(bias) for id_, bias in pairs}


def call_edge(name: str, value: Any) -> mx.array:
    """The function of the setting, called on its own."""
    logprobs = EDGE_LOGITS
    calls: dict[str, Callable[[], mx.array]] = {
        "temperature": lambda: categorical_sample(logprobs, value, mx.random.key(0)),
        "top_k": lambda: filters.apply_top_k(logprobs, value),
        "top_p": lambda: filters.apply_top_p(logprobs, value),
        "min_p": lambda: filters.apply_min_p(logprobs, value),
        "min_tokens_to_keep": lambda: filters.apply_min_p(logprobs, 0.0, value),
        "xtc_probability": lambda: filters.apply_xtc(logprobs, value, 0.1),
        "xtc_threshold": lambda: filters.apply_xtc(logprobs, 0.0, value),
        "logit_bias": lambda: filters.apply_logit_bias(logprobs, value),
    }
    for kind in ("repetition", "presence", "frequency"):
        apply = getattr(filters, f"apply_{kind}_penalty")
        calls[f"{kind}_penalty"] = partial(apply, logprobs, EDGE_RECENT, value)
        calls[f"{kind}_context_size"] = partial(apply, logprobs, EDGE_RECENT, 1.5, value)
    return calls[name]()


@pytest.mark.parametrize(("name", "text", "outcome"), edge_rows())
def test_edge_values_are_as_documented(name: str, text: str, outcome: str) -> None:
    value = edge_value(text)
    if "refused" in outcome:
        with pytest.raises(ValueError, match=rf"(?s)^{name} .*but"):
            SamplingConfig(**{name: value})
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert({name: value}, SamplingConfig)
    if outcome == "refused":
        with pytest.raises(ValueError, match="but"):
            call_edge(name, value)
        return
    sampler, plain = Sampler(SamplingConfig(**{name: value})), Sampler(SamplingConfig())
    if outcome == "changes nothing":
        if name != "temperature":
            assert call_edge(name, value).tolist() == EDGE_LOGITS.tolist()
        result = sampler.filter(sampler.scale(sampler.adjust(EDGE_LOGITS, EDGE_RECENT)))
        assert result.tolist() == plain.scale(EDGE_LOGITS).tolist()
    else:
        assert outcome == "takes the likeliest"
        logits = mx.broadcast_to(EDGE_LOGITS[:, None], (2, 200, EDGE_V)).reshape(400, EDGE_V)
        assert np.unique(np.array(sampler.sample(logits, mx.random.key(1)))).tolist() == [2]


def test_the_table_has_every_setting() -> None:
    assert {name for name, _, _ in edge_rows()} == set(SamplingConfig.__struct_fields__)


# --- mlx-lm ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mlx_lm() -> Any:
    """Its filters; skipped where it is not installed, unless TROUPE_REQUIRE_ORACLES is set."""
    return oracle("mlx_lm.sample_utils")


ORACLE = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def oracle_logprobs(seed: int, V: int, has_ties: bool) -> mx.array:
    logits = np.random.default_rng(seed).normal(size=(8, V)).astype(np.float32) * 3
    if has_ties:
        logits = np.round(logits / 2).astype(np.float32)
    scaled = mx.array(logits)
    return scaled - mx.logsumexp(scaled, axis=-1, keepdims=True)


class TestMlxLm:
    pytestmark = ORACLE

    @pytest.mark.parametrize("has_ties", [False, True])
    @pytest.mark.parametrize("V", [7, 300, 5000])
    def test_the_same_survive(self, mlx_lm: Any, V: int, has_ties: bool) -> None:
        for seed in range(10):
            logprobs = oracle_logprobs(seed, V, has_ties)
            pairs = [
                (filters.apply_top_k(logprobs, 5), mlx_lm.apply_top_k(logprobs, 5)),
                (filters.apply_min_p(logprobs, 0.07), mlx_lm.apply_min_p(logprobs, 0.07)),
                (filters.apply_min_p(logprobs, 0.9, 4), mlx_lm.apply_min_p(logprobs, 0.9, 4)),
                (filters.apply_xtc(logprobs, 1.0, 0.03), mlx_lm.apply_xtc(logprobs, 1.0, 0.03, [])),
                (filters.apply_xtc(logprobs, 1.0, 0.03, [3]), mlx_lm.apply_xtc(logprobs, 1.0, 0.03, [3])),
            ]
            pairs += [
                (filters.apply_top_p(logprobs, p), mlx_lm.apply_top_p(logprobs, p)) for p in (0.1, 0.53, 0.9, 0.987)
            ]
            for ours, theirs in pairs:
                if has_ties:
                    assert [len(row) for row in kept(ours)] == [len(row) for row in kept(theirs)]
                else:
                    assert ours.tolist() == theirs.tolist()

    def test_penalties_and_bias_give_the_same_logits(self, mlx_lm: Any) -> None:
        settings: dict[str, Any] = {
            "logit_bias": {3: 1.5, 7: -2.0},
            "repetition_penalty": 1.3,
            "repetition_context_size": 12,
            "presence_penalty": 0.4,
            "presence_context_size": 5,
            "frequency_penalty": 0.15,
        }
        processors = mlx_lm.make_logits_processors(**settings)
        rng = np.random.default_rng(0)
        for length in (0, 3, 30):
            logits = rng.normal(size=(1, 20)).astype(np.float32)
            tokens = mx.array(rng.integers(0, 20, size=length).astype(np.int32))
            theirs = mx.array(logits)
            for processor in processors:
                theirs = processor(tokens, theirs)
            ours = Sampler(SamplingConfig(**settings)).adjust(mx.array(logits), tokens)
            np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=1e-6, atol=1e-6)
