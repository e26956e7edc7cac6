"""Which heads the kernels for NVIDIA cards take; what they compute is in `test_cuda_decoding.py`."""

from __future__ import annotations

import pytest

from troupe.policy import cuda_kernels

SHARED = 48 * 1024
"""Bytes that a block may share without asking."""


def shared_bytes(group: int, head_dim: int) -> int:
    """What `attend` declares, with float32 weights: queries, what eight warps mixed, and the new token; their sums."""
    return (group * head_dim * (1 + 8) + 2 * head_dim + 2 * group * 8) * 4


def test_heads_that_fit_into_shared_memory_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "are_here", lambda: True)
    for group in range(1, 7):
        for head_dim in (64, 128, 192, 256):
            fits = shared_bytes(group, head_dim) <= SHARED
            assert cuda_kernels.serve(8 * group, 8, head_dim) == fits, (group, head_dim)
    assert not cuda_kernels.serve(48, 8, 256)
    assert cuda_kernels.serve(40, 8, 256)


@pytest.mark.parametrize(("heads", "head_dim"), [(56, 64), (8, 96), (8, 320), (16, 32)])
def test_other_heads_are_left_to_the_plain_cache(heads: int, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "are_here", lambda: True)
    assert not cuda_kernels.serve(heads, 8, head_dim)


def test_nothing_is_served_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "are_here", lambda: False)
    assert not cuda_kernels.serve(16, 8, 128)
