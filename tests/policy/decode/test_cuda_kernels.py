"""Which heads the kernels for NVIDIA cards take, and how the work is divided; what they compute is in
`test_cuda_cache.py`."""

from __future__ import annotations

import mlx.core as mx
import pytest

from troupe.policy.decode import cuda_kernels

SHARED = 48 * 1024
"""Bytes that a block may share without asking."""


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "have_matrix_units", lambda: True)
    monkeypatch.setattr(cuda_kernels, "shared_memory_limit", lambda: 227 * 1024)


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
    heads: int, head_dim: int, dtype: mx.Dtype, has_units: bool, card: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_kernels, "have_matrix_units", lambda: has_units)
    for slots, width in ((1, 1), (3, 1), (1, 8), (31, 1), (32, 8), (125, 8), (4, 19)):
        for context in (1, 100, 2047, 2048, 5000, 40_000):
            rows = slots * width
            plan = cuda_kernels.plan_launch(rows, width, heads, 8, head_dim, dtype, context)
            blocks = [-(-all_ // each) for all_, each in zip(plan.grid, plan.block, strict=True)]
            assert 1 <= plan.splits <= max(1, context // 128)
            assert plan.block == (256, 1, 1)
            assert plan.by_units == (has_units and dtype == mx.bfloat16)
            if plan.by_units:
                assert plan.together * heads // 8 <= 16, "queries that meet the prompt's keys at once"
                assert blocks == [slots * 8 * -(-width // plan.together), plan.splits, 1]
            else:
                assert blocks == [rows * 8 * plan.splits, 1, 1]


def test_where_prompts_are_few_blocks_take_fewer_rows_and_long_contexts_several(card: None) -> None:
    def divided(slots: int, context: int) -> tuple[int, int]:
        plan = cuda_kernels.plan_launch(8 * slots, 8, 16, 8, 128, mx.bfloat16, context)
        return plan.together, plan.splits

    assert [divided(slots, 500) for slots in (32, 16, 8, 4, 2, 1)] == [(8, 1), (8, 1), (4, 1), (2, 1), (1, 1), (1, 1)]
    assert [divided(1, context) for context in (2047, 2048, 8192)] == [(1, 1), (1, 2), (1, 2)]
    assert divided(32, 40_000) == (8, 1)


def test_a_card_whose_blocks_share_too_little_attends_by_sums(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "shared_memory_limit", lambda: 99 * 1024)
    kinds = [cuda_kernels.plan_launch(8, 8, 16, 8, d, mx.bfloat16, 100).by_units for d in (64, 128, 256)]
    assert kinds == [True, True, False]
