"""The engine's dice: uniform and independent noise, a draw that never leaves the support."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from tests.support.devices import compute_on
from troupe.policy.decode.drawing import noise_block, row_key
from troupe.policy.decode.sampling import draw_by_shares
from troupe.policy.network import elementwise


def test_noise_is_uniform_and_belongs_to_key_and_block() -> None:
    keys = [row_key((3, 1, 4), i) for i in range(2000)]
    assert len({*keys, row_key((3, 1), 4), row_key((31, 4), 0)}) == 2002
    noise = np.array(noise_block(keys, 0))
    assert noise.shape == (2000, 16)
    assert noise.min() >= 0
    assert noise.max() < 1
    counts = np.bincount((noise * 20).astype(int).ravel(), minlength=20)
    assert ((counts - 1600) ** 2 / 1600).sum() < 19 + 4 * np.sqrt(38)
    assert abs(np.corrcoef(noise[:, 0], noise[:, 1])[0, 1]) < 0.1
    np.testing.assert_array_equal(np.array(noise_block(keys[7:8], 0)), noise[7:8])
    assert not np.any(np.array(noise_block(keys[:1], 1)) == noise[0])


@pytest.mark.parametrize("on_cpu", [True, False])
def test_the_draw_never_leaves_the_support(monkeypatch: pytest.MonkeyPatch, on_cpu: bool) -> None:
    compute_on(monkeypatch, cpu=on_cpu)
    shares = mx.array([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]] * 7)
    uniforms = mx.array([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2.0**-24, 1.0])
    assert draw_by_shares(shares, uniforms).tolist() == [1, 1, 3, 3, 4, 4, 4]


def test_the_draw_survives_a_real_vocabulary() -> None:
    V = 151_936
    shares = elementwise.exp(mx.random.normal((4, V), key=mx.random.key(0)) * 3)
    shares[:, -1000:] = 0
    ids = np.array(draw_by_shares(shares, mx.array([0.0, 0.5, 0.999, 1 - 2.0**-24])))
    exact = np.array(shares).astype(np.float64)
    ends = np.cumsum(exact, axis=-1) / exact.sum(axis=-1, keepdims=True)
    for row, (token, uniform) in enumerate(zip(ids.astype(int), [0.0, 0.5, 0.999, 1.0], strict=True)):
        assert token < V - 1000
        assert ends[row, token - 1] - 1e-4 <= uniform <= ends[row, token] + 1e-4 if token else uniform == 0.0


def test_the_draw_in_two_steps_inverts_the_exact_distribution() -> None:
    shares = elementwise.exp(mx.random.normal((64, 2048), key=mx.random.key(1)) * 4)
    shares[:, 128:640] = 0
    shares[:, 1000:1100] = 0
    uniforms = mx.random.uniform(shape=(64,), key=mx.random.key(2))
    uniforms[:3] = mx.array([0.0, 1 - 2.0**-24, 1.0])
    ids = np.array(draw_by_shares(shares, uniforms)).astype(int)
    exact = np.array(shares).astype(np.float64)
    assert np.all(exact[np.arange(64), ids] > 0)
    ends = np.cumsum(exact, axis=-1) / exact.sum(axis=-1, keepdims=True)
    past = ends[np.arange(64), ids]
    wanted = np.array(uniforms).astype(np.float64)
    assert np.all(wanted <= past + 1e-6)
    assert np.all(past - exact[np.arange(64), ids] / exact.sum(axis=-1) <= wanted + 1e-6)


def test_the_draw_in_two_steps_takes_the_first_and_last_id_with_a_share() -> None:
    shares = mx.zeros((2, 2048))
    shares[:, 700] = 0.25
    shares[:, 1300] = 0.25
    assert draw_by_shares(shares, mx.array([0.0, 1.0])).tolist() == [700, 1300]
