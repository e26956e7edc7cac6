"""What the optimizer holds, against the arrays that it makes; what an update takes, against the peak."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest

from troupe.grpo import adamw_init, optimizer_state_bytes, update_bytes
from troupe.grpo.optimizer import UPDATED_AT_ONCE, adamw_update_in_place


@pytest.fixture
def mlx_waits() -> Iterator[None]:
    before = mx.set_memory_limit(1)
    yield
    mx.set_memory_limit(before)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_the_state_of_adamw(dtype: mx.Dtype) -> None:
    state = adamw_init({"w": mx.zeros((30, 7), dtype), "b": mx.zeros(11, dtype)})
    held = sum(array.nbytes for name, array in state.items() if name != "step")
    assert optimizer_state_bytes(30 * 7 + 11, dtype) == held


def test_an_update_by_hand() -> None:
    assert update_bytes(1000, 100, mx.float32) == 8000
    assert update_bytes(1000, 900, mx.float32) == 18 * 900
    assert update_bytes(10 * UPDATED_AT_ONCE, 5 * UPDATED_AT_ONCE, mx.bfloat16) == (18 + 5 * 2) * UPDATED_AT_ONCE


@pytest.mark.usefixtures("mlx_waits")
@pytest.mark.parametrize("shapes", [[(400, 500)] * 20, [(4000, 500), (30, 40), (40,)]])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_an_update_peaks_below_the_formula(shapes: list[tuple[int, ...]], dtype: mx.Dtype) -> None:
    published = {str(i): mx.ones(shape, dtype) for i, shape in enumerate(shapes)}
    weights, grads = dict(published), {name: mx.ones(x.shape, dtype) for name, x in published.items()}
    state = adamw_init(published)
    mx.eval(published, grads, state)
    held = mx.get_active_memory()  # the gradients among it, whose place the new weights take
    mx.reset_peak_memory()
    adamw_update_in_place(weights, grads, state, lr=1e-3)
    sizes = [x.size for x in published.values()]
    assert mx.get_peak_memory() - held <= update_bytes(sum(sizes), max(sizes), dtype)
