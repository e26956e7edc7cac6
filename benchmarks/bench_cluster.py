"""What do workers cost, and what do they give?

    python benchmarks/bench_cluster.py messages [--steps 25 --groups 8 --group 8 --new-tokens 512 --model tiny]
    python benchmarks/bench_cluster.py workers [--workers 1 2 --steps 4 --groups 16 --new-tokens 128 --pinned]

Both through a real nats-server, with the run's desk, crew and weights in this process and workers in others.
`messages`: the workers' generator is none, and answers at once with completions of full length, so that all that is
measured is messages and weights: bytes and seconds of a step, beside what ids, log-probs and weights are, and the share
of a step whose decoding takes as long as `--tokens-per-second` says. A version is published before each step, changed
as AdamW changes one with `--lr`. `workers`: real generators with random weights, each with one BLAS thread; tokens a
second of 1, 2, … workers together; with `--pinned` each has one core (Linux). Prints one JSON line a question.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import anyio
import msgspec

import troupe
from benchmarks.bench_generation import TINY
from troupe.actors.generator.child import Listener
from troupe.actors.generator.crew import Crew
from troupe.actors.generator.parts import Part, parts_of
from troupe.actors.generator.weights_files import WeightsFiles
from troupe.actors.generator.wire import Setup
from troupe.cli.demo import DEMO_CONFIG
from troupe.cluster.connection import connect
from troupe.cluster.link import Link
from troupe.cluster.ticket import read_ticket
from troupe.cluster.users import Users
from troupe.messages import Incident, Observation, Prompt, Rollout, RolloutGroup, Slot, Span
from troupe.policy import PRESETS, NetworkConfig, Policy, Weights, load_policy, parameter_count, random_policy
from troupe.run.cluster import Hear, Hub, Network, open_network, opened
from troupe.run.config import RunConfig
from troupe.run.worker.generating import Generating
from troupe.run.worker.machine import asked_machine
from troupe.run.worker.session import Worker
from troupe.runtime.board import PolicyBoard
from troupe.runtime.device import DeviceThread
from troupe.runtime.mailbox import Mailbox
from troupe.runtime.process import ChildEnded
from troupe.runtime.reporter import Reporter

import mlx.core as mx  # isort: skip

_PROMPT_TOKENS = 64
_RATES = (2_000, 20_000, 100_000)


class CountedBus:
    """A hub's bus; counts what goes through it, by verb."""

    def __init__(self, bus: Any) -> None:
        self._bus = bus
        self.up: Counter[str] = Counter()
        self.down: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.stored = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bus, name)

    async def put(self, subject: str, data: bytes) -> None:
        """As of `Bus`."""
        self.stored += len(data)
        await self._bus.put(subject, data)

    def serve(self, subject: str, handler: Callable[[str, bytes], Awaitable[bytes]]) -> Any:
        """As of `Bus`."""

        async def counted(asked: str, data: bytes) -> bytes:
            verb = asked.rpartition(".")[2]
            self.up[verb] += len(data)
            self.calls[verb] += 1
            reply = await handler(asked, data)
            self.down[verb] += len(reply)
            return reply

        return self._bus.serve(subject, counted)

    def forget(self) -> None:
        """Begin to count anew."""
        self.up.clear()
        self.down.clear()
        self.calls.clear()
        self.stored = 0


class Instant:
    """A generator that takes no time: completions of full length, of ids that fit."""

    def __init__(self, setup: Setup, listener: Listener) -> None:
        self.setup, self._listener = setup, listener
        self.newest = -1
        self.parts: dict[str, set[int]] = {}
        self.pace = SimpleNamespace(per_second=None)
        self.pid = 0
        self._dead = anyio.Event()
        self._rollouts = written(setup)

    async def run(self) -> None:
        """Until it is killed."""
        await self._dead.wait()
        raise ChildEnded("it was ended")

    async def load(self, version: int, path: Path) -> None:
        """Read the file, as a real one would."""
        await anyio.to_thread.run_sync(path.read_bytes)
        self.newest = max(self.newest, version)

    def has(self, version: int) -> bool:
        """Whether it has read a version."""
        return version <= self.newest

    async def decode(self, *parts: Part) -> None:
        """Answer at once."""
        for part in parts:
            for prompt in part.prompts:
                await self._listener.on_group(self._group(prompt))

    async def observe(self, observation: Observation) -> None:
        """Nobody acts here."""

    def kill(self) -> None:
        """End it."""
        self._dead.set()

    async def aclose(self) -> None:
        """Nothing is held."""

    def _group(self, prompt: Prompt) -> RolloutGroup:
        versions = (max(0, self.newest),) * self.setup.generation.max_completion_length
        rollouts = (msgspec.structs.replace(rollout, versions=versions) for rollout in self._rollouts)
        return RolloutGroup(prompt=prompt, rollouts=tuple(rollouts))


