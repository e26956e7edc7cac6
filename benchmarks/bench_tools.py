"""How much of the time of tools does a run hide?

    python benchmarks/bench_tools.py [--steps 8]

An episode has two turns; between them its tool sleeps as long as the device works for a step: all tools of a step at
once, so that a loop which waits for them takes twice as long. One JSON line a measurement:

device      max_staleness 0 and a tool that takes no time: the device time of a step.
waiting     max_staleness 0: the tool's time comes on top.
hidden      max_staleness 1: a step may take 1.15 × the larger of both (`ok`).

A small random Qwen3-shaped policy is written into a temporary folder; the generator is a process of its own, with one
thread of BLAS on each side. Times are means over `--steps` steps after two that warm up.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import anyio

import troupe  # first: it loads OpenBLAS before MLX
from troupe.cli.demo import DEMO_CONFIG
from troupe.environments import StepResult
from troupe.policy import NetworkConfig, random_policy
from troupe.run.supervisor import Supervisor

WARM_UP, PROMPTS, GENERATIONS, TURN = 2, 4, 8, 32
POLICY = NetworkConfig(
    vocab_size=257,
    hidden_size=192,
    intermediate_size=576,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=32,
    max_position_embeddings=256,
    tie_word_embeddings=True,
    eos_token_id=(256, *range(8)),
)
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


class Sleeper:
    """Answers after `sleep_s`, once."""

    sleep_s = 0.0

    def reset(self, **columns: Any) -> None:
        self.turns = 0

    async def step(self, text: str) -> StepResult:
        self.turns += 1
        if self.turns == 2:
            return StepResult(done=True)
        await anyio.sleep(self.sleep_s)
        return StepResult("well, and now?")


def varied(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Differs between completions, so that there is something to learn."""
    return [sum(ids) % 17 / 17 for ids in completion_ids]


def write_inputs(folder: Path) -> None:
    """The policy, with the demo's tokenizer and a template, and rows."""
    model, demo = folder / "policy", DEMO_CONFIG.parent / "policy"
    random_policy(POLICY, 0).save(model)
    shutil.copy(demo / "tokenizer.json", model)
    settings = json.loads((demo / "tokenizer_config.json").read_text(encoding="utf-8"))
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}), encoding="utf-8")
    rows = [{"prompt": [{"role": "user", "content": f"say {i:3d}"}]} for i in range(64)]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


def timed(folder: Path, steps: int, *, sleep_s: float, max_staleness: int) -> float:
    """Seconds of a step."""
    output = tempfile.mkdtemp(dir=folder)
    config = troupe.load_config(
        None,
        [
            {
                "output": f"{output}/run",
                "model": {"path": str(folder / "policy")},
                "data": {"path": str(folder / "rows.json")},
                "generation": {"num_generations": GENERATIONS, "max_completion_length": 2 * TURN + 40},
                "learner": {"batch_size": PROMPTS, "max_steps": WARM_UP + steps + 1},
                "schedule": {"max_staleness": max_staleness, "generator": "process", "blas_threads": 1}
                | {"generator_processes": 1, "learner_streams": 1},
                "environment": {"run": "loop", "concurrency": PROMPTS * GENERATIONS * 2},
                "checkpoint": {"every": 1000},
                "metrics": {"sinks": ["sqlite"]},
            }
        ],
    )
    Sleeper.sleep_s = sleep_s
    ends: list[float] = []

    async def run() -> None:
        async with Supervisor(config, [varied], environment_factory=Sleeper) as supervisor:
            ends.extend([time.perf_counter() async for _ in supervisor.updates()])

    anyio.run(run)
    return fmean(later - earlier for earlier, later in pairwise(ends[WARM_UP:]))


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="troupe-tools-") as name:
        folder = Path(name)
        write_inputs(folder)
        device_s = timed(folder, args.steps, sleep_s=0.0, max_staleness=0)
        say(part="device", step_s=round(device_s, 4))
        waiting_s = timed(folder, args.steps, sleep_s=device_s, max_staleness=0)
        say(part="waiting", step_s=round(waiting_s, 4), of_larger=round(waiting_s / device_s, 3))
        hidden_s = timed(folder, args.steps, sleep_s=device_s, max_staleness=1)
        share = hidden_s / device_s
        say(part="hidden", step_s=round(hidden_s, 4), of_larger=round(share, 3), ok=share <= 1.15)


if __name__ == "__main__":
    main()
