"""Packed rows in layers with windows against each row alone: prompts of unequal length, beyond a block of queries."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from tests.policy.gradient.test_backward import by_mlx, check, gradients
from tests.policy.gradient.test_completions import device_path, row_by_row
from tests.support.families import family_configs
from troupe.policy.network.attention import BLOCK
from troupe.policy.network.tensors import init_weights

__all__ = ["device_path"]

WINDOWED = {
    f"{name} {window}": config
    for window in (1, 3, 40, 100, 500)
    for name, config in family_configs(
        vocab_size=600, hidden_size=16, intermediate_size=24, max_position_embeddings=400, sliding_window=window
    ).items()
    if config.has_windows
}

QUICK = {3, 40}
"""Below a block of queries; the others, as long as nothing, a block and more than all rows, take longer."""


def row(n: int, seed: int) -> list[int]:
    return [(7 * i + 31 * seed) % 600 for i in range(n)]


@pytest.mark.usefixtures("device_path")
@pytest.mark.parametrize("recompute", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "lengths",
    [
        [(5, 3), (5, 90), (150, 2), (70, 70), (70, 1)],
        [(2 * BLOCK, BLOCK + 1)] * 2 + [(2 * BLOCK, 10)],
        [(1, 130), (100, 0), (3, 5)],
    ],
    ids=["ragged", "equal", "short and long"],
)
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, id=name, marks=() if config.sliding_window in QUICK else pytest.mark.slow)
        for name, config in WINDOWED.items()
    ],
)
def test_gradients_are_those_of_each_row_alone(config: Any, lengths: list[tuple[int, int]], recompute: bool) -> None:
    weights = init_weights(config, mx.random.key(3))
    rows = [row(p, p) for p, _ in lengths], [row(c, index + 50) for index, (_, c) in enumerate(lengths)]
    check(
        gradients(config, weights, rows, recompute=recompute),
        by_mlx(lambda w: row_by_row(config, w, *rows), weights),
        1e-4,
    )
