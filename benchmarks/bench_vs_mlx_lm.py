r"""How many tokens a second does the engine decode, over what mlx-lm's batch generator does on the same work?

    python -m benchmarks.bench_vs_mlx_lm --mlx-lm-python mlxlm/bin/python [--stop-ids 32] [--steps 5] [--threads 1]
        [--processes 2]

mlx-lm lives in an interpreter of its own (python -m venv mlxlm && mlxlm/bin/pip install "mlx[cpu]" mlx-lm). Both sides
load one folder of random weights and decode the same prompts, round by round in turn, so that whatever else the
machine does meets both; the first round of each is not counted. What they draw differs, and with `--stop-ids` how many
tokens; so each round counts as tokens a second. mlx-lm gives ids alone, ours their log-probabilities too. `--threads`
limits OpenBLAS on both sides. `--processes` of ours share the prompts, each with one thread of OpenBLAS, as a run of
light weights has one a core. Rounds of processes are timed from here, until the last has ended. Prints one JSON line:
medians, and the median of the rounds' ratios, ours over theirs;
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
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import troupe  # first: it loads OpenBLAS before MLX
from benchmarks.bench_generation import arguments, policy_of
from troupe.policy import GenerationConfig, NetworkConfig, RolloutEngine, RolloutRequest, Weights, parameter_count
from troupe.policy.folders import save_model_folder
from troupe.runtime import linux_cpu

import mlx.core as mx  # isort: skip

THEIRS = Path(__file__).parent / "vs_mlx_lm_theirs.py"


def draw_rounds(args: argparse.Namespace, vocabulary: int) -> list[list[list[int]]]:
    """Prompts of `--steps` + 1 rounds."""
    dice = random.Random(0)
    return [
        [[dice.randrange(vocabulary) for _ in range(args.prompt_tokens)] for _ in range(args.prompts)]
        for _ in range(args.steps + 1)
    ]


def engine_of(config: NetworkConfig, weights: Weights, job: dict[str, Any]) -> RolloutEngine:
    """What decodes our side's part of the job."""
    generation = GenerationConfig(num_generations=job["group"], max_completion_length=job["new_tokens"])
    engine = RolloutEngine(config, generation, stop_ids=frozenset(job["stop_ids"]))
    engine.load(weights, 0)
    return engine


def run_ours(engine: RolloutEngine, prompts: Mapping[int, list[int]], step: int) -> dict[str, float]:
    """One round of the engine, of the prompts at these places: `tokens`, `seconds` and `cpu_s`, of all threads."""
    requests = [RolloutRequest(prompt_ids=tuple(ids), key=(0, step, i)) for i, ids in prompts.items()]
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    groups = list(engine.decode(requests))
    took = {"seconds": time.perf_counter() - start_s, "cpu_s": time.process_time() - start_cpu_s}
    tokens = sum(len(completion.token_ids) for group in groups for completion in group.completions)
    return {"tokens": tokens, **took}


class Process:
    """A process that does rounds. Use as a context manager."""

    def __init__(self, *command: str, **environment: str) -> None:
        self._name = " ".join(command[:3])
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
        )

    def __enter__(self) -> Process:
        self.versions = self.answer()["versions"]
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:  # closes its stdin, by which it ends
            pass

    def begin(self) -> None:
        """Let it do the next round."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which its answer tells
            print("go", file=self._process.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        """Wait for its next line."""
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise SystemExit(f"{self._name} ended with exit status {self._process.wait()}; see its messages above")
        return dict(json.loads(line))


def run_together(processes: list[Process]) -> dict[str, float]:
    """One round of several processes that share it."""
    start_s = time.perf_counter()
    for process in processes:
        process.begin()
    answers = [process.answer() for process in processes]
    sums = {name: sum(answer[name] for answer in answers) for name in ("tokens", "cpu_s")}
    return {**sums, "seconds": time.perf_counter() - start_s}


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
    job = {
        "rounds": [[ids for ids in prompts for _ in range(args.group)] for prompts in rounds],
        "group": args.group,
        "new_tokens": args.new_tokens,
        "stop_ids": list(range(1000, 1000 + args.stop_ids)),
        "temperature": 1.0,
    }
    rounds_of: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    threads = {} if args.threads is None else {"OPENBLAS_NUM_THREADS": str(args.threads)}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(linux_cpu.blas_limited(args.threads))
        save_model_folder(folder, policy.config, policy.weights)
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(job))
        theirs = stack.enter_context(Process(args.mlx_lm_python, str(THEIRS), folder, str(file), **threads))
        command = [sys.executable, "-m", "benchmarks.vs_mlx_lm_ours", folder, str(file)]
        several = range(args.processes if args.processes > 1 else 0)
        ours = [stack.enter_context(Process(*command, str(i), str(args.processes))) for i in several]
        engine = engine_of(policy.config, policy.weights, job)
        for step, prompts in enumerate(rounds):
            mine = run_together(ours) if ours else run_ours(engine, dict(enumerate(prompts)), step)
            others = run_together([theirs])
            if step:
                rounds_of["ours"].append(mine)
                rounds_of["theirs"].append(others)
    return {
        "benchmark": "vs_mlx_lm",
        "parameters": parameter_count(policy.config),
        **{name: value for name, value in vars(args).items() if name != "mlx_lm_python"},
        "tokens_per_s": summarize(rounds_of, "seconds"),
        "per_cpu_s": summarize(rounds_of, "cpu_s"),
        "load": round(os.getloadavg()[0], 2),
        "theirs": theirs.versions,
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
    parser.add_argument("--processes", type=int, default=1, help="of our side (default: 1)")
    args = parser.parse_args()
    if not 1 <= args.processes <= args.prompts:
        parser.error(f"--processes is {args.processes}; each needs a prompt of the {args.prompts}")
    print(json.dumps(compare(args)))


if __name__ == "__main__":
    main()
