"""mlx-lm's side of `bench_vs_mlx_lm.py`: rounds of its batch generator, one for each line on stdin.

    python benchmarks/vs_mlx_lm_theirs.py MODEL_FOLDER JOB.json

Runs in an interpreter that has mlx-lm, and needs nothing of ours. The job: `rounds` (for each the prompts' ids, every
prompt as often as it is sampled), `new_tokens`, `stop_ids` and `temperature`. Prints a JSON line when it is ready,
`versions`, and one a round: `tokens`, `seconds` and `cpu_s`, of all its threads.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path


def main(folder: str, job_file: str) -> None:
    """Load, then generate whenever asked to."""
    with suppress(OSError):  # the same library that the other side computes with, loaded before MLX asks for its own
        ctypes.CDLL("libopenblas.so.0", ctypes.RTLD_GLOBAL)
    # Not imported by name: the type checker of the repository runs without them.
    generate, utils = importlib.import_module("mlx_lm.generate"), importlib.import_module("mlx_lm.utils")
    sampling = importlib.import_module("mlx_lm.sample_utils")
    job = json.loads(Path(job_file).read_text())
    model, _ = utils.load_model(Path(folder))
    sampler = sampling.make_sampler(job["temperature"])
    print(json.dumps({"versions": {name: version(name) for name in ("mlx", "mlx-lm")}}), flush=True)
    for prompts, _ in zip(job["rounds"], sys.stdin, strict=False):
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        rows = generate.BatchGenerator(
            model,
            stop_tokens=[[id_] for id_ in job["stop_ids"]],
            sampler=sampler,
            completion_batch_size=len(prompts),
            prefill_batch_size=len(prompts),
        )
        rows.insert(prompts, [job["new_tokens"]] * len(prompts))
        tokens = 0
        while answers := rows.next_generated():
            tokens += len(answers)
        rows.close()
        took = {"seconds": time.perf_counter() - start_s, "cpu_s": time.process_time() - start_cpu_s}
        print(json.dumps({"tokens": tokens, **took}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
