"""How much of the time of rewards, and of generating beside learning, does a run hide?

    python benchmarks/bench_overlap.py [--parts latency rewards processes] [--steps 8]

Three parts, each with a JSON line a measurement; `ok` says whether its goal was met.

latency    A service that scores one group after the other and takes LATENCY × the device time of a step for all
           groups of a step: a sequential loop (generate, score, learn; the same engine, reward manager and gradient
           step), then runs with max_staleness 0, 1, 2. At 1 × and max_staleness 1 a step may take 1.10 × the larger of
           device and reward time; at max_staleness 0 at least a third of the reward time is to be hidden, because
           groups of uneven lengths are scored as they end.
rewards    The same loop and max_staleness 1 with the rewards of `examples/`: an HTTP judge and a runner of Python code.
processes  Without rewards: steps a second with the generator in a process beside the learner (max_staleness 1)
           and taking turns in one process (max_staleness 0), one BLAS thread each. Goal: 1.5 ×.

A small random Qwen3-shaped policy is written into a temporary folder. The device time of a step is measured first, in
the sequential loop without reward time. Times are means over `--steps` steps after two that warm up.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import msgspec

import troupe  # first: it loads OpenBLAS before MLX
from troupe.actors.learner.batch import CompletionLogProbs, as_rollouts, assemble
from troupe.cli.demo import DEMO_CONFIG
from troupe.grpo import learning_rate, train_on_batch
from troupe.messages import RolloutGroup, ScoredGroup, Slot
from troupe.policy import NetworkConfig, RolloutEngine, RolloutRequest, parameter_count, random_policy
from troupe.rewards import Reward, load_reward
from troupe.run.prepare import Prepared, prepare
from troupe.runtime.linux_cpu import blas_limited

WARM_UP = 2
LATENCIES = (0.0, 0.5, 1.0, 2.0)
STALENESS = (0, 1, 2)
EXAMPLES = Path(__file__).parent.parent / "examples"
POLICY = NetworkConfig(
    vocab_size=257,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=256,
    tie_word_embeddings=True,
    eos_token_id=(256,),
)

STOP_IDS = {"latency": 16, "rewards": 16, "processes": 10}
"""Part → ids that end a completion. Any of the 257 is about as likely, so groups are ready at different times: many of
these for lengths as uneven as they get, fewer where generating and learning are to take about as long."""


class Timing(NamedTuple):
    """Seconds a step, means."""

    step_s: float
    generate_s: float = 0.0
    score_s: float = 0.0
    learn_s: float = 0.0

    @property
    def device_s(self) -> float:
        """Generating and learning, one after the other."""
        return self.generate_s + self.learn_s


def service(step_s: float, prompts: int) -> Callable[..., Any]:
    """A reward that scores one group at a time and `prompts` groups in `step_s` seconds."""

    async def judged(completion_ids: list[list[int]], **_: Any) -> list[float]:
        if step_s:
            await anyio.sleep(step_s / prompts)
        return [sum(ids) % 17 / 17 for ids in completion_ids]

    return judged


def write_inputs(folder: Path, prompts: int, policy: NetworkConfig) -> tuple[Path, Path]:
    """A policy with the demo's tokenizer, and a dataset."""
    model = folder / "policy"
    random_policy(policy).save(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_CONFIG.parent / "policy" / name, model / name)
    dice = random.Random(0)
    rows = [
        {"prompt": f"{dice.randrange(10**9)}+{dice.randrange(10**5)}=", "tests": "assert True"}
        for _ in range(8 * prompts)
    ]
    (folder / "prompts.json").write_text(json.dumps(rows), encoding="utf-8")
    return model, folder / "prompts.json"