def written(setup: Setup) -> tuple[Rollout, ...]:
    """What every group consists of."""
    dice, length = random.Random(0), setup.generation.max_completion_length
    tokenizer = load_policy(DEMO_CONFIG.parent / "policy").tokenizer
    rollouts = []
    for _ in range(setup.generation.num_generations):
        ids = tuple(dice.choices(range(3, min(setup.policy.vocab_size, 60)), k=length))
        log_probs = tuple(-float(mx.array(dice.random())) for _ in range(length))  # as float32 has them
        rollouts.append(
            Rollout(
                token_ids=ids,
                log_probs=log_probs,
                sampling_log_probs=log_probs,
                versions=(0,) * length,
                finish_reason="length",
                text=tokenizer.decode_sampled(ids),
            )
        )
    return tuple(rollouts)


async def work(file: Path, *, instant: bool) -> None:
    """A worker, to the run's end."""
    ticket = read_ticket(file)
    mx.set_default_device(mx.cpu)
    here, facts = await asked_machine("cpu")

    async def start(setup: Setup, listener: Listener) -> Any:
        return Instant(setup, listener)

    async with connect(ticket) as bus:
        link = Link(bus, ticket.run)
        await Worker(link, [Generating(bus, ticket.run, here, start=start if instant else None)], facts).run()


class Rig:
    """A hub whose parts come from here, and not from a run."""

    def __init__(self, config: RunConfig, policy: Policy, folder: Path) -> None:
        self.config, self.policy, self.folder = config, policy, folder
        self.board: PolicyBoard[Weights] = PolicyBoard(config.schedule.max_staleness)
        self.bus: CountedBus
        self.crew: Crew
        self.incidents: list[str] = []
        self._open: set[int] = set()
        self._came = anyio.Event()
        self._step = 0

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Hub]:
        """The hub at work."""

        @asynccontextmanager
        async def counted(join: Path, serve: str, tell: Hear, revoked: Hear) -> AsyncIterator[Network]:
            async with open_network(join, serve, tell, revoked) as network:
                self.bus = CountedBus(network.bus)
                yield msgspec.structs.replace(network, bus=self.bus)

        box = Mailbox("bench")
        spans = box.channel("spans", Span, bound=16, overflow="drop_oldest")
        report = Reporter("generator", box.channel("incidents", Incident, bound=1000, overflow="drop_oldest"), spans)
        schedule = self.config.schedule
        setup = Setup(
            name="generator",
            policy=self.policy.config,
            generation=self.config.generation,
            stop_ids=(),  # all completions have their full length
            tokenizer=str(DEMO_CONFIG.parent / "policy"),
            tokenizer_files=self.policy.companions.files,
            seed=0,
            max_staleness=schedule.max_staleness,
            parts=schedule.parts or 1,
            most_at_once=64 if schedule.mode == "free" else None,
            live=1024,
            on_cpu=True,
            blas_threads=1,
        )
        files = WeightsFiles(self.folder, at_once=16)
        async with DeviceThread("files") as device, opened(self.config, self.folder, counted) as hub:
            self.board.publish(0, self.policy.weights)
            hub.attach(report=report, setup=setup, policy=self.policy, board=self.board, files=files, device=device)
            self.crew = Crew(self._take, board=self.board, report=report, pinned=schedule.mode == "pinned")
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(hub.run)
                tasks.start_soon(hub.members.run, self.crew)
                yield hub
                await hub.say_over()
                tasks.cancel_scope.cancel()
            self.incidents = [m.message for m in box.waiting if isinstance(m, Incident)]

    async def step(self, groups: int) -> float:
        """Have the groups of one step decoded → seconds."""
        step, self._step = self._step, self._step + 1
        dice = random.Random(step)
        vocabulary = min(self.policy.config.vocab_size, 60)
        prompts = [
            Prompt(
                gid=step * groups + place,
                slot=Slot(step=step, place=place),
                epoch=0,
                row=place,
                prompt="",
                prompt_ids=tuple(dice.choices(range(3, vocabulary), k=_PROMPT_TOKENS)),
                columns={},
            )
            for place in range(groups)
        ]
        start_s = time.perf_counter()
        self._open = {prompt.gid for prompt in prompts}
        pinned = self.config.schedule.mode == "pinned"
        for part in parts_of(prompts, self.config.schedule.parts if pinned else None, 0 if pinned else None):
            self.crew.submit(part)
        while self._open:
            await self._came.wait()
        return time.perf_counter() - start_s

    async def _take(self, group: RolloutGroup) -> None:
        self._open.discard(group.prompt.gid)
        self._came.set()
        self._came = anyio.Event()


