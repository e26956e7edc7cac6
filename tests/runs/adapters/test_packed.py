"""Packed bases: not to be trained whole, but adapters beside them are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import pytest

import troupe
from tests.support.adapters import DORA, FILES, LORA, adapter_config, cut_back, newest, train_adapter, write_packed
from tests.support.fakes import RAGGED, delayed, same_bits, weigh_ids
from tests.support.runs import completions, done, names_in, policy_of, refused
from tests.support.straight import run_straight
from tests.support.tiny import write_tiny_model
from troupe.errors import ModelError
from troupe.policy import load_policy

WIDE = msgspec.structs.replace(RAGGED, hidden_size=64, intermediate_size=128, head_dim=16)
"""Rows that groups of 64 numbers divide."""
KINDS: list[dict[str, Any]] = [
    {"group_size": 64, "bits": 4},
    {"group_size": 32, "bits": 3},
    {"group_size": 32, "bits": 8},
    {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    {"group_size": 16, "bits": 4, "mode": "nvfp4"},
]
FLAGS = ("-d", "p.json", "--num-generations", "3", "--batch-size", "2", "--reward", "length")
SHORT = ("--set", "generation.max_completion_length=8", "--max-steps", "2")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("wide") / "wide", WIDE)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, wide: Path) -> Path:
    return write_packed(wide, tmp_path_factory.mktemp("packed") / "q4", group_size=64)


def test_a_packed_network_cannot_be_trained_whole_and_two_ways_out_are_told(tmp_path: Path, packed: Path) -> None:
    with pytest.raises(ModelError, match=rf"{packed}: its weights are quantized, .*\(--lora 16\), .*mlx_lm.convert -d"):
        train_adapter(packed, tmp_path, adapter__kind=None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(
            how,
            id=f"{how.get('mode', 'affine')} {how['bits']}",
            marks=[] if how in (KINDS[0], KINDS[-1]) else pytest.mark.slow,
        )
        for how in KINDS
    ],
)
def test_an_adapter_is_trained_beside_a_packed_base(tmp_path: Path, wide: Path, how: dict[str, Any]) -> None:
    model = write_packed(wide, tmp_path / "packed", **how)
    config = adapter_config(model, tmp_path, schedule__max_staleness=1, **LORA)
    result = troupe.train(config, [delayed(1)])
    straight, found = run_straight(config, weigh_ids), newest(result.folder)
    assert same_bits(found.weights, straight.weights)
    assert same_bits(found.optimizer_state, straight.optimizer_state)
    assert names_in(Path(result.folder) / "final") == FILES | {"MANIFEST.json"}
    trained = load_policy(Path(result.folder) / "final")
    assert same_bits(trained.weights, straight.weights)
    row = mx.array([[97, 98, 99]])
    assert not mx.allclose(trained.model(row), load_policy(model).model(row), atol=1e-2).item()


def test_what_is_learned_beside_a_packed_base_is_learned_beside_its_numbers(
    tmp_path: Path, wide: Path, packed: Path
) -> None:
    """The packed numbers written out are another base's, by which the same completions come and the same is learned."""
    written_out = tmp_path / "float"
    policy = load_policy(packed)
    policy.save(written_out)
    one, two = (train_adapter(model, tmp_path / model.name) for model in (packed, written_out))
    assert same_bits(policy_of(one.folder), policy_of(two.folder))
    assert completions(one.folder) == completions(two.folder)
    other = train_adapter(wide, tmp_path / "wide")
    assert not same_bits(policy_of(one.folder), policy_of(other.folder))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [LORA, DORA], ids=["lora", "dora"])
def test_beside_a_packed_base_too_a_process_writes_the_same_and_a_run_goes_on(
    tmp_path: Path, packed: Path, settings: dict[str, Any]
) -> None:
    settings = settings | {"schedule__max_staleness": 1, "checkpoint__every": 1}
    process = settings | {"schedule__generator": "process"}
    whole = train_adapter(packed, tmp_path, **settings)
    there = train_adapter(packed, tmp_path / "there", **process)
    assert same_bits(policy_of(there.folder), policy_of(whole.folder))
    assert completions(there.folder) == completions(whole.folder)
    again = train_adapter(packed, cut_back(whole.folder, 2, tmp_path / "cut"), resume=True, **process)
    assert same_bits(policy_of(again.folder), policy_of(whole.folder))


def test_from_the_command_line(desk: Path, packed: Path) -> None:
    said = refused("train", "-m", packed, *FLAGS, *SHORT, "-o", "out")
    assert "--lora 16" in said
    done("train", "-m", packed, "--lora", "4", *FLAGS, *SHORT, "-o", "out", "--lr", "0.01")
    ask = ("-p", "ab", "--temperature", "0", "--max-new-tokens", "9")
    answer = done("generate", "-m", "out", *ask)
    assert answer == done("generate", "-m", packed, "--adapter", "out/final", *ask)
    assert "note: the adapter beside its base is exact" in done("fuse", "--adapter", "out", "-o", "packed")
    done("fuse", "--adapter", "out", "-o", "float", "--dequantize")
    assert done("generate", "-m", "float", *ask) == answer
    done("train", "-m", "float", *FLAGS, *SHORT, "-o", "whole")
    assert "quantized" in refused("train", "-m", "packed", *FLAGS, *SHORT, "-o", "again")
