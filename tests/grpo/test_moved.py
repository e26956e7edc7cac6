"""Which part of the 16-bit weights an update moves."""

from __future__ import annotations

import mlx.core as mx
import pytest

from troupe.grpo.moved import LOOKED_AT, Moved


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_the_part_is_exact_where_all_numbers_are_looked_at(dtype: mx.Dtype) -> None:
    weights = {"a": mx.ones((10, 30), dtype=dtype), "b": mx.zeros((100,), dtype=dtype), "float32": mx.ones((50,))}
    moved = Moved(weights)
    assert moved.figures(weights) == {"weights/moved": 0.0}
    one_row = mx.concatenate([mx.full((1, 30), 2.0, dtype), weights["a"][1:]])
    after = weights | {"a": one_row, "float32": mx.zeros((50,))}
    assert moved.figures(after) == {"weights/moved": 30 / 400}


def test_of_large_weights_a_sample_is_looked_at_that_is_spread_over_them() -> None:
    weights = {"large": mx.zeros((2 * LOOKED_AT,), dtype=mx.bfloat16), "small": mx.zeros((6,), dtype=mx.bfloat16)}
    moved = Moved(weights)
    half = mx.concatenate([mx.ones((LOOKED_AT,), dtype=mx.bfloat16), mx.zeros((LOOKED_AT,), dtype=mx.bfloat16)])
    assert moved.figures(weights | {"large": half})["weights/moved"] == pytest.approx(0.5, abs=1e-4)


def test_without_16_bit_weights_there_is_no_figure() -> None:
    weights = {"a": mx.ones((3,)), "b": mx.ones((3,), dtype=mx.uint32)}
    assert Moved(weights).figures(weights) == {}


def test_it_holds_none_of_the_weights() -> None:
    weights = {"a": mx.zeros((16 * LOOKED_AT,), dtype=mx.bfloat16)}
    mx.eval(weights)
    before = mx.get_active_memory()
    moved = Moved(weights)
    weights.clear()
    assert mx.get_active_memory() < before - 24 * LOOKED_AT, "of 32 bytes a number looked at, some 6 are left"
    assert moved.figures({"a": mx.ones((16 * LOOKED_AT,), dtype=mx.bfloat16)}) == {"weights/moved": 1.0}