class Bench:
    """Runs with the same inputs, each in a folder of its own below `folder`."""

    def __init__(self, folder: Path, args: argparse.Namespace, stop_ids: int) -> None:
        self.folder = folder
        self.args = args
        policy = msgspec.structs.replace(POLICY, eos_token_id=(256, *range(stop_ids - 1)))
        self.model, self.data = write_inputs(folder, args.prompts, policy)
        self._runs = 0

    def config(self, max_staleness: int = 0, **schedule: Any) -> troupe.RunConfig:
        """Enough steps that neither the beginning nor the end of the run is measured."""
        self._runs += 1
        args = self.args
        table: dict[str, Any] = {
            "output": str(self.folder / f"run-{self._runs}"),
            "model": {"path": str(self.model)},
            "data": {"path": str(self.data)},
            "generation": {"num_generations": args.group, "max_completion_length": args.new_tokens},
            "rewards": {"concurrency": 1, "timeout_s": 600.0},
            "learner": {"batch_size": args.prompts, "max_steps": WARM_UP + args.steps + max_staleness, "lr": 1e-6},
            "schedule": {"max_staleness": max_staleness, "generator": "thread", "blas_threads": 1, **schedule},
            "checkpoint": {"every": 10_000},
            "metrics": {"sinks": ["jsonl"]},
        }
        return troupe.load_config(None, [table])

    def sequential(self, reward: Reward) -> Timing:
        """Generate, score, learn: one after the other."""
        prepared = prepare(self.config(), [reward])
        with blas_limited(1):
            return anyio.run(_sequential, prepared, self.args.steps)

    def timed(self, reward: Reward, max_staleness: int, **schedule: Any) -> Timing:
        """The same as a run of actors."""
        config = self.config(max_staleness, **schedule)
        ends_s: list[float] = []

        async def run() -> None:
            async with troupe.Supervisor(config, rewards=[reward]) as run:
                async for _ in run.updates():
                    ends_s.append(time.perf_counter())  # noqa: PERF401 - at the moment it comes

        anyio.run(run)
        measured = ends_s[WARM_UP - 1 : WARM_UP + self.args.steps]
        return Timing(statistics.fmean(end - start for start, end in pairwise(measured)))


async def _sequential(prepared: Prepared, steps: int) -> Timing:
    config, policy, rewards = prepared.config, prepared.start.policy, prepared.inputs.rewards
    learner, P = config.learner, config.learner.batch_size
    engine = RolloutEngine(policy.config, config.generation, stop_ids=policy.eos_ids)
    log_probs = CompletionLogProbs(policy.config, config.generation.temperature)
    reward_weights = dict(zip(rewards.names, rewards.weights, strict=True))
    weights, state = policy.weights, prepared.start.optimizer_state
    generate_s, score_s, learn_s = [], [], []
    async with rewards:
        for step in range(WARM_UP + steps):
            start_s = time.perf_counter()
            prompts = [prepared.inputs.schedule.prompt(Slot(step=step, place=place)) for place in range(P)]
            engine.load(weights, step)
            requests = [
                RolloutRequest(prompt_ids=p.prompt_ids, key=(config.seed, step, i, 0)) for i, p in enumerate(prompts)
            ]
            completed = sorted(engine.decode(requests), key=lambda group: group.index)
            groups = [
                RolloutGroup(prompt=prompts[c.index], rollouts=as_rollouts(c, policy.tokenizer.decode_sampled))
                for c in completed
            ]
            generated_s = time.perf_counter()
            scored: dict[int, ScoredGroup] = {}

            async def score(group: RolloutGroup, scored: dict[int, ScoredGroup] = scored) -> None:
                scores = (await rewards.score_group(group)).scores
                scored[group.prompt.gid] = ScoredGroup(group=group, scores=scores)

            async with anyio.create_task_group() as tasks:
                for group in groups:
                    tasks.start_soon(score, group)
            scored_s = time.perf_counter()
            ordered = [scored[gid] for gid in sorted(scored)]
            batch = assemble(ordered, learner, weights=reward_weights, pad_id=policy.tokenizer.pad_token_id or 0).batch
            lr = [learning_rate(step, WARM_UP + steps, learner)]
            result = train_on_batch(
                weights,
                state,
                batch,
                log_probs,
                learner,
                lr=lr,
                max_completion_length=config.generation.max_completion_length,
            )
            weights, state = result.weights, result.optimizer_state
            if step >= WARM_UP:
                generate_s.append(generated_s - start_s)
                score_s.append(scored_s - generated_s)
                learn_s.append(time.perf_counter() - scored_s)
    parts = [statistics.fmean(values) for values in (generate_s, score_s, learn_s)]
    return Timing(sum(parts), *parts)


def latency_part(bench: Bench) -> Iterator[dict[str, Any]]:
    """Rewards that take time and no computing."""
    args = bench.args
    device = min((bench.sequential(service(0.0, args.prompts)) for _ in range(2)), key=lambda timing: timing.device_s)
    yield {"part": "latency", "what": "device", **_rounded(device)}
    for latency in args.latencies:
        reward_s = latency * device.device_s
        reward = service(reward_s, args.prompts)
        sequential = bench.sequential(reward)
        yield {"part": "latency", "what": "sequential", "latency": latency, **_rounded(sequential)}
        for max_staleness in args.staleness:
            overlapped = bench.timed(reward, max_staleness)
            ideal_s = max(sequential.device_s, sequential.score_s)
            line = {
                "part": "latency",
                "what": "run",
                "latency": latency,
                "max_staleness": max_staleness,
                "step_s": round(overlapped.step_s, 4),
                "of_larger": round(overlapped.step_s / ideal_s, 3),
                "speedup": round(sequential.step_s / overlapped.step_s, 3),
            }
            if latency:
                hidden = (sequential.step_s - overlapped.step_s) / sequential.score_s
                line["hidden"] = round(hidden, 3)
                if latency == 1.0 and max_staleness <= 1:
                    line["ok"] = overlapped.step_s <= 1.10 * ideal_s if max_staleness else hidden >= 1 / 3
            yield line


