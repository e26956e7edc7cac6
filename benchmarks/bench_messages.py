"""What does the machinery cost: one hop between two actors, and its share of a step of the demo?

    python benchmarks/bench_messages.py [--messages 20000 --steps 40 --repeats 5]

A hop is from `send` in one actor until `handle` has the message in the next: one after the other down a line of actors
(nothing else to do), with and without spans, and in a burst. The share of a step is the time in which neither device
nor rewards work, by the spans of the run's own timeline (median over steps); beside it, what each actor was seen to do
meanwhile. Prints one JSON line a question: the least and the median of the repeats, as other programs disturb.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import anyio

import troupe
from troupe.actors.metrics import Heard, Metrics, Tally
from troupe.cli.demo import DEMO_CONFIG
from troupe.messages import GroupClosed, Incident, Span, Update
from troupe.records.sinks.sinks import Sinks
from troupe.records.sinks.trace import TraceWriter
from troupe.runtime.actor import Actor
from troupe.runtime.broadcast import Broadcast
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.reporter import Reporter
from troupe.runtime.roles import run_roles
from troupe.runtime.spans import ON_DEVICE, Interval, Times, difference, length, union

WARM_UP_STEPS = 5  # the first ones compile kernels


class Relay(Actor):
    """Passes on what it gets."""

    name: ClassVar[str] = "relay"

    def __init__(self, inbox: Mailbox, following: Channel[int], report: Reporter | None) -> None:
        super().__init__(inbox, [following], report)
        self._following = following

    async def handle(self, message: int) -> None:
        """Send it to the next."""
        with self.report.span("relay", gid=message):
            await self._following.send(message)


async def hops_us(actors: int, messages: int, *, spans: bool, burst: int, folder: Path) -> tuple[float, int]:
    """Microseconds a hop, down a line of `actors` relays, `burst` messages at a time on the way; spans dropped.

    What is still to be written of the spans when the last message has arrived is not in the time.
    """
    metrics_box = Mailbox("metrics")
    boxes = [Mailbox(f"relay {i}") for i in range(actors + 1)]
    channels: list[Channel[int]] = [box.channel("numbers", int, bound=burst) for box in boxes]
    relays = [
        Relay(
            boxes[i],
            channels[i + 1],
            Reporter("relay", None, metrics_box.channel("spans", Span, bound=4096, overflow="drop_oldest"))
            if spans
            else None,
        )
        for i in range(actors)
    ]
    news: Broadcast[Heard] = Broadcast("news", Update, GroupClosed, Incident)
    sinks = Sinks([TraceWriter(folder / "trace.json")])
    metrics = Metrics(metrics_box, sinks=sinks, listeners=news, tally=Tally())
    took_s = 0.0

    async def drive() -> None:
        nonlocal took_s
        start_s = time.perf_counter()
        for first in range(0, messages, burst):
            for number in range(first, first + burst):
                await channels[0].send(number)
            for _ in range(burst):
                boxes[-1].done(await boxes[-1].take())
        took_s = time.perf_counter() - start_s
        channels[0].close()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_roles, [*relays, metrics] if spans else relays)
        await drive()
    dropped = sinks.dropped + sum(channel.stats().dropped for channel in metrics_box.channels)
    return took_s / messages / (actors + 1) * 1e6, dropped


def spans_of(trace: Path) -> list[Span]:
    """The spans that a trace file was made of, lanes numbered over all actors."""
    events = json.loads(trace.read_text())
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    return [
        Span(
            actor=names[event["tid"]].split()[0],
            name=event["name"],
            kind=event["cat"],
            start_s=event["ts"] / 1e6,
            end_s=(event["ts"] + event["dur"]) / 1e6,
            lane=event["tid"],
        )
        for event in events
        if event["ph"] == "X"
    ]


def step_shares(spans: list[Span]) -> list[dict[str, float]]:
    """For every step, from the end of one `learn` to the end of the next: its seconds, and those in which neither the
    device nor a reward was at work; how many of them each other kind of work had, by name."""
    ends = sorted(span.end_s for span in spans if span.actor == "learner" and span.name == "learn")
    by_actor: defaultdict[str, list[Span]] = defaultdict(list)
    for span in spans:
        by_actor[span.actor].append(span)
    steps = []
    for start_s, end_s in pairwise(ends):
        device = [s for actor in ON_DEVICE for s in by_actor[actor] if s.name in {"prefill", "decode", "learn"}]
        paid: list[Interval] = Times(device, start_s, end_s).work + Times(by_actor["scorer"], start_s, end_s).work
        bare = difference([(start_s, end_s)], union(paid))
        step = {"step_ms": (end_s - start_s) * 1e3, "machinery_ms": length(bare) * 1e3}
        for name in {(s.actor, s.name) for s in spans if s.kind == "work" and s.start_s < end_s and s.end_s > start_s}:
            work = union([(max(s.start_s, start_s), min(s.end_s, end_s)) for s in spans if (s.actor, s.name) == name])
            seen = length(work) - length(difference(work, bare))
            step[f"{name[0]}: {name[1].split(':')[0]}"] = seen * 1e3
        steps.append(step)
    return steps


def demo_steps(steps: int) -> list[dict[str, float]]:
    """Run the demo for so many steps, in a folder that is thrown away."""
    with TemporaryDirectory() as folder:
        settings = {
            "output": f"{folder}/run",
            "learner": {"max_steps": steps + WARM_UP_STEPS + 1},
            "checkpoint": {"every": 10_000},
            "metrics": {"sinks": ["jsonl", "trace"]},
        }
        troupe.train(troupe.load_config(DEMO_CONFIG, [settings]))
        return step_shares(spans_of(Path(folder) / "run" / "trace.json"))[WARM_UP_STEPS:]


def main() -> None:
    """Measure and print the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=40, help="of the demo; 0: only the hops")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    about = {"machine": platform.platform(), "python": platform.python_version(), "troupe": troupe.__version__}
    with TemporaryDirectory() as folder:
        for actors, spans, burst in ((1, False, 1), (5, False, 1), (1, True, 1), (5, True, 1), (5, False, 16)):
            runs = [
                anyio.run(lambda: hops_us(actors, args.messages, spans=spans, burst=burst, folder=Path(folder)))  # noqa: B023
                for _ in range(args.repeats)
            ]
            line = {"benchmark": "hop", "actors": actors, "spans": spans, "burst": burst, "messages": args.messages}
            times = [took_us for took_us, _ in runs]
            line |= {"spans_dropped": max(dropped for _, dropped in runs)}
            line |= {"least_us": round(min(times), 2), "median_us": round(statistics.median(times), 2)}
            print(json.dumps(line | about), flush=True)
    if args.steps:
        steps = demo_steps(args.steps)
        shares = [step["machinery_ms"] / step["step_ms"] for step in steps]
        line = {"benchmark": "machinery", "steps": len(steps), "share_least": round(min(shares), 4)}
        line |= {"share_median": round(statistics.median(shares), 4)}
        names = sorted({name for step in steps for name in step})
        line |= {name: round(statistics.median(step.get(name, 0.0) for step in steps), 3) for name in names}
        print(json.dumps(line | about), flush=True)


if __name__ == "__main__":
    main()
