r"""How long does a whole GRPO step take, over what TRL and mlx-lm-lora take for the same work?

    python -m benchmarks.bench_vs_step --trl-python trl/bin/python --mlx-lm-lora-python lora/bin/python \
        [--prompts 4 --group 8 --prompt-tokens 64 --new-tokens 128 --steps 3 --rounds 3] [--max-staleness 0]
    python -m benchmarks.bench_vs_step --model Qwen3-0.6B --dtype bfloat16 --prompts 32 --prompt-tokens 128 \
        --new-tokens 256 --steps 8 [--memory-limit 24]
    python -m benchmarks.bench_vs_step --lora 8 --mlx-lm-lora-python lora/bin/python

A random Qwen3-shaped policy, by default of 8.9 million float32 parameters on the CPU; generate, score, learn, all
weights trained, no reference policy; with `--lora` an adapter of all linear layers, and our whole training beside it.
Without peers it times our side alone. Each round runs every side once, in a
process of its own with as many threads as it takes: ours is a whole `Supervisor` run, TRL's the real GRPOTrainer
(transformers generates; no gradient checkpointing, which is faster), mlx-lm-lora's the real train_grpo. One id of the
vocabulary ends a completion, so nearly all run to their limit. The interpreters: `python -m venv trl && trl/bin/pip
install torch==2.13.0 trl==1.16.0`, and `python -m venv lora && lora/bin/pip install "mlx[cpu]==0.32.4"
mlx-lm-lora==5.10.2`.

Prints a JSON line a run (seconds a step, without the first; `cpu_s`: what all processors together worked for it from
start to end, for machines on which other work takes turns) and one that compares: medians over the rounds, and the
ratio of each peer to ours, round by round, so that what else the machine does meets all sides alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

import troupe  # first: it loads OpenBLAS before MLX
from benchmarks.bench_generation import TINY
from troupe.cli.demo import DEMO_CONFIG
from troupe.policy import DTYPES, PRESETS, NetworkConfig, Tokenizer, parameter_count, random_policy
from troupe.run.config import write_config

HERE = Path(__file__).parent


def varied(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that differs between completions, so that there is something to learn."""
    return [sum(ids) % 17 / 17 for ids in completion_ids]


def shape_of(args: argparse.Namespace) -> NetworkConfig:
    """The shape of the policy that all sides train."""
    return TINY if args.model == "tiny" else PRESETS[args.model]


