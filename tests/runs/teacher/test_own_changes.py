"""A run's own teacher that is another one after a resume, and completions behind prompts that say more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import troupe
from tests.runs.teacher.test_own_teacher import config_of
from tests.support.adapters import cut_back
from tests.support.fakes import RAGGED, same_bits, weigh_ids
from tests.support.runs import write_jsonl
from troupe.checkpoint import Checkpoint, load_checkpoint
from troupe.errors import CheckpointError, DatasetError
from troupe.policy import Weights
from troupe.run.prepare import prepare

pytestmark = pytest.mark.no_cover
WARM = 2


@pytest.mark.slow
def test_another_kind_of_weights_begins_with_what_a_checkpoint_has(tmp_path: Path, ragged_model: Path) -> None:
    rows = tmp_path / "given.json"
    rows.write_text(json.dumps([{"prompt": "ab", "completion": "cd"}] * 4), encoding="utf-8")
    warm: dict[str, Any] = {"warm_start__path": str(rows), "warm_start__steps": WARM, "warm_start__lr": 1e-2}
    settings = warm | {"checkpoint__every": 1}

    def run(kind: str) -> Path:
        return Path(
            troupe.train(
                config_of(ragged_model, tmp_path / kind, **settings, teacher__model_kind=kind), [weigh_ids]
            ).folder
        )

    def average(whole: Path, version: int, kind: str) -> Weights:
        cut = cut_back(whole, version, tmp_path / f"{whole.parent.name}-{version}-{kind}")
        config = config_of(ragged_model, cut, **settings, teacher__model_kind=kind)
        found = prepare(config, [weigh_ids], resume=True, allow_changes=["teacher.model_kind"]).start.average
        assert found is not None
        return found

    def checkpoint(whole: Path, version: int) -> Checkpoint:
        return load_checkpoint(whole / "checkpoints" / f"step-{version:08d}")

    moving, live, base = run("ema"), run("live"), run("base")
    warmed = checkpoint(base, WARM).weights
    for whole in (moving, live, base):
        assert same_bits(average(whole, WARM, "base"), warmed)
    assert same_bits(average(base, WARM + 1, "base"), warmed)
    for whole in (moving, live):
        with pytest.raises(CheckpointError, match="the policy that the warm start ended with"):
            average(whole, WARM + 1, "base")
    assert same_bits(average(live, WARM + 1, "ema"), checkpoint(live, WARM + 1).weights)


def test_completions_leave_room_for_what_the_teacher_sees(tmp_path: Path, ragged_model: Path) -> None:
    most = RAGGED.max_position_embeddings
    config = config_of(ragged_model, tmp_path, generation__max_completion_length=most)
    prepared = prepare(config, [weigh_ids])
    longest = max(map(len, prepared.inputs.demonstrated or ()))
    assert longest > prepared.inputs.longest_prompt
    assert prepared.config.generation.max_completion_length == most - longest
    assert any(f"lowered from {most} to {most - longest}" in notice for notice in prepared.notices)
    rows = [{"prompt": "1", "answer": "1"}, {"prompt": "1", "answer": "1" * most}]
    config = config_of(ragged_model, tmp_path, data__path=str(write_jsonl(tmp_path / "long.jsonl", rows)))
    with pytest.raises(DatasetError, match=r"long\.jsonl:2: .*with its 'answer', by teacher\.prompt_template"):
        prepare(config, [weigh_ids])


def test_behind_a_warm_start_the_reference_is_another_copy(tmp_path: Path, ragged_model: Path) -> None:
    rows = str(write_jsonl(tmp_path / "given.jsonl", [{"prompt": "ab", "completion": "cd"}]))
    counted = []
    for warm in ({}, {"warm_start__path": rows, "warm_start__steps": WARM}):
        settings: dict[str, Any] = {"teacher__model_kind": "base", "learner__beta": 0.1, **warm}
        phases = prepare(config_of(ragged_model, tmp_path, **settings), [weigh_ids]).memory.phases
        counted.append({"weights as a teacher" in phase for phase in phases.values()})
    assert counted == [{False}, {True}]
