"""Attention of a decoding step as NVIDIA cards compute it, its very source on a processor, against the formula."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from tests.support.emulated_cuda import EmulatedKernel
from troupe.policy.decode import cuda_kernels

pytestmark = pytest.mark.slow  # each kind of head is compiled

EPSILON = 1e-6


class Case(NamedTuple):
    """Prompts of these lengths, rows of each, own tokens before the new one; heads and numbers of a head."""

    lengths: tuple[int, ...]
    width: int
    own: int
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    norms: bool = True
    wide_norms: bool = False  # what they multiply by is float32, whatever the rest
    window: int | None = None
    splits: int = 1
    together: int = 0  # 0: as planned


CASES = [
    Case((5, 37), 3, 0),
    Case((140, 17), 8, 21, head_dim=128),
    Case((33,), 9, 40, norms=False),
    Case((20, 3), 2, 35, heads=6, kv_heads=1),
    Case((50,), 1, 70, heads=1, kv_heads=1),
    Case((40,), 18, 5, heads=2, kv_heads=2),
    Case((30, 18), 4, 12, head_dim=256),
    Case((60, 25), 3, 30, window=20),
    Case((60, 25), 3, 8, window=17),
    Case((300, 90), 2, 60, splits=3),
    Case((25, 6), 2, 9, wide_norms=True),
    Case((140, 17), 8, 21, together=8),
    Case((33,), 9, 40, together=5, norms=False),
]


def exact(case: Case, given: dict[str, mx.array]) -> np.ndarray:
    """In float64, from the same 16-bit numbers: (B, H·d)."""
    numbers = {name: np.array(x.astype(mx.float32), np.float64) for name, x in given.items()}
    H, K, d = case.heads, case.kv_heads, case.head_dim
    rows = []
    for row, heads in enumerate(numbers["qkv"].reshape(-1, H + 2 * K, d)):
        slot = row // case.width
        turned = heads[: H + K]
        if case.norms:
            turned = turned / np.sqrt(np.mean(turned**2, axis=-1, keepdims=True) + EPSILON) * numbers["scales"]
        cosine, sine, low, high = numbers["cosines"][slot], numbers["sines"][slot], *np.split(turned, 2, axis=-1)
        turned = np.concatenate([low * cosine - high * sine, high * cosine + low * sine], axis=-1)
        length = case.lengths[slot]
        for head in range(H):
            k = head // (H // K)
            own_keys, own_values = numbers["own"][row, k, : case.own], numbers["own"][row, K + k, : case.own]
            keys = np.concatenate([numbers["prompt_keys"][slot, k, :length], own_keys, turned[H + k][None]])
            values = np.concatenate([numbers["prompt_values"][slot, k, :length], own_values, heads[H + K + k][None]])
            if case.window is not None:
                keys, values = keys[-case.window :], values[-case.window :]
            scores = keys @ turned[head] * d**-0.5
            powers = np.exp(scores - scores.max())
            rows.append(powers @ values / powers.sum())
    return np.array(rows).reshape(len(numbers["qkv"]), -1)


def arrays(case: Case, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Random; what nobody may read is not a number."""
    S, B, d = len(case.lengths), len(case.lengths) * case.width, case.head_dim
    P, N = max(case.lengths), -(-(case.own + 1) // 16) * 16
    shapes = {
        "qkv": (B, (case.heads + 2 * case.kv_heads) * d),
        "scales": (case.heads + case.kv_heads, d),
        "prompt_keys": (S, case.kv_heads, P, d),
        "prompt_values": (S, case.kv_heads, P, d),
        "own": (B, 2 * case.kv_heads, N, d),
    }
    made = {name: mx.random.normal(shape).astype(dtype) for name, shape in shapes.items()}
    if case.wide_norms:
        made["scales"] = made["scales"].astype(mx.float32) + 1.0
    angles = mx.random.uniform(0, 6, (S, d // 2))
    made |= {"cosines": mx.cos(angles), "sines": mx.sin(angles)}
    made["own"] = mx.where(mx.arange(N)[:, None] < case.own, made["own"], mx.nan).astype(dtype)
    seen = mx.arange(P)[:, None] < mx.array(case.lengths)[:, None, None, None]
    for name in ("prompt_keys", "prompt_values"):
        made[name] = mx.where(seen, made[name], mx.nan).astype(dtype)
    mx.eval(made)
    return made


def attend(case: Case, given: dict[str, mx.array]) -> mx.array:
    rows, dtype = given["qkv"].shape[0], given["qkv"].dtype
    heads = case.heads, case.kv_heads, case.head_dim
    plan = cuda_kernels.plan_launch(rows, case.width, *heads, dtype, max(case.lengths) + case.own)
    if case.together:
        items = len(case.lengths) * case.kv_heads * -(-case.width // case.together)
        plan = plan._replace(together=case.together, grid=(plan.block[0] * items, 1, 1))
    if case.splits > 1:
        plan = plan._replace(grid=(plan.grid[0], case.splits, 1), splits=case.splits)
    return cuda_kernels.attend(
        given["qkv"],
        given["scales"] if case.norms else None,
        (given["cosines"], given["sines"]),
        (given["prompt_keys"], given["prompt_values"]),
        given["own"],
        mx.array(case.lengths, mx.int32),
        mx.array([case.own], mx.int32),
        mx.array([EPSILON, case.head_dim**-0.5, plan.together]),
        plan=plan,
        window=case.window,
    )


@pytest.mark.parametrize(("case", "dtype"), [*((case, mx.bfloat16) for case in CASES), (CASES[1], mx.float16)])
def test_what_a_card_computes_is_the_formula(case: Case, dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_kernels.kernel.cache_clear()
    monkeypatch.setattr(mx.fast, "cuda_kernel", EmulatedKernel)
    monkeypatch.setattr(cuda_kernels, "have_matrix_units", lambda: True)
    monkeypatch.setattr(cuda_kernels, "shared_memory_limit", lambda: 227 * 1024)
    mx.random.seed(1)
    given = arrays(case, dtype)
    expected = exact(case, given)
    found = attend(case, given)
    apart = np.abs(np.array(found.astype(mx.float32)) - expected).max()
    assert apart < (2e-2 if dtype == mx.bfloat16 else 3e-3)
    written = np.array(given["own"][:, :, case.own].astype(mx.float32))
    values = np.array(given["qkv"].astype(mx.float32)).reshape(len(expected), -1, case.head_dim)[:, -case.kv_heads :]
    np.testing.assert_array_equal(written[:, case.kv_heads :], values)
    monkeypatch.setenv("EMULATED_SEED", "5")
    assert mx.array_equal(found, attend(case, given)).item(), "the same bits in another order of warps and blocks"
    cuda_kernels.kernel.cache_clear()
