"""One of several processes of our side of `bench_vs_mlx_lm.py`, which decodes its part of the prompts.

    python -m benchmarks.vs_mlx_lm_ours MODEL_FOLDER JOB.json FIRST EVERY

As the generators of a run do: an engine and one thread of OpenBLAS each. Of each round's prompts, each `group` times
there, it takes every `EVERY`th from `FIRST` on. Otherwise as `vs_mlx_lm_theirs.py`.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import troupe  # noqa: F401 - first: it loads OpenBLAS before MLX
from benchmarks.bench_vs_mlx_lm import engine_of, run_ours
from troupe.policy.folders import read_model_folder
from troupe.runtime import linux_cpu


def main(folder: str, job_file: str, first: str, every: str) -> None:
    """Load, then decode whenever asked to."""
    job = json.loads(Path(job_file).read_text())
    with linux_cpu.blas_limited(1):
        engine = engine_of(*read_model_folder(folder), job)
        print(json.dumps({"versions": {"mlx": version("mlx")}}), flush=True)
        for step, (prompts, _) in enumerate(zip(job["rounds"], sys.stdin, strict=False)):
            distinct = prompts[:: job["group"]]
            places = range(int(first), len(distinct), int(every))
            print(json.dumps(run_ours(engine, {place: distinct[place] for place in places}, step)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
