"""Runs made by hand, to be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from tests.records.report.folders import Clock
from tests.support.stored import closed, update
from troupe.messages import Evaluated, EvaluatedRow, EvaluatedSample
from troupe.records.layout import RUN_TOML, STORE
from troupe.records.sinks.sqlite import SqliteSink
from troupe.rewards.estimates import figures_of


def evaluated(version: int, scores: Mapping[str, Sequence[float | None]], name: str = "sums") -> Evaluated:
    """A set of which each prompt has samples with these scores."""
    rows = tuple(
        EvaluatedRow(
            row=row,
            prompt=prompt,
            columns={},
            samples=tuple(
                EvaluatedSample(text=f"{prompt} {version} {i}", tokens=3, finish_reason="stop", score=score)
                for i, score in enumerate(told)
            ),
        )
        for row, (prompt, told) in enumerate(scores.items())
    )
    return Evaluated(version=version, name=name, metrics=figures_of(name, rows), rows=rows)


def make_run(
    folder: Path,
    rewards: Sequence[float],
    *,
    settings: Mapping[str, Any] | None = None,
    evaluations: Sequence[Evaluated] = (),
    metrics: Mapping[str, float] | None = None,
    step_s: float = 2.0,
) -> Path:
    """The folder of a run with these rewards, a group a step; each step takes `step_s` and a thousand tokens."""
    folder.mkdir(parents=True)
    config = {"seed": 1, "output": str(folder), "model": {"path": "/models/tiny"}, **(settings or {})}
    (folder / RUN_TOML).write_text(tomli_w.dumps(config), encoding="utf-8")
    sink = SqliteSink(folder / STORE, clock=Clock())
    sink.open()
    for step, reward in enumerate(rewards, 1):
        sink.write(closed(step, 0, (reward, reward / 2)))
        told = {"reward": reward, "step_time": step_s, "num_tokens": 1000.0 * step, **(metrics or {})}
        sink.write(update(step, **told))
    for one in evaluations:
        sink.write(one)
    sink.flush()
    sink.close()
    return folder


def nobody(folder: Path) -> tuple[None, list[str]]:
    """No run answers."""
    return None, []
