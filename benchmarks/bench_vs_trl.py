"""Does GRPO here learn what it learns in TRL, and in what share of the time? The demo's policy and sums, on both.

    python benchmarks/bench_vs_trl.py --trl-python trl/bin/python [--seeds 0 1 2] [--steps 100] [--out curves.json]

Each seed trains both sides, one after the other, each in a process of its own, from the same weights, on the same
prompts in the same order, with the same settings and numbers of threads; they differ in their random numbers and in
how they compute. Neither evaluates or writes checkpoints while it trains. TRL generates with transformers, the best it
has on a CPU, and gets what was found faster for it: no gradient checkpointing (its default is on), one thread (of two,
10 % slower on two idle cores, OpenMP spins and stands still where anything else runs). Keep MLX on the CPU too (a
machine with neither Metal nor CUDA), or devices are compared.

Curves agree where the mean rewards over the seeds, in every window of `--window` steps and over all steps, differ by no
more than three standard errors, s·√(2/n), with n seeds and s the standard deviation between the seeds of a side,
pooled over both sides: that of the window, or that of all windows where it is larger (of few seeds, some window always
has too small a one). Tried on 16 runs: two sets of three drawn from all of them are told apart in 9 % of the draws;
half the learning rate was in three comparisons of three, three quarters of it in one.

The threshold is reached at the first step whose trailing mean over a window is at least `--threshold`. Its time counts
from the start of the first step, and with start-up from the start of the process, imports and loading included. Ratios
are TRL's time over ours, by seed; medians over the seeds are printed. Where curves agree, `step_s` is the one to trust:
that of the threshold has the luck in it of how early each run crosses.

Prints a table to stderr and one JSON line to stdout; exits with 1 where curves do not agree, or a side does not reach
the threshold.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

import troupe
from troupe.cli.demo import DEMO_CONFIG
from troupe.dataset import PromptDataset
from troupe.policy import Tokenizer
from troupe.run.config import config_table, write_config

HERE = Path(__file__).parent
SIDES = ("troupe", "trl")
STANDARD_ERRORS = 3.0
INSTALL = "python -m venv trl && trl/bin/pip install torch==2.13.0 trl==1.16.0"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One training of one side; seconds."""

    side: str
    seed: int
    rewards: list[float]
    """Mean reward of each step's completions."""
    times_s: list[float]
    """When each step ended, from the start of the first."""
    startup_s: float
    """From the start of the process to the start of the first step."""
    process_s: float
    """The whole life of the process."""
    cores: float
    """CPU seconds over seconds of the process."""
    metrics: list[dict[str, Any]]
    versions: dict[str, str]
    device: str


class Window(NamedTuple):
    """A stretch of steps on both sides: means and standard deviations over the seeds."""

    first: int
    """Number of the first step, from 1."""
    ours: float
    ours_sd: float
    theirs: float
    theirs_sd: float
    limit: float
    """The most that the two means may differ by."""

    @property
    def excess(self) -> float:
        """How much they differ, in limits."""
        return abs(self.ours - self.theirs) / self.limit


def compare(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], size: int) -> list[Window]:
    """Compares curves (seeds, steps) by windows of `size` steps; a shorter rest counts with the last one.

    At least two seeds. The limits are those of the module's docstring.
    """
    steps, seeds = len(ours[0]), len(ours)
    starts = list(range(0, max(1, steps - size + 1), size))
    noisy = []
    for start, end in zip(starts, [*starts[1:], steps], strict=True):
        our_means, their_means = ([statistics.fmean(curve[start:end]) for curve in side] for side in (ours, theirs))
        noisy.append(
            Window(
                first=start + 1,
                ours=statistics.fmean(our_means),
                ours_sd=statistics.stdev(our_means),
                theirs=statistics.fmean(their_means),
                theirs_sd=statistics.stdev(their_means),
                limit=STANDARD_ERRORS
                * math.sqrt((statistics.variance(our_means) + statistics.variance(their_means)) / seeds),
            )
        )
    pooled = math.sqrt(statistics.fmean(window.limit**2 for window in noisy))
    return [window._replace(limit=max(window.limit, pooled)) for window in noisy]


def first_reaching(rewards: Sequence[float], threshold: float, window: int) -> int | None:
    """The number, from 1, of the first step whose mean over it and the `window` − 1 before is at least `threshold`."""
    for end in range(window, len(rewards) + 1):
        if statistics.fmean(rewards[end - window : end]) >= threshold:
            return end
    return None


