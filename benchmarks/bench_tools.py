"""Do tools hide behind the device? Runs whose tools sleep as long as the device computes, and TRL beside them.

    python -m benchmarks.bench_tools [--trl-python trl/bin/python] [--rounds 3] [--steps 6]

A small random policy has conversations of `--turns` turns, whose lengths are as uneven as chance makes them (any of
`STOP_IDS` ids ends one); between two turns a tool sleeps, S seconds an episode in all. A random policy calls nothing:
here the environment answers whatever is said (`step`), and TRL is told that whatever is said is a call.

S is what sampling and learning of a step take one after the other in a run without sleep. D, the device time of a
step, is the same in the run that is looked at, by its spans: machines drift, and neighbours slow each other down. Were
nothing hidden, a step would take D + S; where all is, it takes max(D, S). With `max_staleness` 1 on a CPU generator and
learner have a process each. Two steps are under way, so a step takes at least half of what passes from its prompts to
its weights, (D + S) / 2, which is max(D, S) where both are equal.

TRL 1.16 waits for one row after the other, also for async tools: S seconds each. So it is measured twice: as it is,
and with S divided among the rows, as if all were answered in that time; S is its own, D what is left of a step.

Each round measures S anew; the lines have medians over the rounds, and extremes. Goal: a step with `max_staleness` 1
takes at most 1.15 × max(D, S).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio

import troupe  # first: it loads OpenBLAS before MLX
from troupe.cli.demo import DEMO_CONFIG
from troupe.policy import NetworkConfig, parameter_count, random_policy

HERE = Path(__file__).parent
WARM_UP = 2
STOP_IDS = 10
GOAL = 1.15
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SLEEPER = '''
import anyio

from troupe.environments import StepResult


class Sleeper:
    """Has every turn but the last wait."""

    def reset(self, **columns):
        self.turns = 0

    async def step(self, text):
        self.turns += 1
        if self.turns < {turns}:
            await anyio.sleep({seconds})
        return StepResult("Go on.", done=self.turns == {turns})
'''
RUNS: dict[str, dict[str, Any]] = {
    "max_staleness 0": {"max_staleness": 0, "generator": "thread"},
    "max_staleness 1": {"max_staleness": 1, "generator": "process", "generator_processes": 1},
    "free, max_staleness 1": {"mode": "free", "max_staleness": 1, "generator": "process", "generator_processes": 1},
}
SHARES = {
    "generator_busy": "time/generator/busy",
    "learner_busy": "time/learner/busy",
    "hidden_s": "time/environment/hidden_s",
    "exposed_s": "time/environment/exposed_s",
}


def varied(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Differs between completions, so that there is something to learn."""
    return [sum(ids) % 17 / 17 for ids in completion_ids]


