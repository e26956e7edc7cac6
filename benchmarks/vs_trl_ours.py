"""Our side of `bench_vs_trl.py`: one run of the Supervisor, as a user would write it.

    python benchmarks/vs_trl_ours.py RUN.toml RESULT.json

The result: `origin_s`, when the run began, `ended_s`, when the update of each step came (both on the monotonic clock,
which all processes of a machine share), `metrics` of each step, `versions` and `device`.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anyio

import troupe  # first: it loads OpenBLAS before MLX

import mlx.core as mx  # isort: skip


async def run(config: troupe.RunConfig) -> dict[str, Any]:
    """Train as the config says."""
    ended_s: list[float] = []
    metrics: list[dict[str, float]] = []
    async with troupe.Supervisor(config) as supervisor:
        origin_s = time.monotonic()
        async for update in supervisor.updates():
            ended_s.append(time.monotonic())
            metrics.append(update.metrics)
    if len(metrics) != supervisor.result.total_steps:
        raise RuntimeError(f"{len(metrics)} updates of {supervisor.result.total_steps} steps came")
    return {
        "origin_s": origin_s,
        "ended_s": ended_s,
        "metrics": metrics,
        "versions": {"troupe": troupe.__version__, "mlx": version("mlx")},
        "device": mx.default_device().type.name,
    }


if __name__ == "__main__":
    result = anyio.run(run, troupe.load_config(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
