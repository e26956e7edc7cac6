"""Which heads the kernels for NVIDIA cards take, and how the work is divided; what they compute is in
`test_cuda_cache.py`."""

from __future__ import annotations

import mlx.core as mx
import pytest

from troupe.policy.decode import cuda_kernels

SHARED = 48 * 1024
"""Bytes that a block may share without asking."""


def shared_bytes(group: int, head_dim: int) -> int:
    """What the kernel by sums declares, with float32 weights: queries, what eight warps mixed, the new token; sums."""
    return (group * head_dim * (1 + 8) + 2 * head_dim + 2 * group * 8) * 4


def test_heads_that_fit_into_shared_memory_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "are_available", lambda: True)
    for group in range(1, 7):
        for head_dim in (64, 128, 256):
            fits = shared_bytes(group, head_dim) <= SHARED
            assert cuda_kernels.can_serve(8 * group, 8, head_dim) == fits, (group, head_dim)
    assert not cuda_kernels.can_serve(48, 8, 256)
    assert cuda_kernels.can_serve(40, 8, 256)


@pytest.mark.parametrize(
    ("heads", "head_dim", "here"), [(56, 64, True), (8, 96, True), (8, 192, True), (8, 320, True), (16, 128, False)]
)
def test_other_heads_and_devices_are_left_to_the_plain_cache(
    heads: int, head_dim: int, here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_kernels, "are_available", lambda: here)
    assert not cuda_kernels.can_serve(heads, 8, head_dim)


@pytest.mark.parametrize("has_units", [True, False])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
@pytest.mark.parametrize(("heads", "head_dim"), [(16, 128), (32, 128), (48, 64), (40, 256)])
def test_every_row_and_all_of_its_context_has_a_block(
    heads: int, head_dim: int, dtype: mx.Dtype, has_units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_kernels, "_have_matrix_units", lambda: has_units)
    for rows in (1, 3, 8, 31, 256, 1000):
        for context in (1, 100, 2047, 2048, 5000, 40_000):
            plan = cuda_kernels.plan_launch(rows, heads, 8, head_dim, dtype, context)
            blocks = [-(-all_ // each) for all_, each in zip(plan.grid, plan.block, strict=True)]
            threads = plan.block[0] * plan.block[1] * plan.block[2]
            assert 1 <= plan.splits <= max(1, context // 128)
            if plan.by_units:
                _, team, together = plan.block
                assert has_units
                assert dtype == mx.bfloat16
                assert plan.block[0] == 32
                assert team * together <= 8, "what they share has room for eight warps"
                assert (blocks[0] * together, blocks[1], blocks[2]) == (
                    -(-rows * 8 // together) * together,
                    plan.splits,
                    1,
                )
            else:
                assert blocks == [rows * 8 * plan.splits, 1, 1]
                assert threads == 256


def test_few_rows_have_teams_and_long_contexts_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "_have_matrix_units", lambda: True)

    def team_and_splits(rows: int, context: int) -> tuple[int, int]:
        plan = cuda_kernels.plan_launch(rows, 16, 8, 128, mx.bfloat16, context)
        return plan.block[1], plan.splits

    assert [team_and_splits(rows, 500) for rows in (256, 128, 64, 32, 1)] == [(1, 1), (1, 1), (2, 1), (4, 1), (8, 1)]
    assert [team_and_splits(1, context) for context in (2047, 2048, 8192)] == [(8, 1), (8, 4), (8, 16)]
    assert team_and_splits(256, 40_000) == (1, 1)
