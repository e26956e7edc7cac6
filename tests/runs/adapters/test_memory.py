"""The memory that a run of an adapter is planned with: the base once, and little else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.adapters import LORA, adapter_config
from tests.support.fakes import weigh_ids
from tests.support.runs import done, refused, summary
from troupe.errors import ConfigError
from troupe.policy import load_policy, parameter_count
from troupe.run.memory import Phases
from troupe.run.prepare import prepare

SMALL: dict[str, Any] = LORA | {"adapter__rank": 1, "generation__max_completion_length": 8}
RUN = ("-m", "m", "-d", "p.json", "--num-generations", "3", "--batch-size", "2", "--reward", "length")
SHORT = ("--max-steps", "2", "--set", "generation.max_completion_length=8")


def phases(model: Path, folder: Path, **settings: Any) -> Phases:
    return prepare(adapter_config(model, folder, **SMALL | settings), [weigh_ids]).memory.phases


def test_the_base_is_in_every_phase_once_and_once_more_in_every_process(tmp_path: Path, ragged_model: Path) -> None:
    base = 4 * parameter_count(load_policy(ragged_model).config)
    trained = 4 * 2 * (64 + 48 + 48 + 64 + 3 * 96)  # a row of A and a column of B beside each matrix of two layers
    here = phases(ragged_model, tmp_path)
    assert [items["base"] for items in here.values()] == [base] * 3
    assert [items["policy versions"] for items in here.values()] == [trained] * 3
    there = phases(
        ragged_model,
        tmp_path,
        schedule__generator="process",
        schedule__generator_processes=2,
        schedule__max_staleness=1,
    )
    for items in there.values():
        assert items["base"] == base
        assert items["policy versions"] == 2 * trained
        assert items["policy versions of the generator"] == 2 * (base + 2 * trained)
    whole = adapter_config(ragged_model, tmp_path, adapter__kind=None, generation__max_completion_length=8)
    assert "base" not in prepare(whole, [weigh_ids]).memory.phases["generate"]


def test_a_limit_may_hold_an_adapter_s_run_and_not_that_of_the_whole_network(desk: Path) -> None:
    limit = ("--memory-limit", "0.0005")
    assert "memory_limit_gb is 0.0005" in refused("train", *RUN, *SHORT, *limit, "-o", "out")
    assert "note: memory: at most" in done("train", *RUN, *SHORT, *limit, "--lora", "1", "-o", "out")
    assert summary("out").complete


def test_a_limit_that_the_base_alone_fills_is_refused(tmp_path: Path, ragged_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"memory_limit_gb is 0.0001, .* \(\w+: base 0.00011, policy versions "):
        phases(ragged_model, tmp_path, memory_limit_gb=0.0001)
