r"""How many tokens a second does the engine decode, over what mlx-lm's batch generator does on the same work?

    python -m benchmarks.bench_vs_mlx_lm --mlx-lm-python mlxlm/bin/python [--stop-ids 32] [--steps 5] [--threads 1]

mlx-lm lives in an interpreter of its own (python -m venv mlxlm && mlxlm/bin/pip install "mlx[cpu]" mlx-lm). Both sides
load one folder of random weights and decode the same prompts, round by round in turn, so that whatever else the
machine does meets both; the first round of each is not counted. What they draw differs, and with `--stop-ids` how many
tokens; so each round counts as tokens a second. mlx-lm gives ids alone, ours their log-probabilities too. `--threads`
limits OpenBLAS on both sides. Prints one JSON line: medians, and the median of the rounds' ratios, ours over theirs;
`per_cpu_s` counts seconds of processor time, of all threads, instead of the clock's, which says more on a busy machine
(with `--threads 1`: other BLAS threads spin while they wait).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import troupe  # first: it loads OpenBLAS before MLX
from benchmarks.bench_generation import arguments, policy_of
from troupe import linux_cpu
from troupe.policy import GenerationConfig, RolloutEngine, RolloutRequest, parameter_count
from troupe.policy.folders import save_model_folder

import mlx.core as mx  # isort: skip

THEIRS = Path(__file__).parent / "vs_mlx_lm_theirs.py"


def draw_rounds(args: argparse.Namespace, vocabulary: int) -> list[list[list[int]]]:
    """Prompts of `--steps` + 1 rounds."""
    dice = random.Random(0)
    return [
        [[dice.randrange(vocabulary) for _ in range(args.prompt_tokens)] for _ in range(args.prompts)]
        for _ in range(args.steps + 1)
    ]


def run_ours(engine: RolloutEngine, prompts: list[list[int]], step: int) -> dict[str, float]:
    """One round of the engine: `tokens`, `seconds` and `cpu_s`, of all threads."""
    requests = [RolloutRequest(prompt_ids=tuple(ids), key=(0, step, i)) for i, ids in enumerate(prompts)]
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    groups = list(engine.decode(requests))
    took = {"seconds": time.perf_counter() - start_s, "cpu_s": time.process_time() - start_cpu_s}
    tokens = sum(len(completion.token_ids) for group in groups for completion in group.completions)
    return {"tokens": tokens, **took}


def ask(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line of their side."""
    answers: IO[str] | None = process.stdout
    assert answers is not None
    if not (line := answers.readline()):
        raise SystemExit(f"mlx-lm's side ended with exit status {process.wait()}; see its messages above")
    return dict(json.loads(line))


def summarize(rounds_of: dict[str, list[dict[str, float]]], unit: str) -> dict[str, Any]:
    """Tokens for each of `unit`: medians of both sides, and of the rounds' ratios, ours over theirs."""
    rates = {side: [each["tokens"] / each[unit] for each in rounds] for side, rounds in rounds_of.items()}
    ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates["theirs"], strict=True)]
    return {
        **{side: round(statistics.median(values), 1) for side, values in rates.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Rounds of both in turn → the JSON line."""
    policy = policy_of(args)
    rounds = draw_rounds(args, policy.config.vocab_size)
    stop_ids = range(1000, 1000 + args.stop_ids)
    generation = GenerationConfig(num_generations=args.group, max_completion_length=args.new_tokens)
    engine = RolloutEngine(policy.config, generation, stop_ids=frozenset(stop_ids))
    engine.load(policy.weights, 0)
    rounds_of: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as folder, linux_cpu.blas_limited(args.threads):
        save_model_folder(folder, policy.config, policy.weights)
        job = {
            "rounds": [[ids for ids in prompts for _ in range(args.group)] for prompts in rounds],
            "new_tokens": args.new_tokens,
            "stop_ids": list(stop_ids),
            "temperature": 1.0,
        }
        (Path(folder) / "job.json").write_text(json.dumps(job))
        threads = {} if args.threads is None else {"OPENBLAS_NUM_THREADS": str(args.threads)}
        with subprocess.Popen(
            [args.mlx_lm_python, str(THEIRS), folder, str(Path(folder) / "job.json")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | threads,
        ) as process:
            versions = ask(process)["versions"]
            assert process.stdin is not None
            for step, prompts in enumerate(rounds):
                ours = run_ours(engine, prompts, step)
                print("go", file=process.stdin, flush=True)
                theirs = ask(process)
                if step:
                    rounds_of["ours"].append(ours)
                    rounds_of["theirs"].append(theirs)
            process.stdin.close()
    return {
        "benchmark": "vs_mlx_lm",
        "parameters": parameter_count(policy.config),
        **{name: value for name, value in vars(args).items() if name != "mlx_lm_python"},
        "tokens_per_s": summarize(rounds_of, "seconds"),
        "per_cpu_s": summarize(rounds_of, "cpu_s"),
        "load": round(os.getloadavg()[0], 2),
        "theirs": versions,
        "device": str(mx.default_device()),
        "machine": platform.platform(),
        "mlx": version("mlx"),
        "troupe": troupe.__version__,
    }


def main() -> None:
    """Compare once and print the line."""
    parser = arguments(__doc__)
    parser.add_argument("--mlx-lm-python", required=True, help="an interpreter that has mlx-lm")
    parser.add_argument("--threads", type=int, help="OpenBLAS threads on both sides (default: as many as it takes)")
    print(json.dumps(compare(parser.parse_args())))


if __name__ == "__main__":
    main()
