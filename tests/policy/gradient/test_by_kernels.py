"""Gradients of whole networks by the kernels for NVIDIA cards, run on a processor, against those by MLX."""

from __future__ import annotations

import shutil
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.policy.gradient.test_backward import gradients
from tests.support.devices import compute_on
from tests.support.emulated_cuda import EmulatedKernel
from tests.support.tiny import small_network
from troupe.policy.network import flash_attention as flash
from troupe.policy.network import fused_kernels, head, packing, rotation
from troupe.policy.network.dropout import Dropout
from troupe.policy.network.fusing import fuse_projections
from troupe.policy.network.linear import MAGNITUDE, A, B
from troupe.policy.network.tensors import init_weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the kernels are compiled by g++"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
ROWS = [[5, 6, 7] * 20, [5, 6, 7] * 20, [8], [8]], [[1, 2, 3] * 9, [4], [], [3, 4, 5, 6]]
TOKENS = 61 + 26 + 3


def use_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fused_kernels, head, rotation):
        monkeypatch.setattr(module, "has_kernels", lambda: True)
    monkeypatch.setattr(packing, "can_serve", lambda head_dim, dtype: True)


@pytest.mark.parametrize(
    ("family", "window", "joined", "adapted"),
    [("qwen3", None, False, False), ("mistral", 20, True, False), ("qwen2", None, False, True)],
)
def test_gradients_are_those_by_mlx(
    family: str, window: int | None, joined: bool, adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_on(monkeypatch, cpu=False)
    monkeypatch.setattr(mx.fast, "cuda_kernel", EmulatedKernel)

    def kernel(name: str, shared_bytes: int) -> EmulatedKernel:
        return EmulatedKernel(name, *flash._SIGNATURES[name], flash._source(name), shared_memory=shared_bytes)

    monkeypatch.setattr(flash, "_kernel", kernel)
    config = small_network(model_type=family, head_dim=64, initializer_range=0.2, sliding_window=window)
    weights = init_weights(config, mx.random.key(3), dtype=mx.float16)
    settings: dict[str, Any] = {"recompute": joined}
    if joined:
        weights = fuse_projections(config, weights)
    if adapted:
        for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"):
            name = f"model.layers.1.{module}"
            out, columns = weights[f"{name}.weight"].shape
            for kind, shape in ((A, (3, columns)), (B, (out, 3)), (MAGNITUDE, (out,))):
                numbers = mx.random.normal(shape, key=mx.random.key(len(weights))) * 0.2
                weights[f"{name}{kind}.weight"] = numbers.astype(mx.float16)
        keys = mx.random.randint(0, 2**31 - 1, (TOKENS,), key=mx.random.key(1)).astype(mx.uint32)
        settings |= {"of_base": False, "dropout": Dropout(0.3, keys)}
    by_mlx = gradients(config, weights, ROWS, **settings)
    use_kernels(monkeypatch)
    fused_kernels._kernel.cache_clear()
    found = gradients(config, weights, ROWS, **settings)
    fused_kernels._kernel.cache_clear()
    assert found[0].item() == pytest.approx(by_mlx[0].item(), rel=2e-3)
    assert found[2].keys() == by_mlx[2].keys()
    assert any(not mx.array_equal(x, by_mlx[2][name]) for name, x in found[2].items()), "no kernel was asked"
    for name, expected in by_mlx[2].items():
        assert (found[2][name].dtype, found[2][name].shape) == (expected.dtype, expected.shape), name
        one, other = (np.array(x.astype(mx.float32)) for x in (found[2][name], expected))
        assert np.linalg.norm(one - other) <= 1e-2 * np.linalg.norm(other), name
