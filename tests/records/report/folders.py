"""Run folders made by hand, for reports."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec

from tests.support.stored import closed, update
from troupe.messages import CheckpointWritten, Incident
from troupe.records.layout import STORE
from troupe.records.sinks.jsonl import JsonlSink
from troupe.records.sinks.sqlite import SqliteSink

RUN_TOML = """\
seed = 7
[model]
path = "/models/tiny <b>model"
[rewards]
functions = ["exact_answer", "/home/me/judge.py:score"]
[learner]
epochs = 3
lr = 1e-6
"""


class Clock:
    """Ten seconds pass with every look."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        self.now_s += 10.0
        return self.now_s


def metrics_of(step: int) -> dict[str, float]:
    """What the learner might tell of a step ≥ 1."""
    return {
        "reward": step / 10,
        "reward_std": 0.5,
        "reward_std_within_groups": 0.25,
        "frac_reward_zero_std": 0.0,
        "rewards/r/mean": step / 20,
        "rewards/style/mean": math.nan if step == 2 else 1.0 - step / 20,
        "loss": (-1.0) ** step / step,
        "kl": step / 100,
        "clip_ratio/region_mean": 0.0,
        "completions/mean_length": 4.0,
        "completions/min_length": 2.0,
        "completions/max_length": 5.0 + step,
        "learning_rate": 1e-6,
        "num_tokens": 100.0 * step,
        "epoch": step / 4,
        "step_time": 2.0,
        "tokens_per_second": 10.0 * step,
        "peak_memory_gb": 1.5,
        "time/learner/busy": 0.5,
        "time/learner/idle": 0.25,
        "time/device_s": 1.5,
        "time/reward/hidden_s": 0.5,
        "time/reward/exposed_s": 0.125,
        "spans_dropped": 0.0,
        "judge/speed": 3.0,
    }


def write_steps(
    folder: Path, first: int, last: int, *, store: bool = True, lines: bool = True, clock: Clock | None = None
) -> None:
    """A start of a run that makes the steps `first` to `last`, two groups each."""
    sinks: list[Any] = []
    if store:
        program, machine = "0.9", "node-7, 4 processors"
        sinks.append(
            SqliteSink(folder / STORE, first_step=first - 1, program=program, machine=machine, clock=clock or Clock())
        )
    if lines:
        sinks.append(JsonlSink(folder / "metrics.jsonl", first_step=first - 1))
    for sink in sinks:
        sink.open()
        for step in range(first, last + 1):
            if sink.name == "sqlite":
                sink.write(closed(step, 0))
                sink.write(closed(step, 1, (0.5, 0.75, step / 10)))
            sink.write(update(step, **metrics_of(step)))
            sink.flush()
        sink.close()


def make_run(folder: Path, steps: int = 5, **options: Any) -> Path:
    """The folder of a run that nobody is at, without a summary: it was cut off."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.toml").write_text(RUN_TOML, encoding="utf-8")
    if steps:
        write_steps(folder, 1, steps, **options)
    return folder


def finish(folder: Path, steps: int, total_steps: int, **more: Any) -> None:
    """Write the summary of a start that ended as it should."""
    summary = {"steps": steps, "total_steps": total_steps, "incidents": {"late": 2}, **more}
    (folder / "summary.json").write_bytes(msgspec.json.encode(summary))


def tell(folder: Path, *messages: Incident | CheckpointWritten, first_step: int) -> None:
    """Add to the store, as another start of the run."""
    sink = SqliteSink(folder / STORE, first_step=first_step, program="0.9", clock=Clock(5000.0))
    sink.open()
    for message in messages:
        sink.write(message)
    sink.flush()
    sink.close()
