"""Checkpoints in whole runs: a disk that fails for a while, a damaged newest one, the best one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import troupe
from tests.support.fakes import same_bits, tiny_config, weigh_ids
from tests.support.straight import run_straight
from troupe.actors import checkpointer as writer_room
from troupe.checkpoint import files, list_checkpoints, load_checkpoint, save_checkpoint


def versions(run: Path) -> list[int]:
    return [load_checkpoint(folder).state.version for folder in list_checkpoints(run)]


def test_a_disk_that_fails_for_a_while_changes_nothing_that_is_learned(
    tmp_path: Path, ragged_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save: Callable[..., int] = save_checkpoint
    tried: list[str] = []

    def full_for_a_while(path: Path, *args: Any, **settings: Any) -> int:
        tried.append(path.name[-1])
        if path.name[-1] in "12":
            raise OSError(28, "No space left on device")
        return save(path, *args, **settings)

    monkeypatch.setattr(writer_room, "save_checkpoint", full_for_a_while)
    config = tiny_config(ragged_model, tmp_path, checkpoint__every=1, schedule__max_staleness=1)
    result = troupe.train(config, [weigh_ids])
    assert result.complete
    assert set(tried) == {"1", "2", "3", "4"}
    assert result.incidents == {"checkpoint_failed": 2, "checkpoint_back": 1}
    run = Path(result.folder)
    assert versions(run) == [4, 3]
    assert same_bits(load_checkpoint(list_checkpoints(run)[0]).weights, run_straight(config, weigh_ids).weights)


def test_a_damaged_future_goes_when_the_resumed_run_has_a_checkpoint_of_its_own(
    tmp_path: Path, ragged_model: Path
) -> None:
    config = tiny_config(ragged_model, tmp_path, checkpoint__every=1, checkpoint__keep=3)
    result = troupe.train(config, [weigh_ids])
    run = Path(result.folder)
    weights = load_checkpoint(list_checkpoints(run)[0]).weights
    assert versions(run)[:3] == [4, 3, 2]
    for version in (3, 4):
        (run / "checkpoints" / f"step-{version:08d}" / "optimizer.safetensors").write_bytes(b"harmed")
    again = troupe.train(config, [weigh_ids], resume=True)
    assert again.complete
    assert set(versions(run)) >= {4, 3, 2}, "all of its own, and whole"
    assert same_bits(load_checkpoint(list_checkpoints(run)[0]).weights, weights)


def test_the_best_checkpoint_of_a_run_stays(tmp_path: Path, ragged_model: Path) -> None:
    """By the mean reward of the steps that each one closes, as the metrics have it."""
    config = tiny_config(
        ragged_model, tmp_path, checkpoint__every=1, checkpoint__keep=1, checkpoint__greater_is_better=False
    )
    run = Path(troupe.train(config, [weigh_ids]).folder)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rewards = {line["step"]: line["reward"] for line in lines if "reward" in line}
    assert sorted(rewards) == [1, 2, 3, 4]
    least = min(rewards, key=lambda step: (rewards[step], -step))
    assert versions(run) == sorted({4, least}, reverse=True)
    for folder in list_checkpoints(run):
        state = load_checkpoint(folder).state
        assert state.metrics["reward"] == pytest.approx(rewards[state.version])


def test_a_slow_disk_holds_up_no_step_but_the_next_checkpoint(
    tmp_path: Path, ragged_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole rest of a run is learned while the first checkpoint waits for its disk; then it is as it was."""
    write_all, slow, enough = files._write_all, threading.Event(), threading.Event()

    def patient(descriptor: int, block: memoryview) -> None:
        if not slow.is_set():
            slow.set()
            assert enough.wait(60)
        write_all(descriptor, block)

    monkeypatch.setattr(files, "_write_all", patient)
    config = tiny_config(ragged_model, tmp_path, checkpoint__every=1, checkpoint__keep=9)

    def reward(completion_ids: list[list[int]], trainer_state: Any, **_: Any) -> list[float]:
        if trainer_state.global_step >= 1:
            assert slow.wait(60)
            enough.set()  # the second step is being scored, with the first checkpoint under way
        return weigh_ids(completion_ids)

    result = troupe.train(config, [reward])
    run = Path(result.folder)
    assert versions(run) == [4, 3, 2, 1]
    first = load_checkpoint(list_checkpoints(run)[-1])
    short = tiny_config(ragged_model, tmp_path / "short", learner__max_steps=4, checkpoint__every=1, checkpoint__keep=9)
    other = Path(troupe.train(short, [weigh_ids]).folder)
    assert same_bits(first.weights, load_checkpoint(list_checkpoints(other)[-1]).weights)
    assert same_bits(first.optimizer_state, load_checkpoint(list_checkpoints(other)[-1]).optimizer_state)