@asynccontextmanager
async def workers(rig: Rig, hub: Hub, count: int, *, instant: bool, is_pinned: bool = False) -> AsyncIterator[None]:
    """So many worker processes, ready; they end with the run."""
    users = Users(rig.folder / "join")
    processes = []
    for number in range(count):
        file = rig.folder / "join" / "worker.toml" if not number else users.invite(f"worker-{number}")
        command = [sys.executable, __file__, "work", str(file), *(["--instant"] if instant else [])]
        command += ["--core", str(number)] if is_pinned else []
        processes.append(subprocess.Popen(command))  # noqa: ASYNC220 - it takes no time
    try:
        while sum(one.version is not None for one in hub.members.statuses()) < count:
            assert all(process.poll() is None for process in processes), "a worker has ended"
            await anyio.sleep(0.1)
        yield
    except BaseException:
        for process in processes:
            process.kill()
        raise


def configured(args: argparse.Namespace, folder: Path, mode: str) -> RunConfig:
    """The settings that matter here."""
    staleness = 4 if mode == "free" else args.steps + 1  # so that all steps are pinned to version 0
    return troupe.load_config(
        DEMO_CONFIG,
        [
            {
                "output": str(folder),
                "generation": {"num_generations": args.group, "max_completion_length": args.new_tokens},
                "learner": {"batch_size": args.groups},
                "schedule": {"mode": mode, "max_staleness": staleness, "parts": args.groups // 2},
                "cluster": {"serve": "127.0.0.1:0", "audit": 0.0, "local_parts": False},
            }
        ],
    )


def policy_of(network: NetworkConfig, dtype: str) -> Policy:
    """Random weights, with the demo's tokenizer."""
    demo = load_policy(DEMO_CONFIG.parent / "policy")
    network = msgspec.structs.replace(network, vocab_size=demo.config.vocab_size)
    return demo.having(random_policy(network, dtype=dtype).weights, config=network)


def changed(weights: Weights, lr: float, step: int) -> Weights:
    """As after an update: each number moved by about the learning rate."""
    mx.random.seed(step)
    moved = {
        name: (w.astype(mx.float32) + lr * mx.random.normal(w.shape)).astype(w.dtype) for name, w in weights.items()
    }
    mx.eval(list(moved.values()))
    return moved


async def bench_messages(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes and seconds of a step in which decoding takes no time."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        policy = policy_of(TINY if args.model == "tiny" else PRESETS[args.model], "bfloat16")
        weights = policy.weights
        rig = Rig(configured(args, folder, "free"), policy, folder)
        seconds = []
        async with rig.serving() as hub, workers(rig, hub, args.workers[0], instant=True):
            await rig.step(args.groups)
            rig.bus.forget()
            cpu_s = time.process_time()
            began_s = time.perf_counter()
            versions_s = 0.0
            for step in range(1, args.steps + 1):
                making_s, making_cpu_s = time.perf_counter(), time.process_time()
                weights = changed(weights, args.lr, step)
                versions_s += time.perf_counter() - making_s
                cpu_s += time.process_time() - making_cpu_s
                rig.board.publish(step, weights)
                seconds.append(await rig.step(args.groups))
            wall_s, cpu_s = time.perf_counter() - began_s - versions_s, time.process_time() - cpu_s
            await anyio.sleep(2.0)  # the newest version is on its way
            bus = rig.bus
            up, down, calls, stored = dict(bus.up), dict(bus.down), dict(bus.calls), bus.stored
    groups, tokens = args.steps * args.groups, args.steps * args.groups * args.group * args.new_tokens
    step_s = statistics.median(seconds)
    size = 2 * parameter_count(policy.config)
    return {
        "what": "messages",
        "workers": args.workers[0],
        "groups": groups,
        "tokens": tokens,
        "ms_a_group": 1e3 * sum(seconds) / groups,
        "ms_a_step_median": 1e3 * step_s,
        "hub_cpu_ms_a_group": 1e3 * cpu_s / groups,
        "wall_s": wall_s,
        "done_bytes_a_group": up.get("done", 0) / groups,
        "done_bytes_a_token": up.get("done", 0) / tokens,
        "ids_and_log_probs_bytes_a_token": 8,
        "pull_bytes_a_group": down.get("pull", 0) / groups,
        "prompt_bytes_a_group": 4 * _PROMPT_TOKENS,
        "calls_a_group": {verb: count / groups for verb, count in sorted(calls.items())},
        "weights_bytes": size,
        "stored_bytes_a_version": stored / args.steps,
        "stored_share": stored / args.steps / size,
        "share_of_a_step_at_tokens_per_second": {
            rate: step_s / (tokens / args.steps / rate + step_s) for rate in args.tokens_per_second
        },
        "incidents": rig.incidents,
    }


async def bench_workers(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of so many workers together, in the pinned schedule."""
    rates = {}
    policy = policy_of(TINY, "float32")
    for count in args.workers:
        with TemporaryDirectory() as temporary:
            folder = Path(temporary)
            rig = Rig(configured(args, folder, "pinned"), policy, folder)
            async with rig.serving() as hub, workers(rig, hub, count, instant=False, is_pinned=args.pinned):
                await rig.step(args.groups)  # compiles
                rates[count] = [
                    args.groups * args.group * args.new_tokens / await rig.step(args.groups) for _ in range(args.steps)
                ]
    medians = {count: statistics.median(each) for count, each in rates.items()}
    first = medians[args.workers[0]]
    return {
        "what": "workers",
        "tokens_per_second": medians,
        "over_the_first": {count: rate / first for count, rate in medians.items()},
        "parameters": parameter_count(policy.config),
    }


def main() -> None:
    """Answer one question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["messages", "workers", "work"])
    parser.add_argument("file", nargs="?", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--instant", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--pinned", action="store_true", help="each worker has one core, and not more")
    parser.add_argument("--workers", type=int, nargs="+")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--groups", type=int, help="prompts a step")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--new-tokens", type=int)
    parser.add_argument("--model", choices=["tiny", *PRESETS], default="tiny", help="whose size the weights have")
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--tokens-per-second", type=int, nargs="+", default=_RATES)
    args = parser.parse_args()
    usual = {"messages": ([2], 25, 8, 512), "workers": ([1, 2], 4, 16, 128)}.get(args.what, ([1], 1, 1, 1))
    for name, value in zip(("workers", "steps", "groups", "new_tokens"), usual, strict=True):
        setattr(args, name, getattr(args, name) or value)
    if args.what == "work":
        if args.core is not None:
            os.sched_setaffinity(0, {args.core % (os.cpu_count() or 1)})
        anyio.run(lambda: work(args.file, instant=args.instant))
        return
    result = anyio.run(bench_messages if args.what == "messages" else bench_workers, args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps(result | {"machine": platform.platform(), "peak_rss": peak}))


if __name__ == "__main__":
    main()
