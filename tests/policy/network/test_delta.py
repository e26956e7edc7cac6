"""The gated delta rule: chunks against single steps, back against MLX's own gradient, and what memory it takes."""

from __future__ import annotations

import gc
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from troupe.policy.network import delta
from troupe.policy.network.delta import (
    DeltaInputs,
    DeltaSizes,
    DeltaState,
    back_through_rows,
    one_step,
    through_rows,
    unit_lower_inverse,
)
from troupe.policy.network.delta_memory import backward_bytes, forward_bytes

SIZES = DeltaSizes(2, 4, 8, 6, 4)


def drawn(B: int, T: int, sizes: DeltaSizes = SIZES, seed: int = 0) -> tuple[DeltaInputs, DeltaState]:
    keys = mx.random.split(mx.random.key(seed), 6)
    mixed = mx.random.normal((B, T, sizes.channels), key=keys[0])
    decay = -mx.random.uniform(0, 1, (B, T, sizes.value_heads), key=keys[1])
    rate = mx.random.uniform(0, 1, (B, T, sizes.value_heads), key=keys[2])
    inputs = DeltaInputs(mixed, decay, rate, mx.random.normal((sizes.channels, sizes.taps), key=keys[3]))
    window, memory = DeltaState.empty(B, sizes)
    state = DeltaState(mx.random.normal(window.shape, key=keys[4]), mx.random.normal(memory.shape, key=keys[5]))
    mx.eval(inputs, state)
    return inputs, state


def largest(x: mx.array) -> float:
    return float(np.abs(np.array(x)).max())


@pytest.mark.parametrize("T", [1, 2, 5, 8, 9, 33, 64, 65, 200])
@pytest.mark.parametrize("sizes", [SIZES, DeltaSizes(1, 1, 4, 4, 2), DeltaSizes(3, 3, 8, 12, 8)])
def test_chunks_are_single_steps(T: int, sizes: DeltaSizes) -> None:
    inputs, state = drawn(3, T, sizes)
    o, left, _ = through_rows(inputs, state, sizes, paced=True)
    step, outputs = state, []
    for t in range(T):
        at = slice(t, t + 1)
        token = DeltaInputs(inputs.mixed[:, at], inputs.decay[:, at], inputs.rate[:, at], inputs.kernel)
        of_token, step = one_step(token, step, sizes)
        outputs.append(of_token)
    assert largest(o - mx.concatenate(outputs, axis=1)) <= 2e-5
    assert largest(left.memory - step.memory) <= 2e-5
    assert largest(left.window - step.window) == 0.0


def test_what_is_behind_a_row_changes_nothing() -> None:
    (inputs, state), lengths = drawn(3, 100), [100, 65, 2]
    real = (mx.arange(100) < mx.array(lengths)[:, None])[..., None]
    padded = inputs._replace(decay=inputs.decay * real, rate=inputs.rate * real)
    _, left, _ = through_rows(padded, state, SIZES, lengths, paced=True)
    for row, length in enumerate(lengths):
        at = slice(row, row + 1)
        alone = DeltaInputs(*(x[at, :length] for x in inputs[:3]), inputs.kernel)  # type: ignore[call-arg]
        _, expected, _ = through_rows(alone, state.of(at), SIZES, paced=True)
        assert largest(left.memory[at] - expected.memory) <= 2e-5
        assert largest(left.window[at] - expected.window) == 0.0


@pytest.mark.parametrize("lengths", [[150, 70, 2], [150, 150, 150], [1, 1, 1], [5, 6, 7]])
def test_back_is_the_gradient(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta, "SPAN_TOKENS", 192)  # several spans
    T = max(lengths)
    inputs, state = drawn(3, T)
    real = (mx.arange(T) < mx.array(lengths)[:, None])[..., None]
    inputs = inputs._replace(decay=inputs.decay * real, rate=inputs.rate * real)
    o, left, begun = through_rows(inputs, state, SIZES, lengths, paced=True)
    o_grad = mx.random.normal(o.shape, key=mx.random.key(1)) * real[..., None]
    left_grad = DeltaState(*(mx.random.normal(x.shape, key=mx.random.key(2)) for x in left))

    def function(*arguments: mx.array) -> list[mx.array]:
        mixed, decay, rate, kernel, window, memory = arguments
        given = DeltaInputs(mixed, decay, rate, kernel), DeltaState(window, memory)
        o, left, _ = through_rows(*given, SIZES, lengths, paced=False)
        return [o, *left]

    expected = mx.vjp(function, [*inputs, *state], [o_grad, *left_grad])[1]
    found = back_through_rows(inputs, state, SIZES, begun, lengths, o_grad, left_grad)
    for ours, theirs in zip((*found[0], *found[1]), expected, strict=True):
        assert largest(ours - theirs) <= 1e-5 * max(1.0, largest(theirs))


def test_an_inverse_stays_exact_where_all_keys_are_the_same() -> None:
    whole = mx.tril(mx.ones((64, 64)), -1)
    assert largest(unit_lower_inverse(whole) @ (whole + mx.eye(64)) - mx.eye(64)) == 0.0


SLOW = pytest.mark.slow


def peak_of(work: Any) -> int:
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(work())
    return int(mx.get_peak_memory() - before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "T"), [pytest.param(1, 700, marks=SLOW), (8, 300), pytest.param(40, 64, marks=SLOW), (2, 2500)]
)
@pytest.mark.parametrize("sizes", [DeltaSizes(2, 4, 32, 32, 4), pytest.param(DeltaSizes(4, 4, 16, 64, 4), marks=SLOW)])
def test_memory_stays_below_the_formula(rows: int, T: int, sizes: DeltaSizes) -> None:
    inputs, state = drawn(rows, T, sizes)
    peak = peak_of(lambda: through_rows(inputs, state, sizes, paced=True))
    assert 0.3 * forward_bytes(sizes, rows, T) <= peak <= forward_bytes(sizes, rows, T) or rows > delta.ROWS
    o, _, begun = through_rows(inputs, state, sizes, paced=True)
    mx.eval(o, begun)
    peak = peak_of(lambda: back_through_rows(inputs, state, sizes, begun, [T] * rows, o, None))
    limit = backward_bytes(sizes, (rows, T), (1, 1))
    assert 0.3 * limit <= peak <= limit or rows > delta.ROWS
