"""The whole gradient as NVIDIA cards compute it, with every kernel of our own run on a processor, against MLX's own in
float32: that each kernel is given what it should be given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import msgspec
import pytest

from tests.policy.gradient.test_backward import by_mlx, gradients
from tests.support.devices import compute_on
from tests.support.emulated_cuda import EmulatedKernel
from troupe.policy.gradient.backward import completion_statistics
from troupe.policy.network import flash_attention, fused_kernels, head, packing
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.tensors import init_weights

pytestmark = pytest.mark.slow  # each kind of head is compiled

CONFIG = NetworkConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=256,
    tie_word_embeddings=True,
)
CONFIGS = {
    "qwen3": CONFIG,
    "llama": msgspec.structs.replace(CONFIG, model_type="llama", tie_word_embeddings=False),
}
ROWS = (
    [[3, 1, 4, 1, 5], [3, 1, 4, 1, 5], [9, 2, 6], [9, 2, 6], [9, 2, 6]],
    [[7] * 70, [8, 9, 10], [11, 12], [13] * 40, [14]],
)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kernels that were called."""
    called: list[str] = []

    class Told(EmulatedKernel):
        def __init__(self, name: str, *args: Any, **kwargs: Any) -> None:
            super().__init__(name, *args, **kwargs)
            self._told = name

        def __call__(self, **kwargs: Any) -> list[mx.array]:
            called.append(self._told)
            return super().__call__(**kwargs)

    compute_on(monkeypatch, cpu=False)
    monkeypatch.setattr(mx.fast, "cuda_kernel", Told)
    monkeypatch.setattr(packing, "can_serve", lambda head_dim, dtype: dtype.size == 2)
    for module in (head, fused_kernels):
        monkeypatch.setattr(module, "has_kernels", lambda: True)
    for kernel in (flash_attention._kernel, fused_kernels._kernel):
        kernel.cache_clear()
    yield called
    for kernel in (flash_attention._kernel, fused_kernels._kernel):
        kernel.cache_clear()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_gradient_is_that_of_mlx(name: str, recompute: bool, emulated: list[str]) -> None:
    config = CONFIGS[name]
    weights = {key: x.astype(mx.bfloat16) for key, x in init_weights(config, mx.random.key(0)).items()}
    exact = {key: x.astype(mx.float32) for key, x in weights.items()}
    ours = gradients(config, weights, ROWS, recompute=recompute)
    used = list(emulated)
    expected = by_mlx(lambda w: completion_statistics(config, w, *ROWS), exact)
    assert ours[0].item() == pytest.approx(expected[0].item(), rel=5e-3)
    assert ours[2].keys() == expected[2].keys()
    for key, grad in expected[2].items():
        apart = mx.linalg.norm((ours[2][key].astype(mx.float32) - grad).flatten()) / mx.linalg.norm(grad.flatten())
        assert apart.item() < 3e-2, key  # type: ignore[operator]
    parts = "attend_rows", "query_gradient", "key_gradient", "turn_heads", "turn_heads_back", "row_sums", "gate_back"
    assert all(any(part in kernel for kernel in used) for part in parts)
