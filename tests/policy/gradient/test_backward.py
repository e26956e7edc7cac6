"""Gradients by hand against those of MLX, and what they hold in memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.policy.gradient.test_completions import COMPLETIONS, CONFIGS, GROUP, PROMPTS, TIED, device_path, row_by_row
from troupe.policy.gradient.backward import completion_gradients, completion_statistics, side_by_side
from troupe.policy.network import head
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.head import TokenStatistics
from troupe.policy.network.rotary import YarnScaling
from troupe.policy.network.tensors import Weights, expected_shapes, init_weights

__all__ = ["device_path"]

Rows = tuple[list[list[int]], list[list[int]]]
RAGGED: Rows = (PROMPTS, COMPLETIONS)


def of_statistics(statistics: TokenStatistics) -> tuple[mx.array, mx.array]:
    """A loss that is not linear in them, with weights for each place; and the mean entropy besides. All terms are above
    0, so that they do not cancel each other and leave what was rounded."""
    log_probs, entropies = statistics
    by_log_probs, by_entropies = (mx.random.uniform(0.2, 2, log_probs.shape, key=mx.random.key(n)) for n in (0, 1))
    return (mx.exp(log_probs * 0.1) * by_log_probs + entropies * by_entropies).sum(), entropies.mean()


def gradients(config: NetworkConfig, weights: Weights, rows: Rows, **settings: Any) -> Any:
    """Loss, what comes with it, and the gradients in one dict; each must come once."""
    found: dict[str, mx.array] = {}
    values: list[Any] = []
    for part in side_by_side([completion_gradients(config, weights, *rows, of_statistics, **settings)], (), values):
        assert not found.keys() & part.keys()
        found |= part
    ((loss, extra),) = values
    return loss, extra, found


def by_mlx(statistics: Callable[[Weights], tuple[mx.array, mx.array]], weights: Weights) -> Any:
    """The same by `mx.grad` of a function of the weights."""
    (loss, extra), found = mx.value_and_grad(lambda w: of_statistics(TokenStatistics(*statistics(w))))(dict(weights))
    return loss, extra, found


def check(ours: Any, theirs: Any, tolerance: float = 3e-5) -> None:
    """Both losses, what comes with them, and all gradients, each against its own largest number."""
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        assert one.item() == pytest.approx(other.item(), rel=tolerance, abs=tolerance)
    assert ours[2].keys() == theirs[2].keys()
    for name, expected in theirs[2].items():
        scale = max(1.0, float(mx.abs(expected).max()))
        assert ours[2][name].dtype == expected.dtype
        difference = mx.abs(ours[2][name].astype(mx.float32) - expected.astype(mx.float32)).max()
        assert float(difference) <= tolerance * scale, name


CASES: dict[str, tuple[Rows, float, bool]] = {
    "ragged": (RAGGED, 1.0, False),
    "cooler": (RAGGED, 0.6, True),
    "group": (GROUP, 1.0, True),
    "one token": (([[4]], [[5]]), 1.0, False),
    "none": (([[4, 5], [6]], [[], []]), 1.0, True),
}
"""Rows, temperature, and how the quick test computes activations; the slow one does the other."""


@pytest.mark.usefixtures("device_path")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("as_quick", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["quick", "other"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_whole_logits_row_by_row(config: NetworkConfig, case: str, as_quick: bool) -> None:
    rows, temperature, recompute = CASES[case]
    recompute = recompute is as_quick
    weights = init_weights(config, mx.random.key(3))
    ours = gradients(config, weights, rows, temperature=temperature, recompute=recompute)
    assert ours[2].keys() == expected_shapes(config).keys()
    check(ours, by_mlx(lambda w: row_by_row(config, w, *rows, temperature), weights))


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
    ),
    recompute=st.booleans(),
)
def test_gradients_of_any_rows(groups: list[tuple[list[int], list[list[int]]]], recompute: bool) -> None:
    rows = [prompt for prompt, members in groups for _ in members], [c for _, members in groups for c in members]
    weights = init_weights(TIED, mx.random.key(3))
    check(gradients(TIED, weights, rows, recompute=recompute), by_mlx(lambda w: row_by_row(TIED, w, *rows), weights))


@pytest.mark.usefixtures("device_path")
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_computing_activations_again_gives_the_same_bits(dtype: mx.Dtype) -> None:
    config = msgspec.structs.replace(TIED, num_hidden_layers=3)
    weights = init_weights(config, mx.random.key(3), dtype)
    kept, again = (gradients(config, weights, RAGGED, recompute=recompute) for recompute in (False, True))
    assert kept[0].item() == again[0].item()
    for name, gradient in kept[2].items():
        assert gradient.dtype == dtype
        assert mx.array_equal(gradient, again[2][name]).item(), name


@pytest.mark.usefixtures("device_path")
@pytest.mark.parametrize("recompute", [False, True])
def test_without_an_entropy_gradient_entropies_are_constants(recompute: bool) -> None:
    weights = init_weights(TIED, mx.random.key(3))

    def held(weights: Weights) -> tuple[mx.array, mx.array]:
        log_probs, entropies = row_by_row(TIED, weights, *RAGGED)
        return log_probs, mx.stop_gradient(entropies)

    ours = gradients(TIED, weights, RAGGED, recompute=recompute, entropy_gradient=False)
    check(ours, by_mlx(held, weights))


@pytest.mark.usefixtures("device_path")
def test_bfloat16_gradients_are_as_near_to_the_exact_ones_as_mlx_comes() -> None:
    half = init_weights(TIED, mx.random.key(3), mx.bfloat16)
    full = {name: weight.astype(mx.float32) for name, weight in half.items()}

    def distance(found: dict[str, mx.array], expected: dict[str, mx.array]) -> float:
        squares = [((found[name].astype(mx.float32) - expected[name]) ** 2).sum() for name in expected]
        return float(mx.sqrt(mx.stack(squares).sum()))

    exact = gradients(TIED, full, RAGGED)[2]
    ours = gradients(TIED, half, RAGGED)[2]
    theirs = by_mlx(lambda w: completion_statistics(TIED, w, *RAGGED), half)[2]
    assert all(gradient.dtype == mx.bfloat16 for gradient in ours.values())
    size = distance({name: mx.zeros(array.shape) for name, array in exact.items()}, exact)
    assert distance(ours, exact) < max(1.2 * distance(theirs, exact), 0.01 * size)
    assert distance(ours, exact) < 0.1 * size


@pytest.mark.usefixtures("device_path")
def test_stretched_positions_are_differentiated_too() -> None:
    yarn = YarnScaling(factor=4.0, original_max_position_embeddings=16)
    config = msgspec.structs.replace(TIED, rope_scaling=yarn)
    weights = init_weights(config, mx.random.key(3))
    check(gradients(config, weights, RAGGED), by_mlx(lambda w: row_by_row(config, w, *RAGGED), weights))


@pytest.mark.usefixtures("device_path")
def test_nothing_of_one_batch_stays_for_others_laid_out_alike() -> None:
    weights = init_weights(TIED, mx.random.key(3))
    batches: list[Rows] = [
        ([[1, 2, 3], [1, 2, 3], [4, 5]], [[10, 11, 12, 13], [14], [15, 16]]),
        ([[9, 8, 7], [9, 8, 7], [6, 5]], [[20, 21, 22, 23], [24], [25, 26]]),  # other ids
        ([[1, 2], [3, 4, 5], [3, 4, 5]], [[14], [10, 11, 12, 13], [15, 16]]),  # the same sizes in another order
        ([[1, 2, 3], [1, 2, 3], [4, 5]], [[10, 11], [14], [15, 16, 17, 18]]),  # the same sums and longest rows
    ]
    for rows in [*batches, *batches]:  # what is compiled is compiled for shapes alone
        check(
            gradients(TIED, weights, rows),
            by_mlx(partial(row_by_row, TIED, prompts=rows[0], completions=rows[1]), weights),
        )


def test_a_loss_that_does_not_depend_on_them_has_no_gradient() -> None:
    weights = init_weights(TIED, mx.random.key(3))
    work: Any = completion_gradients(
        TIED, weights, *RAGGED, lambda statistics: (statistics.log_probs.sum() * 0.0, statistics.entropies)
    )
    values: list[Any] = []
    assert not any(mx.any(grad).item() for part in side_by_side([work], (), values) for grad in part.values())
    ((loss, extra),) = values
    assert (loss.item(), extra.shape) == (0.0, (5, 4))


def test_gradients_have_the_same_bits_again() -> None:
    weights = init_weights(TIED, mx.random.key(3))
    first, second = (gradients(TIED, weights, RAGGED)[2] for _ in range(2))
    assert all(mx.array_equal(first[name], second[name]).item() for name in first)


def test_the_order_of_the_weights_does_not_matter() -> None:
    weights = init_weights(TIED, mx.random.key(3))
    turned = dict(reversed(weights.items()))
    first, second = (gradients(TIED, given, RAGGED)[2] for given in (weights, turned))
    assert all(np.array_equal(np.array(first[name]), np.array(second[name])) for name in first)


def peak(layers: int, *, recompute: bool) -> int:
    """Bytes that gradients of 512 tokens take at most besides the weights, when each is given away as it comes."""
    config = msgspec.structs.replace(
        TIED, vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=128, num_hidden_layers=layers
    )
    weights = init_weights(config, mx.random.key(0))
    mx.eval(weights)
    rows: Rows = [[1, 2, 3, 4, 5, 6, 7, 8]] * 8, [[(70 * i + j) % VOCABULARY for j in range(64)] for i in range(8)]
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    work: Any = completion_gradients(config, weights, *rows, of_statistics, recompute=recompute)
    for part in side_by_side([work], (), []):
        del part
    return mx.get_peak_memory() - before


VOCABULARY, HIDDEN = 20_000, 32
LOGITS_BYTES, INPUT_BYTES = 512 * VOCABULARY * 4, 512 * HIDDEN * 4


@pytest.mark.slow
@pytest.mark.usefixtures("mlx_waits")
def test_logits_are_never_there_at_once_and_layers_leave_little_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "BLOCK_NUMBERS_ON_CPU", 2**17)
    few, many = (peak(layers, recompute=True) for layers in (2, 10))
    assert many < LOGITS_BYTES / 3
    assert (many - few) / 8 < 2 * INPUT_BYTES
    kept = (peak(10, recompute=False) - peak(2, recompute=False)) / 8
    assert kept > 8 * INPUT_BYTES, "the measure sees what is kept"