def trl_settings(config: troupe.RunConfig) -> dict[str, Any]:
    """What GRPOConfig is given for a run of ours; the names are TRL's where they are the same."""
    learner, generation = config.learner, config.generation
    same_learner = ("num_iterations", "loss_type", "beta", "epsilon", "epsilon_high", "delta", "scale_rewards")
    same_optimizer = ("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm", "max_steps")
    same_generation = ("num_generations", "max_completion_length", "temperature", "top_p")
    return {
        **{name: getattr(learner, name) for name in same_learner + same_optimizer},
        **{name: getattr(generation, name) for name in same_generation},
        "per_device_train_batch_size": learner.batch_size * generation.num_generations,  # TRL counts completions
        "learning_rate": learner.lr,
        "lr_scheduler_type": learner.lr_scheduler,
        "seed": config.seed,
    }


def prepare(folder: Path, seed: int, args: argparse.Namespace) -> dict[str, list[str]]:
    """Write what the two sides read into a folder; their command lines, without the result file."""
    demo = troupe.load_config(DEMO_CONFIG)
    assert demo.model.path
    assert demo.data.path
    batch_size = demo.learner.batch_size
    dataset = PromptDataset.from_json(demo.data.path)
    tokenizer = Tokenizer.from_pretrained(demo.model.path)
    rows: list[dict[str, Any]] = []
    for epoch in range(math.ceil(args.steps * batch_size / len(dataset))):
        rows += [{"prompt": dataset[i].prompt, **dataset[i].columns} for i in dataset.order(seed, epoch)]
    rows = rows[: args.steps * batch_size]
    (folder / "prompts.json").write_text(json.dumps(rows), encoding="utf-8")
    table = config_table(demo) | {"seed": seed, "output": str(folder / "run")}
    del table["data"]["eval_path"]
    table["data"] |= {"path": str(folder / "prompts.json"), "shuffle": False}
    table["learner"] |= {"max_steps": args.steps, "vllm_importance_sampling_correction": False}
    table["checkpoint"]["every"] = args.steps
    table["metrics"]["sinks"] = ["jsonl"]
    config = troupe.load_config(None, [table])
    write_config(config, folder / "run.toml")
    job = {
        "model": demo.model.path,
        "rows": [row | {"prompt_ids": tokenizer.encode(row["prompt"])} for row in rows],
        "threads": args.threads,
        "reward": "exact_answer",
        "settings": trl_settings(config) | {"gradient_checkpointing": args.trl_checkpointing},
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    return {
        "troupe": [sys.executable, str(HERE / "vs_trl_ours.py"), str(folder / "run.toml")],
        "trl": [args.trl_python, str(HERE / "vs_trl_theirs.py"), str(folder / "job.json")],
    }


def train(side: str, seed: int, args: argparse.Namespace) -> Run:
    """One run in a process of its own; RuntimeError with what it wrote where it fails."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [*prepare(folder, seed, args)[side], str(folder / "result.json")]
        environment = dict.fromkeys(THREAD_VARIABLES, str(args.threads)) | {"HF_HUB_OFFLINE": "1"}
        before, started_s = os.times(), time.monotonic()
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
        process_s, after = time.monotonic() - started_s, os.times()
        if done.returncode:
            raise RuntimeError(f"{side}, seed {seed}, ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(
        side=side,
        seed=seed,
        rewards=[float(metrics["reward"]) for metrics in result["metrics"]],
        times_s=[ended_s - result["origin_s"] for ended_s in result["ended_s"]],
        startup_s=result["origin_s"] - started_s,
        process_s=process_s,
        cores=cpu_s / process_s,
        metrics=result["metrics"],
        versions=result["versions"],
        device=result["device"],
    )


def measure(args: argparse.Namespace) -> dict[str, list[Run]]:
    """Every seed on both sides, which take turns in going first."""
    runs: dict[str, list[Run]] = {side: [] for side in SIDES}
    for turn, seed in enumerate(args.seeds):
        for side in SIDES if turn % 2 == 0 else reversed(SIDES):
            run = train(side, seed, args)
            runs[side].append(run)
            print(f"{side} seed {seed}: {run.times_s[-1]:.1f} s, start-up {run.startup_s:.1f} s", file=sys.stderr)
    return runs


def times(runs: Sequence[Run], args: argparse.Namespace) -> dict[str, list[float | None]]:
    """By seed: steps and seconds to the threshold (None where it is not reached), and the figures of a step."""
    steps = [first_reaching(run.rewards, args.threshold, args.window) for run in runs]
    reached = [run.times_s[step - 1] if step else None for run, step in zip(runs, steps, strict=True)]
    return {
        "steps_to_threshold": list(steps),
        "threshold_s": reached,
        "threshold_with_startup_s": [
            None if at_s is None else at_s + run.startup_s for run, at_s in zip(runs, reached, strict=True)
        ],
        "step_s": [
            statistics.median(b - a for a, b in zip(run.times_s, run.times_s[1:], strict=False)) for run in runs
        ],
        "process_s": [run.process_s for run in runs],
        "cores": [run.cores for run in runs],
    }


def median(values: Sequence[float | None]) -> float | None:
    """None where one of them is."""
    known = [value for value in values if value is not None]
    return round(statistics.median(known), 3) if len(known) == len(values) else None


def summarize(runs: dict[str, list[Run]], args: argparse.Namespace) -> dict[str, Any]:
    """The figures of the JSON line."""
    curves = {side: [run.rewards for run in runs[side]] for side in SIDES}
    by_window = compare(curves["troupe"], curves["trl"], args.window)
    (whole,) = compare(curves["troupe"], curves["trl"], args.steps)
    worst = max(window.excess for window in by_window)
    figures = {side: times(runs[side], args) for side in SIDES}
    ratios = {
        name: median([t / o if t and o else None for t, o in zip(figures["trl"][name], ours, strict=True)])
        for name, ours in figures["troupe"].items()
        if name.endswith("_s")
    }
    print_table(by_window)
    return {
        "curves_agree": worst <= 1 and whole.excess <= 1,
        "largest_window_difference_in_limits": round(worst, 3),
        "mean_reward": {"troupe": round(whole.ours, 4), "trl": round(whole.theirs, 4), "limit": round(whole.limit, 4)},
        **{side: {name: median(values) for name, values in figures[side].items()} for side in SIDES},
        "trl_over_troupe": ratios,
    }


def print_table(windows: Sequence[Window]) -> None:
    """Window by window, to stderr."""
    print(
        "reward: mean ± standard deviation over the seeds\nfrom step        troupe           trl",
        end="",
        file=sys.stderr,
    )
    print("   difference  limit", file=sys.stderr)
    for window in windows:
        ours, theirs = f"{window.ours:.3f} ± {window.ours_sd:.3f}", f"{window.theirs:.3f} ± {window.theirs_sd:.3f}"
        apart = window.ours - window.theirs
        print(f"{window.first:9} {ours:>13} {theirs:>13} {apart:12.3f} {window.limit:6.3f}", file=sys.stderr)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with 2 where it cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="an interpreter that has TRL; default: this one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--window", type=int, default=10, help="steps")
    parser.add_argument("--threshold", type=float, default=0.85, help="of the reward, over a window")
    parser.add_argument("--threads", type=int, default=1, help="of BLAS and OpenMP, for both")
    parser.add_argument(
        "--trl-checkpointing", action="store_true", help="TRL's default of gradient_checkpointing, which is slower"
    )
    parser.add_argument("--out", type=Path, help="write every run, with all metrics, to this file")
    args = parser.parse_args(arguments)
    if args.trl_python is None:
        if importlib.util.find_spec("trl") is None:
            parser.error(f"TRL is not installed here; give an interpreter that has it (--trl-python): {INSTALL}")
        args.trl_python = sys.executable
    if len(args.seeds) < 2:
        parser.error("--seeds has one number, but noise is measured between seeds; give at least two")
    if not 2 <= args.window <= args.steps:
        parser.error(f"--window is {args.window}, but must be at least 2 and at most --steps, {args.steps}")
    return args


def main() -> None:
    """Measure, print the line, and say by the exit code whether the curves agree and the threshold was reached."""
    args = parse(None)
    load = os.getloadavg()[0]
    runs = measure(args)
    figures = summarize(runs, args)
    if args.out:
        args.out.write_bytes(msgspec.json.encode(runs))
    line = {
        "benchmark": "vs_trl",
        **{name: value for name, value in vars(args).items() if name not in ("trl_python", "out")},
        **figures,
        "device": {side: runs[side][0].device for side in SIDES},
        "load_before": round(load, 2),
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": runs["troupe"][0].versions | runs["trl"][0].versions | {"python": platform.python_version()},
    }
    print(json.dumps(line))
    sys.exit(not (figures["curves_agree"] and figures["trl_over_troupe"]["threshold_s"]))


if __name__ == "__main__":
    main()
