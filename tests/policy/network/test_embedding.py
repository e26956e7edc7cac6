"""Looking up rows and adding up their gradients, against numpy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.devices import compute_on
from troupe.policy.network.embedding import embed, sum_by_id


@pytest.fixture(params=["cpu", "gpu"])
def device_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of adding up, wherever the tests run."""
    compute_on(monkeypatch, cpu=request.param == "cpu")


def by_definition(x: np.ndarray, ids: np.ndarray, size: int) -> np.ndarray:
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
    np.testing.assert_allclose(ours, by_definition(x, np.array(ids), 7), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("device_path")
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, 4), min_size=1, max_size=40), power=st.integers(0, 5))
def test_whole_numbers_are_added_up_exactly(ids: list[int], power: int) -> None:
    x = np.array([[2.0**power * i, -i] for i in range(len(ids))], np.float32)
    np.testing.assert_array_equal(
        np.array(sum_by_id(mx.array(x), mx.array(ids), 5)), by_definition(x, np.array(ids), 5)
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
    expected = by_definition(np.array(cotangent).reshape(8, 3), np.array(ids).reshape(8), 6)
    np.testing.assert_allclose(np.array(gradient), expected, atol=1e-6)
