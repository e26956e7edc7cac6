"""What does the attention of one new token a row take on an NVIDIA card, by the matrix units and by sums?

    python -m benchmarks.bench_attention

Calls the kernels of `cuda_kernels.py` as a decoding step does, fourteen layers twice in a row with arrays of their own,
so that with many rows none is found in the card's cache. Prints one JSON line a shape: microseconds a layer, median of
seven rounds, in which the host's calls count, made before anything is launched; what moving the bytes would take at
3 TB/s; and how far the two results lie apart.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from importlib.metadata import version
from typing import Any, NamedTuple

import troupe  # first: it loads OpenBLAS before MLX
from troupe.policy.decode import cuda_kernels

import mlx.core as mx  # isort: skip

LAYERS, ROUNDS = 14, 7
BYTES_A_MICROSECOND = 3.0e6


class Shape(NamedTuple):
    """Rows, their prompts, tokens of a prompt and of a row so far, heads, and numbers of a head."""

    rows: int
    prompts: int
    prompt_tokens: int
    own_tokens: int
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128


SHAPES = [
    *(Shape(256, 32, 128, own) for own in (32, 128, 255)),
    Shape(256, 32, 1024, 128),
    Shape(256, 32, 128, 128, heads=32),
    Shape(32, 4, 4096, 64),
    Shape(32, 4, 128, 64),
    Shape(1, 1, 128, 10),
]


def layers_of(shape: Shape, dtype: mx.Dtype) -> list[Any]:
    """What `attend` takes for each layer, random, but for lengths, step and constants."""
    B, S, P, n, H, K, d = shape

    def random(*size: int, dtype: mx.Dtype = dtype) -> mx.array:
        return mx.random.normal(size).astype(dtype)

    room = -(-(n + 1) // 64) * 64
    made = [
        (
            random(B, (H + 2 * K) * d),
            random(H + K, d),
            (random(S, d // 2, dtype=mx.float32), random(S, d // 2, dtype=mx.float32)),
            (random(S, K, P, d), random(S, K, P, d)),
            random(B, 2 * K, room, d),
        )
        for _ in range(LAYERS)
    ]
    mx.eval(made)
    return made


def measure(shape: Shape, dtype: mx.Dtype) -> dict[str, Any]:
    """One shape → its line."""
    B, S, P, n, H, K, d = shape
    layers = layers_of(shape, dtype)
    lengths, step = mx.array([P] * S, mx.int32), mx.array([n], mx.int32)
    by_units = cuda_kernels.plan_launch(B, B // S, H, K, d, dtype, P + n)
    by_sums = cuda_kernels.plan_launch(B, B // S, H, K, d, mx.float32, P + n)

    def attend(plan: cuda_kernels.Launch) -> list[mx.array]:
        constants = mx.array([1e-6, d**-0.5, plan.together])
        return [
            cuda_kernels.attend(qkv, scales, turn, prompts, own, lengths, step, constants, plan=plan)
            for qkv, scales, turn, prompts, own in layers
        ]

    def microseconds(plan: cuda_kernels.Launch) -> float:
        mx.synchronize()
        start_s = time.perf_counter()
        mx.eval(attend(plan), attend(plan))
        return (time.perf_counter() - start_s) / (2 * LAYERS) * 1e6

    plain, ours = attend(by_sums), attend(by_units)
    apart = [mx.max(mx.abs(a.astype(mx.float32) - b.astype(mx.float32))) for a, b in zip(plain, ours, strict=True)]
    largest = max(apart, key=lambda x: float(x.item()))  # type: ignore[arg-type]
    moved = 2 * d * dtype.size * K * (S * P + B * n)
    return {
        "benchmark": "attention",
        **shape._asdict(),
        "dtype": str(dtype).removeprefix("mlx.core."),
        "sums_us": round(statistics.median(microseconds(by_sums) for _ in range(ROUNDS)), 1),
        "units_us": round(statistics.median(microseconds(by_units) for _ in range(ROUNDS)), 1),
        "bytes_us": round(moved / BYTES_A_MICROSECOND, 1),
        "largest_difference": float(largest.item()),  # type: ignore[arg-type]
        "machine": platform.platform(),
        "mlx": version("mlx"),
        "troupe": troupe.__version__,
    }


def main() -> None:
    """Measure every shape and print the lines."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not cuda_kernels.are_available():
        sys.exit("MLX has no NVIDIA card here")
    for shape in SHAPES:
        print(json.dumps(measure(shape, mx.bfloat16)), flush=True)


if __name__ == "__main__":
    main()
