"""Small whole runs, as a user makes them, and what a user finds in their folders."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
from click.testing import CliRunner, Result

import troupe
from tests.support.fakes import tiny_config, weigh_ids
from troupe.cli.main import main
from troupe.policy import Weights, load_policy
from troupe.records.store.completions import Query, StoredCompletion
from troupe.records.store.read import open_store
from troupe.rewards import Reward
from troupe.run.result import RunResult

STORED: dict[str, Any] = {"metrics__sinks": ["jsonl", "sqlite"], "schedule__blas_threads": 1}
"""A run whose completions can be looked at, and that leaves the other cores to other tests."""

_TIMED = ("time", "tokens_per_second", "memory", "queue/", "cluster/", "spans_dropped")
"""Parts of the names of metrics that are of clocks and machines."""


def train(model: Path, folder: Path, *rewards: Reward, **settings: Any) -> RunResult:
    """4 steps × 2 prompts × 3 completions in `folder`/run, to the end; settings as `section__key=value`."""
    given = rewards or (() if settings.get("rewards__functions") else (weigh_ids,))
    return troupe.train(tiny_config(model, folder, **STORED | settings), given)


def lines(run: Path | str) -> list[dict[str, Any]]:
    """metrics.jsonl, a step a line."""
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def timeless(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Those metrics that say what was learned, and not how fast, or by what."""
    return {name: value for name, value in metrics.items() if not any(part in name for part in _TIMED)}


def column(run: Path | str, name: str) -> list[Any]:
    """One metric, step by step."""
    return [line[name] for line in lines(run)]


def completions(run: Path | str, **query: Any) -> list[StoredCompletion]:
    """What run.sqlite has of the completions."""
    with open_store(Path(run)) as store:
        return list(store.completions(Query(**query)))


def in_store(run: Path | str, sql: str) -> list[tuple[Any, ...]]:
    """What run.sqlite says, as any program may ask it."""
    with closing(sqlite3.connect(f"file:{Path(run) / 'run.sqlite'}?mode=ro", uri=True)) as store:
        return store.execute(sql).fetchall()


def incidents(run: Path | str) -> list[tuple[str, str]]:
    """Kind and message of every incident, in order."""
    return [(kind, message) for kind, message in in_store(run, "SELECT kind, message FROM incidents ORDER BY rowid")]


def policy_of(run: Path | str) -> Weights:
    """The policy that a run ended with."""
    return load_policy(Path(run) / "final").weights


def summary(run: Path | str) -> RunResult:
    """What became of a run."""
    return msgspec.json.decode((Path(run) / "summary.json").read_bytes(), type=RunResult)


def distance(one: Weights, other: Weights) -> float:
    """The Euclidean distance of two policies."""
    squares = [float(mx.sum((one[name] - other[name]) ** 2)) for name in one]
    return math.sqrt(sum(squares))


def call(*arguments: str | Path, text: str | None = None) -> Result:
    """The command line, in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=text)


def done(*arguments: str | Path, text: str | None = None) -> str:
    """What a command that must succeed prints."""
    result = call(*arguments, text=text)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str | Path, text: str | None = None) -> str:
    """The one message of a command whose input is bad: exit code 2, no traceback."""
    result = call(*arguments, text=text)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.stderr


def names_in(folder: Path) -> set[str]:
    """Files and folders directly in a folder."""
    return {path.name for path in folder.iterdir()}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A dataset, an object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