def rewards_part(bench: Bench) -> Iterator[dict[str, Any]]:
    """Rewards that do something."""
    device_s = bench.sequential(service(0.0, bench.args.prompts)).device_s
    waves = -(-bench.args.prompts * bench.args.group // 16)  # the judge is asked about 16 completions at once
    with judge(delay_s=device_s / waves) as url:
        yield {**_compared(bench, "http_judge", lambda: _judge_at(url)), "judge_s": round(device_s, 4)}
    yield _compared(bench, "code_reward", lambda: load_reward(f"{EXAMPLES / 'code_reward.py'}:passes_tests"))


def _compared(bench: Bench, name: str, reward: Callable[[], Reward]) -> dict[str, Any]:
    sequential, overlapped = bench.sequential(reward()), bench.timed(reward(), 1)
    ideal_s = max(sequential.device_s, sequential.score_s)
    return {
        "part": "rewards",
        "reward": name,
        "max_staleness": 1,
        **{f"sequential_{key}": value for key, value in _rounded(sequential).items()},
        "step_s": round(overlapped.step_s, 4),
        "of_larger": round(overlapped.step_s / ideal_s, 3),
        "speedup": round(sequential.step_s / overlapped.step_s, 3),
    }


@contextmanager
def judge(delay_s: float) -> Iterator[str]:
    """The URL of the example's judge, which takes its time for each answer."""
    command = [sys.executable, str(EXAMPLES / "http_judge.py"), "--serve", "0", "--delay", str(delay_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()


def _judge_at(url: str) -> Reward:
    reward: Any = load_reward(f"{EXAMPLES / 'http_judge.py'}:Judge")
    reward.url = url
    return reward  # type: ignore[no-any-return]


def processes_part(bench: Bench) -> Iterator[dict[str, Any]]:
    """Generator and learner side by side on two cores."""
    reward = service(0.0, bench.args.prompts)
    device = bench.sequential(reward)
    turns = bench.timed(reward, 0)
    for placement in ("thread", "process"):
        beside = bench.timed(reward, 1, generator=placement)
        speedup = turns.step_s / beside.step_s
        yield {
            "part": "processes",
            "generator": placement,
            "generate_s": round(device.generate_s, 4),
            "learn_s": round(device.learn_s, 4),
            "turns_step_s": round(turns.step_s, 4),
            "step_s": round(beside.step_s, 4),
            "speedup": round(speedup, 3),
            **({"ok": speedup >= 1.5} if placement == "process" else {}),
        }


PARTS = {"latency": latency_part, "rewards": rewards_part, "processes": processes_part}


def _rounded(timing: Timing) -> dict[str, float]:
    return {key: round(value, 4) for key, value in timing._asdict().items()} | {"device_s": round(timing.device_s, 4)}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured")
    parser.add_argument("--latencies", nargs="+", type=float, default=list(LATENCIES), help="in device times of a step")
    parser.add_argument("--staleness", nargs="+", type=int, default=list(STALENESS), help="values of max_staleness")
    parser.add_argument("--steps", type=int, default=8, help="steps that are measured, of each run")
    parser.add_argument("--prompts", type=int, default=8, help="groups a step")
    parser.add_argument("--group", type=int, default=4, help="completions a group")
    parser.add_argument("--new-tokens", type=int, default=80, help="tokens of a completion, at most")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the lines as they come."""
    args = parse(arguments)
    began_s = time.perf_counter()
    for part in args.parts:
        with tempfile.TemporaryDirectory(prefix="troupe-overlap-") as folder:
            for line in PARTS[part](Bench(Path(folder), args, STOP_IDS[part])):
                print(json.dumps({"benchmark": "overlap", **line}), flush=True)
    about = {
        "part": "about",
        "parameters": parameter_count(POLICY),
        **{key: value for key, value in vars(args).items() if isinstance(value, int)},
        "took_s": round(time.perf_counter() - began_s, 1),
        "machine": platform.platform(),
        "mlx": version("mlx"),
        "troupe": troupe.__version__,
    }
    print(json.dumps({"benchmark": "overlap", **about}))


if __name__ == "__main__":
    main(sys.argv[1:])