class Bench:
    """Runs with the same inputs, each in a folder of its own below `folder`."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.args = folder, args
        self.network = NetworkConfig(
            vocab_size=257,
            hidden_size=args.hidden,
            intermediate_size=3 * args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // 32,
            num_key_value_heads=args.hidden // 64,
            head_dim=32,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            eos_token_id=(256, *range(STOP_IDS - 1)),
        )
        self.model = folder / "policy"
        random_policy(self.network).save(self.model)
        of_demo = DEMO_CONFIG.parent / "policy"
        shutil.copy(of_demo / "tokenizer.json", self.model / "tokenizer.json")
        settings = json.loads((of_demo / "tokenizer_config.json").read_text(encoding="utf-8"))
        settings |= {"chat_template": TEMPLATE, "model_max_length": 1024}
        (self.model / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        dice = random.Random(0)
        prompts = [f"{dice.randrange(10**9)}+{dice.randrange(10**5)}=" for _ in range(8 * args.prompts)]
        self.rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts]
        (folder / "prompts.json").write_text(json.dumps(self.rows), encoding="utf-8")
        self._runs = 0

    def ours(self, tool_s: float, **schedule: Any) -> dict[str, float]:
        """Seconds of a step, mean over those measured; with shares of the time, as the metrics have them."""
        self._runs += 1
        args = self.args
        folder = self.folder / f"{self._runs}"
        folder.mkdir()
        seconds = tool_s / (args.turns - 1)
        (folder / "sleeper.py").write_text(SLEEPER.format(turns=args.turns, seconds=seconds), encoding="utf-8")
        table: dict[str, Any] = {
            "output": str(folder / "run"),
            "model": {"path": str(self.model)},
            "data": {"path": str(self.folder / "prompts.json")},
            "generation": {"num_generations": args.group, "max_completion_length": args.new_tokens},
            "environment": {"factory": f"{folder / 'sleeper.py'}:Sleeper", "concurrency": 4096, "turn_timeout_s": 600},
            "learner": {
                "batch_size": args.prompts,
                "max_steps": WARM_UP + args.steps + 2 * schedule["max_staleness"],
                "lr": 1e-6,
            },
            "schedule": {"blas_threads": 1, "learner_streams": 1, **schedule},
            "checkpoint": {"every": 10_000},
            "metrics": {"sinks": ["jsonl", "trace"]},
        }
        ends_s: list[float] = []
        metrics: list[dict[str, float]] = []

        async def run() -> None:
            async with troupe.Supervisor(troupe.load_config(None, [table]), rewards=[varied]) as run:
                async for update in run.updates():
                    ends_s.append(time.perf_counter())
                    metrics.append(update.metrics)
            if run.result.incidents:
                raise RuntimeError(f"the run had incidents: {run.result.incidents}")

        anyio.run(run)
        if args.keep:
            shutil.copy(folder / "run" / "trace.json", args.keep / f"trace-{self._runs}.json")
        measured = ends_s[WARM_UP - 1 : WARM_UP + args.steps]
        step_s = statistics.fmean(end - start for start, end in pairwise(measured))
        of_steps = metrics[WARM_UP : WARM_UP + args.steps]
        shares = {key: statistics.fmean(each.get(name, 0.0) for each in of_steps) for key, name in SHARES.items()}
        device_s = (shares["generator_busy"] + shares["learner_busy"]) * step_s
        larger_s = max(device_s, tool_s)
        return {"step_s": step_s, "device_s": device_s, "tool_s": tool_s, "of_larger": step_s / larger_s, **shares}

    def theirs(self, tool_s: float) -> dict[str, float]:
        """The same of TRL; `tool_s` of each row."""
        args = self.args
        settings = {
            "per_device_train_batch_size": args.prompts * args.group,
            "num_generations": args.group,
            "max_completion_length": args.new_tokens,
            "max_tool_calling_iterations": args.turns - 1,
            "max_steps": 1 + args.trl_steps,
            "learning_rate": 1e-6,
            "temperature": 1.0,
            "beta": 0.0,
            "gradient_checkpointing": False,
        }
        job = {"model": str(self.model), "rows": self.rows, "sleep_s": tool_s / (args.turns - 1), "settings": settings}
        (self.folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        result = self.folder / "result.json"
        command = [args.trl_python, str(HERE / "vs_tools_theirs.py"), str(self.folder / "job.json"), str(result)]
        environment = dict.fromkeys(THREAD_VARIABLES, "1") | {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"TRL ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        told = json.loads(result.read_text(encoding="utf-8"))
        if told["calls_a_row"] != args.turns - 1:
            raise RuntimeError(f"TRL made {told['calls_a_row']} calls a row, not {args.turns - 1}")
        step_s = statistics.fmean(end - start for start, end in pairwise(told["ended_s"]))
        slept_s = told["slept_s"] / args.trl_steps
        device_s = step_s - slept_s
        larger_s = max(device_s, tool_s)
        return {"step_s": step_s, "device_s": device_s, "slept_s": slept_s, "of_larger": step_s / larger_s}


def of_ours(bench: Bench) -> list[dict[str, Any]]:
    """One round: S, and then every run with it."""
    alone = bench.ours(0.0, **RUNS["max_staleness 0"])
    runs = {name: bench.ours(alone["step_s"], **schedule) for name, schedule in RUNS.items()}
    return [{"what": name, **figures} for name, figures in {"without sleep": alone, **runs}.items()]


def of_trl(bench: Bench) -> list[dict[str, Any]]:
    """The same with TRL."""
    alone, rows = bench.theirs(0.0), bench.args.prompts * bench.args.group
    at_once = bench.theirs(alone["step_s"] / rows)
    at_once["of_larger"] = at_once["step_s"] / max(at_once["device_s"], at_once["slept_s"])
    as_it_is = bench.theirs(alone["step_s"])
    named = {"TRL without sleep": alone, "TRL, all rows at once": at_once, "TRL as it is": as_it_is}
    return [{"what": name, **figures} for name, figures in named.items()]


def summary(rounds: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Medians of each line's figures over the rounds, with the extremes of `of_larger`."""
    lines = []
    for each in zip(*rounds, strict=True):
        line: dict[str, Any] = {"what": each[0]["what"]}
        for key in [key for key in each[0] if key != "what"]:
            values = sorted(one[key] for one in each)
            line[key] = round(statistics.median(values), 3)
            if key == "of_larger":
                line["extremes"] = [round(values[0], 3), round(values[-1], 3)]
        if line["what"] == "max_staleness 1":
            line["ok"] = line["of_larger"] <= GOAL
        lines.append(line)
    return lines


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="an interpreter that has TRL 1.16; without it TRL is left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trl-rounds", type=int, default=1, help="rounds in which TRL is measured, too")
    parser.add_argument("--steps", type=int, default=6, help="steps that are measured, of each run of ours")
    parser.add_argument("--trl-steps", type=int, default=3, help="and of TRL, behind one that warms up")
    parser.add_argument("--prompts", type=int, default=2, help="groups a step")
    parser.add_argument("--group", type=int, default=4, help="episodes a group")
    parser.add_argument("--turns", type=int, default=3, help="of an episode; a tool sleeps between two")
    parser.add_argument("--new-tokens", type=int, default=256, help="of an episode, at most")
    parser.add_argument("--hidden", type=int, default=128, help="width of the policy, a multiple of 64")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="a folder for the trace.json of every run")
    args = parser.parse_args(arguments)
    if args.turns < 2:
        parser.error(f"--turns is {args.turns}, but a tool sleeps between two; give at least 2")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a line for each kind of run."""
    args = parse(arguments)
    began_s, ours, trl = time.perf_counter(), [], []
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory(prefix="troupe-tools-") as folder:
            bench = Bench(Path(folder), args)
            ours.append(of_ours(bench))
            for line in ours[-1]:
                print(f"round {number + 1}: {json.dumps(line)}", file=sys.stderr, flush=True)
            if args.trl_python and number < args.trl_rounds:
                trl.append(of_trl(bench))
                print(f"round {number + 1}: {json.dumps(trl[-1])}", file=sys.stderr, flush=True)
    for line in [*summary(ours), *(summary(trl) if trl else [])]:
        print(json.dumps({"benchmark": "tools", **line}), flush=True)
    about = {
        "what": "about",
        "parameters": parameter_count(bench.network),
        **{key: value for key, value in vars(args).items() if isinstance(value, int)},
        "took_s": round(time.perf_counter() - began_s, 1),
        "load": round(os.getloadavg()[0], 1),
        "machine": platform.platform(),
        "mlx": version("mlx"),
        "troupe": troupe.__version__,
    }
    print(json.dumps({"benchmark": "tools", **about}))


if __name__ == "__main__":
    main(sys.argv[1:])
