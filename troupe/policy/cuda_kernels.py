"""Kernels of our own for one new token a row, on NVIDIA cards: a layer in ten launches instead of thirty.

A decoding step of a small model costs what its launches cost, not what it computes. MLX compiles the sources when they
are first used, once for each type and kind of head: numbers of rows and tokens are told when they run. Each kernel has
its plain twin in MLX's own operations (`qwen3.py`, `cache.py`, `drawing.py`), which serves every other device and is
what the tests compare with. Attention's are in `cuda_attention.py`. Knows nothing of requests, weights and caches.

Shapes: B rows. T is the type of the weights; sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import mlx.core as mx

THREADS = 256
"""Of a block, where nothing asks for another number."""

_GATE = """
    const size_t place = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const size_t wide = both_shape[1] / 2, row = place / wide, column = place % wide;
    if (row >= both_shape[0]) return;
    const float gate = float(both[row * 2 * wide + column]), up = float(both[row * 2 * wide + wide + column]);
    out[place] = T(gate / (1.f + __expf(-gate)) * up);
"""

_DRAW = """
    // One block a row, a stretch of the vocabulary a warp: largest and sum, then the id that the target lies in.
    const int row = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int V = logits_shape[1], stretch = (V + 31) / 32, first = warp * stretch, end = min(V, first + stretch);
    const T* mine = logits + size_t(row) * V;
    float most = -1e30f, sum = 0.f;
    for (int i = first + lane; i < end; i += 32) {
        const float x = float(mine[i]) * constants[0];
        if (x > most) { sum = sum * __expf(most - x) + 1.f; most = x; }
        else sum += __expf(x - most);
    }
    for (int far = 16; far > 0; far /= 2) {
        const float other = __shfl_xor_sync(0xffffffff, most, far), more = __shfl_xor_sync(0xffffffff, sum, far);
        const float both = fmaxf(most, other);
        sum = sum * __expf(most - both) + more * __expf(other - both);
        most = both;
    }
    __shared__ float mosts[32], sums[32];
    if (lane == 0) { mosts[warp] = most; sums[warp] = sum; }
    __syncthreads();
    float all = -1e30f, whole = 0.f;
    for (int g = 0; g < 32; g++) all = fmaxf(all, mosts[g]);
    for (int g = 0; g < 32; g++) whole += sums[g] * __expf(mosts[g] - all);
    const float target = fminf(uniforms[row], 0.99999994f) * whole;
    int chosen = -1, last = 0;
    float before = 0.f, begun = 0.f;
    for (int g = 0; g < 32; g++) {
        const float share = sums[g] * __expf(mosts[g] - all);
        if (share > 0.f) { last = g; begun = before; }
        before += share;
        if (share > 0.f && before > target) { chosen = g; break; }
    }
    if (chosen < 0) chosen = last;  // rounding
    if (warp != chosen) return;
    float running = begun, found_x = 0.f;
    int found = -1;
    for (int base = first; base < end; base += 32) {
        const int i = base + lane;
        const float x = i < end ? float(mine[i]) * constants[0] : -1e30f;
        const float share = i < end ? __expf(x - all) : 0.f;
        float upto = share;
        for (int far = 1; far < 32; far *= 2) {
            const float left = __shfl_up_sync(0xffffffff, upto, far);
            if (lane >= far) upto += left;
        }
        const unsigned there = __ballot_sync(0xffffffff, share > 0.f);
        const unsigned past = __ballot_sync(0xffffffff, share > 0.f && running + upto > target);
        if (there) {  // should rounding leave nobody past the target: the last who has a share
            const int who = past ? __ffs(past) - 1 : 31 - __clz(there);
            found = base + who;
            found_x = __shfl_sync(0xffffffff, x, who);
        }
        if (past) break;
        running += __shfl_sync(0xffffffff, upto, 31);
    }
    if (lane == 0) {
        ids[row] = unsigned(max(found, 0));  // below 0 where a logit is NaN
        log_probs[row] = found_x - all - logf(whole);
    }
"""


@cache
def kernel(name: str, inputs: Sequence[str], outputs: Sequence[str], source: str) -> Any:
    """A kernel of this source, compiled when it is first used; names as tuples, since all of it is remembered."""
    return mx.fast.cuda_kernel(name=f"troupe_{name}", input_names=inputs, output_names=outputs, source=source)


def are_here() -> bool:
    """Whether these kernels can be used: MLX computes on an NVIDIA card."""
    return mx.cuda.is_available() and mx.default_device() == mx.Device(mx.gpu)


def draw(logits: mx.array, uniforms: mx.array, temperature: float) -> tuple[mx.array, mx.array]:
    """Logits (B, V), uniforms (B,) in [0, 1) → ids (B,) of softmax(logits / temperature) by its inverse distribution
    function, and their log-probs in nats."""
    B = logits.shape[0]
    ids, log_probs = kernel("draw", ("logits", "uniforms", "constants"), ("ids", "log_probs"), _DRAW)(
        inputs=[logits, uniforms, mx.array([1.0 / temperature])],
        template=[("T", logits.dtype)],
        grid=(B * 1024, 1, 1),
        threadgroup=(1024, 1, 1),
        output_shapes=[(B,), (B,)],
        output_dtypes=[mx.uint32, mx.float32],
    )
    return ids, log_probs


def gate(both: mx.array) -> mx.array:
    """Gate beside up (B, 2·F) → gate · σ(gate) · up (B, F)."""
    B, F = both.shape[0], both.shape[1] // 2
    gated: mx.array
    (gated,) = kernel("gate", ("both",), ("out",), _GATE)(
        inputs=[both],
        template=[("T", both.dtype)],
        grid=(-(-B * F // THREADS) * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(B, F)],
        output_dtypes=[both.dtype],
    )
    return gated
