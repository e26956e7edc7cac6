"""Statistics of packed completions, and their gradients by the weights, against each row alone with whole logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.devices import compute_on
from tests.support.families import family_configs
from tests.support.tiny import small_network
from troupe.policy.gradient.backward import completion_statistics
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.forward import hidden_states, project
from troupe.policy.network.tensors import Weights, init_weights

TIED = small_network(vocab_size=600, hidden_size=16, intermediate_size=24, tie_word_embeddings=True)
CONFIGS = {"tied": TIED, "untied": msgspec.structs.replace(TIED, tie_word_embeddings=False)} | family_configs(
    vocab_size=600, hidden_size=16, intermediate_size=24, initializer_range=0.3
)
PROMPTS = [[5, 6, 7], [5, 6, 7], [8], [5, 6, 7], [9, 599]]
COMPLETIONS = [[20, 21, 22], [300], [], [24, 599], [26, 0, 26, 26]]
GROUP = ([[1, 2, 3]] * 4, [[10, 11, 12], [13, 14, 15], [16, 17, 18], [19, 20, 21]])


@pytest.fixture(params=["cpu", "gpu"])
def device_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed on a CPU and what on a GPU, wherever the tests run."""
    compute_on(monkeypatch, cpu=request.param == "cpu")


def row_by_row(
    config: NetworkConfig, weights: Weights, prompts: Any, completions: Any, temperature: float = 1.0
) -> tuple[mx.array, mx.array]:
    """Log-probs and entropies (R, T) of each row alone from whole logits, by MLX's own operations."""
    T = max(1, *map(len, completions))
    log_probs, entropies = [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        if not completion:
            log_probs.append(mx.zeros(T))
            entropies.append(mx.zeros(T))
            continue
        logits = project(config, weights, hidden_states(config, weights, mx.array([[*prompt, *completion]])))[0]
        logits = logits[len(prompt) - 1 : len(prompt) - 1 + len(completion)].astype(mx.float32) / temperature
        log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        chosen = log_p[mx.arange(len(completion)), mx.array(list(completion), mx.int32)]
        log_probs.append(mx.pad(chosen, (0, T - len(completion))))
        entropies.append(mx.pad(-(mx.exp(log_p) * log_p).sum(-1), (0, T - len(completion))))
    return mx.stack(log_probs), mx.stack(entropies)


def score(statistics: Callable[[Weights], tuple[mx.array, mx.array]]) -> Callable[[Weights], mx.array]:
    """Log-probs and entropies under random weights, as one number; the padding takes part and must not matter."""

    def scored(weights: Weights) -> mx.array:
        log_probs, entropies = statistics(weights)
        by_log_probs, by_entropies = (mx.random.normal(log_probs.shape, key=mx.random.key(seed)) for seed in (0, 1))
        return (log_probs * by_log_probs + entropies * by_entropies).sum()

    return scored


def check(config: NetworkConfig, prompts: Any, completions: Any, temperature: float = 1.0) -> None:
    """Values and gradients of both."""
    weights = init_weights(config, mx.random.key(3))

    def packed(weights: Weights) -> tuple[mx.array, mx.array]:
        return completion_statistics(config, weights, prompts, completions, temperature)

    def alone(weights: Weights) -> tuple[mx.array, mx.array]:
        return row_by_row(config, weights, prompts, completions, temperature)

    for ours, theirs in zip(packed(weights), alone(weights), strict=True):
        assert ours.dtype == mx.float32
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=2e-5)
    gradients, expected = mx.grad(score(packed))(weights), mx.grad(score(alone))(weights)
    assert gradients.keys() == weights.keys()
    for name, gradient in gradients.items():
        scale = max(1.0, float(mx.abs(expected[name]).max()))
        np.testing.assert_allclose(np.array(gradient) / scale, np.array(expected[name]) / scale, atol=3e-5)


@pytest.mark.usefixtures("device_path")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    ("rows", "temperature"),
    [
        pytest.param((PROMPTS, COMPLETIONS), 1.0, marks=pytest.mark.slow),
        ((PROMPTS, COMPLETIONS), 0.6),
        pytest.param(GROUP, 1.0, marks=pytest.mark.slow),
        (([[4]], [[5]]), 1.0),
    ],
    ids=["ragged", "cooler", "group", "one token"],
)
def test_rows_are_as_each_alone(config: NetworkConfig, rows: tuple[Any, Any], temperature: float) -> None:
    check(config, *rows, temperature)


@pytest.mark.usefixtures("device_path")
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    groups=st.lists(
        st.tuples(
            st.lists(st.integers(0, 599), min_size=1, max_size=4),
            st.lists(st.lists(st.integers(0, 599), max_size=5), min_size=1, max_size=4),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_any_rows_are_as_each_alone(groups: list[tuple[list[int], list[list[int]]]]) -> None:
    prompts = [prompt for prompt, members in groups for _ in members]
    check(TIED, prompts, [completion for _, members in groups for completion in members])


def test_gradients_are_the_slopes() -> None:
    weights = init_weights(TIED, mx.random.key(3))
    value = score(lambda weights: completion_statistics(TIED, weights, PROMPTS, COMPLETIONS))
    gradients = mx.grad(value)(weights)
    for seed, name in enumerate(sorted(weights)):
        direction = mx.random.normal(weights[name].shape, key=mx.random.key(seed))
        direction = direction / mx.linalg.norm(direction)
        step = 1e-2
        ahead = value({**weights, name: weights[name] + step * direction}).item()
        behind = value({**weights, name: weights[name] - step * direction}).item()
        slope = (gradients[name] * direction).sum().item()
        assert slope == pytest.approx((ahead - behind) / (2 * step), abs=5e-3, rel=2e-2), name


def test_bfloat16_stays_near_float32() -> None:
    half = init_weights(TIED, mx.random.key(3), mx.bfloat16)
    full = {name: weight.astype(mx.float32) for name, weight in half.items()}
    for ours, theirs in zip(
        completion_statistics(TIED, half, PROMPTS, COMPLETIONS),
        completion_statistics(TIED, full, PROMPTS, COMPLETIONS),
        strict=True,
    ):
        assert ours.dtype == mx.float32
        np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=0.15)


@pytest.mark.usefixtures("device_path")
def test_completions_without_tokens_have_no_statistics_and_no_gradient() -> None:
    weights = init_weights(TIED, mx.random.key(3))
    log_probs, entropies = completion_statistics(TIED, weights, [[1, 2], [3]], [[], []])
    assert log_probs.tolist() == entropies.tolist() == [[0.0], [0.0]]
    gradients = mx.grad(score(lambda w: completion_statistics(TIED, w, [[1, 2], [3]], [[], []])))(weights)
    assert not any(mx.any(gradient).item() for gradient in gradients.values())
