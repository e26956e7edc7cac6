"""What does a policy version cost on its way to a worker: whole, and as its change against one some steps before?

    python benchmarks/bench_versions.py [--million 25] [--steps 31]

A network of random weights is trained with AdamW on gradients that are random, with a part that stays, so that moments
and the signs of updates are like a run's. For each type of weights and learning rate the change against the first
version is made and applied after 1, 8 and `--steps` steps.

Prints one JSON line a case: `part`: bytes of the change over those of the whole. `make_mb_s`, `apply_mb_s`: megabytes
of weights a second, on this machine's processor. `digest_mb_s`: that a worker and the run spend on sums.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import troupe  # noqa: F401 - first: it loads OpenBLAS before MLX

import mlx.core as mx  # isort: skip

from troupe.cluster.blobs import digest_of
from troupe.cluster.deltas import applied, deltas
from troupe.grpo.optimizer import adamw_init, adamw_update_in_place
from troupe.policy import Weights
from troupe.policy.safetensors import safetensors_chunks

RATES = (1e-6, 1e-5, 2e-4)
ROWS = 1024


def network(million: float, dtype: mx.Dtype) -> Weights:
    """Matrices as a language model has them: most of them small normal numbers, and norms of ones."""
    columns = int(million * 1e6 / 8 / ROWS)
    weights = {f"layers.{i}.weight": (0.02 * mx.random.normal((ROWS, columns))).astype(dtype) for i in range(8)}
    weights |= {f"layers.{i}.norm.weight": mx.ones((ROWS,), dtype=dtype) for i in range(8)}
    mx.eval(weights)
    return weights


def gradients(weights: Weights, lasting: Weights) -> dict[str, mx.array]:
    """Random, with a lasting part of a third of their size."""
    return {
        name: (mx.random.normal(array.shape) + 0.3 * lasting[name]).astype(array.dtype) * 1e-3
        for name, array in weights.items()
    }


def measure(old: Weights, new: Weights, base: Path) -> dict[str, float]:
    """One change, made and applied; what it comes to must be the new version, bit by bit."""
    size = sum(array.nbytes for array in new.values())
    begun_s = time.perf_counter()
    data = b"".join(deltas(old, new))
    made_s = time.perf_counter()
    wanted = digest_of(safetensors_chunks(new))
    summed_s = time.perf_counter()
    change = base.with_suffix(".delta")
    change.write_bytes(data)
    begun_again_s = time.perf_counter()
    with change.open("rb") as file:
        pieces = list(applied(base, file))
    applied_s = time.perf_counter()
    assert digest_of(pieces) == wanted
    return {
        "part": round(len(data) / size, 4),
        "make_mb_s": round(size / 1e6 / (made_s - begun_s), 1),
        "digest_mb_s": round(size / 1e6 / (summed_s - made_s), 1),
        "apply_mb_s": round(size / 1e6 / (applied_s - begun_again_s), 1),
    }


def run(million: float, dtype: mx.Dtype, rate: float, steps: int, folder: Path) -> None:
    """All measurements of one type and learning rate."""
    mx.random.seed(0)
    first = network(million, dtype)
    base = folder / "base.safetensors"
    with base.open("wb") as file:
        file.writelines(safetensors_chunks(first))
    lasting = {name: mx.random.normal(array.shape) for name, array in first.items()}
    weights, state = dict(first), adamw_init(first)
    for step in range(1, steps + 1):
        adamw_update_in_place(weights, gradients(weights, lasting), state, lr=rate)
        if step in (1, 8, steps):
            mx.eval(weights)
            case = {"dtype": str(dtype).removeprefix("mlx.core."), "lr": rate, "steps": step}
            print(json.dumps(case | measure(first, dict(weights), base)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--million", type=float, default=25.0, help="parameters")
    parser.add_argument("--steps", type=int, default=31)
    options = parser.parse_args()
    mx.set_default_device(mx.cpu)
    print(json.dumps({"million": options.million, "processors": os.cpu_count()}))
    with tempfile.TemporaryDirectory() as folder:
        for dtype in (mx.bfloat16, mx.float32):
            for rate in RATES:
                run(options.million, dtype, rate, options.steps, Path(folder))


if __name__ == "__main__":
    main()