def write_inputs(folder: Path, args: argparse.Namespace) -> None:
    """What all sides read: a model folder with the demo's tokenizer, our config, and a job for the others."""
    model = folder / "policy"
    policy = shape_of(args)
    random_policy(msgspec.structs.replace(policy, eos_token_id=(policy.vocab_size - 1,)), dtype=args.dtype).save(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_CONFIG.parent / "policy" / name, model / name)
    dice = random.Random(0)
    texts = [
        "".join(dice.choice("0123456789") for _ in range(args.prompt_tokens))
        for _ in range((args.steps + 1) * args.prompts)
    ]
    (folder / "prompts.json").write_text(json.dumps([{"prompt": text} for text in texts]), encoding="utf-8")
    tokenizer = Tokenizer.from_pretrained(model)
    rows = [{"prompt": text, "answer": "", "prompt_ids": tokenizer.encode(text)} for text in texts]
    assert all(len(row["prompt_ids"]) == args.prompt_tokens for row in rows), "a digit is not a token of the demo's"
    generation = {"num_generations": args.group, "max_completion_length": args.new_tokens}
    table: dict[str, Any] = {
        "output": str(folder / "run"),
        "model": {"path": str(model), "dtype": args.dtype},
        "data": {"path": str(folder / "prompts.json"), "shuffle": False},
        "generation": generation,
        "rewards": {"functions": [f"{Path(__file__).resolve()}:varied"]},
        "learner": {"batch_size": args.prompts, "max_steps": args.steps + 1, "lr": 1e-5},
        "schedule": {"max_staleness": args.max_staleness, **json.loads(args.schedule)},
        "checkpoint": {"every": 10_000},
        "metrics": {"sinks": ["jsonl"]},
    }
    if args.memory_limit:
        table["memory_limit_gb"] = args.memory_limit
    if args.micro_batches:
        table["learner"]["gradient_accumulation_steps"] = args.micro_batches
    write_config(troupe.load_config(None, [table]), folder / "full.toml")
    if args.lora:
        table["adapter"] = {"kind": "lora", "rank": args.lora}
    write_config(troupe.load_config(None, [table]), folder / "run.toml")
    settings = {
        **generation,
        "max_steps": args.steps + 1,
        "learning_rate": 1e-5,
        "per_device_train_batch_size": args.prompts * args.group,
        "gradient_checkpointing": False,
        "beta": 0.0,
    }
    job = {
        "model": str(model),
        "rows": rows,
        "threads": args.threads,
        "reward": "varied",
        "settings": settings,
        "lora_rank": args.lora,
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")


def commands(folder: Path, args: argparse.Namespace) -> dict[str, list[str]]:
    """Side → its command line, without the result file."""
    found = {"troupe": [sys.executable, str(HERE / "vs_trl_ours.py"), str(folder / "run.toml")]}
    if args.lora:
        found["troupe-full"] = [sys.executable, str(HERE / "vs_trl_ours.py"), str(folder / "full.toml")]
    if args.trl_python:
        found["trl"] = [args.trl_python, str(HERE / "vs_trl_theirs.py"), str(folder / "job.json")]
    if args.mlx_lm_lora_python:
        found["mlx-lm-lora"] = [args.mlx_lm_lora_python, str(HERE / "vs_step_lora.py"), str(folder / "job.json")]
    return found


def run(side: str, command: list[str], folder: Path, threads: int | None) -> dict[str, Any]:
    """One side once → its steps' seconds; RuntimeError with what it wrote where it fails."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if threads:
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*command, str(result)], env=environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{side} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    found = json.loads(result.read_text(encoding="utf-8"))
    ends_s = found["ended_s"]
    steps_s = [end - start for start, end in pairwise(ends_s)]
    ours = {
        name: round(statistics.median(metrics[name] for metrics in found["metrics"][1:]), 3)
        for name in ("learn_time", "peak_memory_gb")
        if side.startswith("troupe")
    }
    ours |= {name: found[name] for name in ("peak_memory_gb",) if name in found}
    return {
        "side": side,
        "step_s": round(statistics.median(steps_s), 3),
        "steps_s": [round(each, 3) for each in steps_s],
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        **ours,
        "versions": found["versions"],
    }


def compared(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the rounds, and ratios to ours within each."""
    sides = list(rounds[0])
    peaks = {side: [one[side]["peak_memory_gb"] for one in rounds if "peak_memory_gb" in one[side]] for side in sides}
    figures: dict[str, Any] = {
        "peak_memory_gb": {side: statistics.median(found) for side, found in peaks.items() if found},
        "step_s": {side: statistics.median(found[side]["step_s"] for found in rounds) for side in sides},
    }
    for side in sides[1:]:
        ratios = [found[side]["step_s"] / found["troupe"]["step_s"] for found in rounds]
        figures[f"{side}_over_troupe"] = round(statistics.median(ratios), 3)
        figures[f"{side}_ratios"] = [round(each, 3) for each in ratios]
        figures[f"{side}_cpu_ratios"] = [round(found[side]["cpu_s"] / found["troupe"]["cpu_s"], 3) for found in rounds]
    return figures


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="an interpreter that has TRL")
    parser.add_argument("--mlx-lm-lora-python", help="an interpreter that has mlx-lm-lora")
    parser.add_argument("--model", choices=["tiny", *PRESETS], default="tiny")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of ours")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3, help="that are counted, of each run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lora", type=int, metavar="RANK", help="adapters of all linear layers, of both sides")
    parser.add_argument("--threads", type=int, help="of every side (default: as many as each takes)")
    parser.add_argument("--micro-batches", type=int, default=0, help="of ours; 0: as a run chooses")
    parser.add_argument("--memory-limit", type=float, help="of ours, in GB")
    parser.add_argument("--max-staleness", type=int, default=0, help="of ours")
    parser.add_argument("--schedule", default="{}", help="more of our [schedule], as JSON")
    args = parser.parse_args(arguments)
    if args.lora and args.trl_python:
        parser.error("TRL's side trains all weights; leave out --trl-python with --lora")
    return args


def main() -> None:
    """Measure, and print the lines as they come."""
    args = parse()
    rounds = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory(prefix="troupe-step-") as name:
            folder = Path(name)
            write_inputs(folder, args)
            found = {}
            for side, command in commands(folder, args).items():
                found[side] = run(side, command, folder, args.threads)
                print(json.dumps({"benchmark": "vs_step", **found[side]}), flush=True)
            rounds.append(found)
    about = {
        "parameters": parameter_count(shape_of(args)),
        **{key: value for key, value in vars(args).items() if not key.endswith("python")},
        "load": round(os.getloadavg()[0], 2),
        "machine": platform.platform(),
        "mlx": version("mlx"),
        "troupe": troupe.__version__,
    }
    print(json.dumps({"benchmark": "vs_step", "side": "compared", **compared(rounds), **about}))


if __name__ == "__main__":
    main()
