"""Rows looked up and their gradients added up, and statistics of tokens, block by block, against numpy's float64."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.devices import compute_on
from troupe.policy.network import head
from troupe.policy.network.head import embed, head_backward, head_forward, result, sum_by_id, token_statistics
from troupe.policy.network.linear import Linear

M, D, V = 9, 6, 700


class Case(NamedTuple):
    """Random hidden states (M, D) and head (V, D), targets (M,), cotangents of log-probs and entropies (M,)."""

    hidden: mx.array
    head: mx.array
    targets: mx.array
    of_log_probs: mx.array
    of_entropies: mx.array

    def score(self, hidden: mx.array, head: mx.array, temperature: float = 1.0) -> mx.array:
        """The sum over all tokens of their statistics times the cotangents."""
        log_probs, entropies = token_statistics(hidden, Linear(head), self.targets, temperature)
        return (log_probs * self.of_log_probs + entropies * self.of_entropies).sum()


@pytest.fixture
def case() -> Case:
    keys = mx.random.split(mx.random.key(0), 4)
    targets = mx.array([0, 255, 256, 511, 512, 699, 300, 300, 1])  # the edges of blocks, one twice
    return Case(
        mx.random.normal((M, D), key=keys[0]),
        mx.random.normal((V, D), key=keys[1]),
        targets,
        mx.random.normal((M,), key=keys[2]),
        mx.random.normal((M,), key=keys[3]),
    )


@pytest.fixture(params=[1, 3], ids=["one block", "three blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(head, "BLOCK_NUMBERS_ON_CPU", {1: M * 1024, 3: M * 256}[request.param])
    assert len(list(head._blocks(V, M))) == request.param
    return int(request.param)


def by_definition(case: Case, temperature: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-probabilities (M, V), those of the targets, and entropies, float64."""
    logits = np.array(case.hidden).astype(np.float64) @ np.array(case.head).astype(np.float64).T / temperature
    logits -= logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return log_p, log_p[np.arange(M), np.array(case.targets)], -(np.exp(log_p) * log_p).sum(-1)


def gradients_by_definition(case: Case, temperature: float, of_entropies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the score, by hidden states and head: ∂log p_t/∂ℓ_v = [v = t] − p_v and ∂H/∂ℓ_v = −p_v·(log p_v + H)."""
    log_p, _, entropies = by_definition(case, temperature)
    of_log_probs = np.array(case.of_log_probs).astype(np.float64)[:, None]
    by_logits = (np.eye(V)[np.array(case.targets)] - np.exp(log_p)) * of_log_probs
    by_logits -= np.exp(log_p) * (log_p + entropies[:, None]) * of_entropies[:, None]
    by_logits /= temperature
    return by_logits @ np.array(case.head).astype(np.float64), by_logits.T @ np.array(case.hidden).astype(np.float64)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.0])
def test_log_probs_and_entropies_are_those_of_the_whole_softmax(case: Case, temperature: float) -> None:
    log_probs, entropies = token_statistics(case.hidden, Linear(case.head), case.targets, temperature)
    assert log_probs.dtype == entropies.dtype == mx.float32
    _, chosen, expected = by_definition(case, temperature)
    size = 11 / temperature  # of the largest logit: what float32 cannot tell of it, no difference of logits can have
    np.testing.assert_allclose(np.array(log_probs), chosen, atol=5e-7 * size)
    np.testing.assert_allclose(np.array(entropies), expected, atol=3e-6 * size)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.0])
@pytest.mark.parametrize("through", ["both", "log-probs", "mx.grad"])
def test_gradients_are_those_of_the_formulas(case: Case, temperature: float, through: str) -> None:
    if through == "mx.grad":
        ours = mx.grad(lambda hidden, head: case.score(hidden, head, temperature), argnums=(0, 1))(
            case.hidden, case.head
        )
    else:
        outputs = result(head_forward(case.hidden, Linear(case.head), case.targets, temperature))
        cotangents = (case.of_log_probs, case.of_entropies if through == "both" else None)
        ours = result(head_backward(case.hidden, Linear(case.head), case.targets, temperature, outputs, cotangents))
    of_entropies = np.array(case.of_entropies).astype(np.float64) * (through != "log-probs")
    for gradient, expected in zip(ours, gradients_by_definition(case, temperature, of_entropies), strict=True):
        assert gradient.dtype == mx.float32
        np.testing.assert_allclose(np.array(gradient), expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.usefixtures("blocks")
def test_gradients_are_the_slopes(case: Case) -> None:
    ours = mx.grad(case.score, argnums=(0, 1))(case.hidden, case.head)
    step = 1e-2
    for argument, gradient in enumerate(ours):
        direction = mx.random.normal(gradient.shape, key=mx.random.key(8))
        direction = direction / mx.linalg.norm(direction)
        shift = step * direction
        if argument == 0:
            ahead, behind = (case.score(case.hidden + sign * shift, case.head).item() for sign in (1, -1))
        else:
            ahead, behind = (case.score(case.hidden, case.head + sign * shift).item() for sign in (1, -1))
        slope = (gradient * direction).sum().item()
        assert slope == pytest.approx((ahead - behind) / (2 * step), rel=2e-3, abs=2e-3)


@pytest.mark.usefixtures("blocks")
def test_logits_of_any_size_are_added_up(case: Case) -> None:
    large = case._replace(head=case.head * 500.0)  # softmaxes that are almost certain, e^ℓ beyond float32
    log_probs, entropies = token_statistics(large.hidden, Linear(large.head), large.targets, 1.0)
    _, chosen, expected = by_definition(large, 1.0)
    np.testing.assert_allclose(np.array(log_probs), chosen, rtol=1e-5)
    np.testing.assert_allclose(np.array(entropies), expected, atol=2e-3)
    ours = mx.grad(large.score, argnums=(0, 1))(large.hidden, large.head)
    assert all(mx.all(mx.isfinite(gradient)).item() for gradient in ours)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_low_precision_keeps_the_statistics_in_float32(case: Case, dtype: mx.Dtype) -> None:
    rounded = case._replace(hidden=case.hidden.astype(dtype), head=case.head.astype(dtype))
    exact = case._replace(hidden=rounded.hidden.astype(mx.float32), head=rounded.head.astype(mx.float32))
    log_probs, entropies = token_statistics(rounded.hidden, Linear(rounded.head), case.targets, 0.7)
    assert log_probs.dtype == entropies.dtype == mx.float32
    _, chosen, expected = by_definition(exact, 0.7)
    np.testing.assert_allclose(np.array(log_probs), chosen, atol=0.05)  # logits near 10 have steps of 1/32
    np.testing.assert_allclose(np.array(entropies), expected, atol=0.05)
    ours = mx.grad(rounded.score, argnums=(0, 1))(rounded.hidden, rounded.head)
    theirs = gradients_by_definition(exact, 1.0, np.array(case.of_entropies).astype(np.float64))
    for gradient, expected in zip(ours, theirs, strict=True):
        assert gradient.dtype == dtype
        difference = np.array(gradient.astype(mx.float32)) - expected
        assert np.linalg.norm(difference) < 0.02 * np.linalg.norm(expected)


def test_a_token_that_is_all_but_certain_keeps_its_small_gradient_in_bfloat16() -> None:
    hidden, table = mx.array([[1.0]], mx.bfloat16), mx.array([[0.0]] * 3 + [[10.0]], mx.bfloat16)

    def log_prob(hidden: mx.array) -> mx.array:
        return token_statistics(hidden, Linear(table), mx.array([3]), 1.0).log_probs.sum()

    missing = 3 / (3 + np.exp(10.0))  # 1 − p is 1.4e-4; as 1 minus a bfloat16 it would be 0
    assert mx.grad(log_prob)(hidden).item() == pytest.approx(10 * missing, rel=0.01)


def test_many_blocks_give_the_bits_that_they_gave_before(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "BLOCK_NUMBERS_ON_CPU", 1)
    first, second = (mx.grad(case.score, argnums=(0, 1))(case.hidden, case.head) for _ in range(2))
    assert all(mx.array_equal(a, b).item() for a, b in zip(first, second, strict=True))


def test_no_tokens_have_no_statistics_and_leave_no_gradient() -> None:
    table = mx.ones((V, D))
    empty = mx.array([], mx.int32)
    log_probs, entropies = token_statistics(mx.zeros((0, D)), Linear(table), empty, 1.0)
    assert log_probs.shape == entropies.shape == (0,)
    gradient = mx.grad(lambda table: token_statistics(mx.zeros((0, D)), Linear(table), empty, 1.0).log_probs.sum())(
        table
    )
    assert not mx.any(gradient).item()


@pytest.mark.parametrize(
    ("numbers", "tokens", "stops"),
    [
        (2**21, 4096, [512, 1024, 1100]),
        (1, 100, [256, 512, 768, 1024, 1100]),
        (2**21, 1, [1100]),
        (600, 0, [512, 1024, 1100]),
    ],
)
def test_blocks_are_multiples_of_256_rows_and_never_empty(
    numbers: int, tokens: int, stops: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "BLOCK_NUMBERS_ON_CPU", numbers)
    assert list(head._blocks(1100, tokens)) == [
        slice(start, stop) for start, stop in zip([0, *stops[:-1]], stops, strict=True)
    ]


def test_processors_and_gpus_have_their_own_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "BLOCK_NUMBERS_ON_CPU", 300 * 10)
    monkeypatch.setattr(head, "BLOCK_NUMBERS", 600 * 10)
    assert [block.stop for block in head._blocks(1000, 10)] == [256, 512, 768, 1000]
    compute_on(monkeypatch, cpu=False)
    assert [block.stop for block in head._blocks(1000, 10)] == [512, 1000]


def test_powers_in_one_loop_are_those_in_two(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = mx.random.normal((5, 300), key=mx.random.key(0))
    peak = mx.max(logits, axis=-1, keepdims=True)
    found = []
    for on_cpu in (True, False):
        compute_on(monkeypatch, cpu=on_cpu)
        found.append(head._powers(logits, 0.5, peak * 0.5))
    expected = np.exp(0.5 * (np.array(logits) - np.array(peak)))
    for powers, weighted in found:
        np.testing.assert_allclose(np.array(powers), expected, rtol=1e-5)
        np.testing.assert_allclose(np.array(weighted), expected * np.log(expected), rtol=1e-4, atol=1e-6)


@pytest.fixture(params=["cpu", "gpu"])
def device_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of adding up, wherever the tests run."""
    compute_on(monkeypatch, cpu=request.param == "cpu")


def sums_by_definition(x: np.ndarray, ids: np.ndarray, size: int) -> np.ndarray:
    sums = np.zeros((size, x.shape[1]))
    np.add.at(sums, ids, x.astype(np.float64))
    return sums


@pytest.mark.usefixtures("device_path")
@pytest.mark.parametrize(
    "ids",
    [
        [3],
        [0, 1, 2, 3],
        [6, 6, 6, 6, 6, 6, 6],
        [5, 0, 5, 6, 0, 5],
        [2] * 1000 + [0] + [2] * 1000,
        np.random.default_rng(0).integers(0, 7, size=513).tolist(),
    ],
    ids=["one", "each once", "all equal", "mixed", "two thousand equal", "random"],
)
def test_sums_are_those_of_numpy(ids: list[int]) -> None:
    x = np.random.default_rng(1).normal(size=(len(ids), 3)).astype(np.float32)
    ours = np.array(sum_by_id(mx.array(x), mx.array(ids), 7))
    np.testing.assert_allclose(ours, sums_by_definition(x, np.array(ids), 7), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("device_path")
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, 4), min_size=1, max_size=40), power=st.integers(0, 5))
def test_whole_numbers_are_added_up_exactly(ids: list[int], power: int) -> None:
    x = np.array([[2.0**power * i, -i] for i in range(len(ids))], np.float32)
    np.testing.assert_array_equal(
        np.array(sum_by_id(mx.array(x), mx.array(ids), 5)), sums_by_definition(x, np.array(ids), 5)
    )


@pytest.mark.usefixtures("device_path")
def test_the_same_sums_again_have_the_same_bits_and_do_not_depend_on_other_ids() -> None:
    rng = np.random.default_rng(2)
    ids = rng.integers(0, 50, size=3000)
    x = rng.normal(size=(3000, 4)).astype(np.float32)
    first = np.array(sum_by_id(mx.array(x), mx.array(ids), 50))
    for _ in range(3):
        np.testing.assert_array_equal(np.array(sum_by_id(mx.array(x), mx.array(ids), 50)), first)
    some = ids < 25
    np.testing.assert_array_equal(np.array(sum_by_id(mx.array(x[some]), mx.array(ids[some]), 50))[:25], first[:25])


@pytest.mark.usefixtures("device_path")
def test_low_precision_is_summed_in_float32() -> None:
    x = mx.full((1000, 2), 1.0, dtype=mx.bfloat16)  # in bfloat16, 256 + 1 is 256
    sums = sum_by_id(x, mx.zeros(1000, mx.int32), 2)
    assert sums.dtype == mx.bfloat16
    assert sums.tolist() == [[1000, 1000], [0, 0]]


@pytest.mark.parametrize("on_cpu", [True, False])
def test_rows_are_looked_up_and_their_gradient_is_the_sum_of_the_cotangents(
    on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_on(monkeypatch, cpu=on_cpu)
    table = mx.random.normal((6, 3), key=mx.random.key(0))
    ids = mx.array([[5, 0, 5, 2], [5, 5, 0, 1]])
    cotangent = mx.random.normal((2, 4, 3), key=mx.random.key(1))
    np.testing.assert_array_equal(np.array(embed(table, ids)), np.array(table)[np.array(ids)])
    gradient = mx.grad(lambda table: (embed(table, ids) * cotangent).sum())(table)
    expected = sums_by_definition(np.array(cotangent).reshape(8, 3), np.array(ids).reshape(8), 6)
    np.testing.assert_allclose(np.array(gradient), expected, atol=1e-6)
