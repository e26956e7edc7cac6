"""The section `[adapter]`: what is refused before any work."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from troupe.policy.adapter.settings import AdapterConfig

NEW = {
    "rank": 8,
    "alpha": 32.0,
    "use_rslora": True,
    "target_modules": ["q_proj"],
    "layers": 2,
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"q_proj": 4.0},
    "init": "gaussian",
}
"""Keys that shape a new adapter, each otherwise than by default."""


def read(**table: Any) -> AdapterConfig:
    return msgspec.convert(table, AdapterConfig)


def refusal(**table: Any) -> str:
    with pytest.raises(msgspec.ValidationError) as caught:
        read(**table)
    return str(caught.value)


def test_the_whole_network_is_trained_unless_an_adapter_is_named() -> None:
    assert read(**msgspec.to_builtins(AdapterConfig())) == AdapterConfig(), "defaults may be written out"
    assert not AdapterConfig().is_on
    assert read(kind="dora").is_on
    assert read(resume_from="runs/a/final").is_on


@pytest.mark.parametrize("key", NEW)
def test_a_key_that_would_do_nothing_is_refused(key: str) -> None:
    assert refusal(**{key: NEW[key]}).startswith(f"adapter.{key} is given, but adapter.kind names no adapter; add")
    assert refusal(resume_from="a", **{key: NEW[key]}).startswith(f"adapter.{key} is given beside adapter.resume_from")
    assert getattr(read(kind="lora", **{key: NEW[key]}), key) not in (None, getattr(AdapterConfig(), key))


def test_dropout_needs_an_adapter_and_may_stand_beside_one_that_there_is() -> None:
    assert refusal(dropout=0.1).startswith("adapter.dropout is given, but adapter.kind names no adapter; add")
    assert read(resume_from="a", dropout=0.1).dropout == read(kind="dora", dropout=0.1).dropout == 0.1


def test_lists_texts_and_numbers_are_told_apart() -> None:
    config = read(kind="dora", target_modules=["q_proj", "mlp.up_proj"], layers=[0, 2])
    assert (config.target_modules, config.layers) == (("q_proj", "mlp.up_proj"), (0, 2))
    config = read(kind="lora", target_modules=".*_proj", layers=2)
    assert (config.target_modules, config.layers) == (".*_proj", 2)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"alpha": 0.0}, "adapter.alpha is 0.0; give a finite number above 0"),
        ({"alpha": -1.0}, "adapter.alpha is -1.0; give"),
        ({"alpha": math.inf}, "adapter.alpha is inf; give"),
        ({"alpha": math.nan}, "adapter.alpha is nan; give"),
        ({"alpha_pattern": {"q_proj": -2.0}}, "adapter.alpha_pattern.q_proj is -2.0; give"),
        ({"alpha_pattern": {"q_(": 2.0}}, "adapter.alpha_pattern: 'q_(' is no regular expression"),
        ({"rank_pattern": {"*": 2}}, "adapter.rank_pattern: '*' is no regular expression"),
        ({"rank_pattern": {"a)|(b": 2}}, "adapter.rank_pattern: 'a)|(b' is no regular expression"),
        ({"rank_pattern": {"(?i)q_proj": 2}}, "adapter.rank_pattern: '(?i)q_proj' is no regular expression that fits"),
        ({"rank_pattern": {"q{99999999999}": 2}}, "adapter.rank_pattern: 'q{99999999999}' is no regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, "Expected `int` >= 1"),
        ({"rank": 0}, "Expected `int` >= 1"),
        ({"dropout": 1.0}, "Expected `float` < 1.0"),
        ({"dropout": -0.1}, "Expected `float` >= 0.0"),
        ({"target_modules": "(q|v_proj"}, "adapter.target_modules: '(q|v_proj' is no regular expression"),
        ({"target_modules": []}, "adapter.target_modules is empty; name modules"),
        ({"target_modules": ""}, "adapter.target_modules is empty; name modules"),
        ({"layers": 0}, "adapter.layers is 0; give how many of the last layers, at least 1, or leave it out"),
        ({"layers": -2}, "adapter.layers is -2; give"),
        ({"layers": []}, "adapter.layers is empty; give"),
        ({"layers": [1, -1]}, "adapter.layers names layer -1; the first layer is 0"),
        ({"init": "pissa"}, "Invalid enum value 'pissa'"),
        ({"lora_alpha": 3}, "Object contains unknown field `lora_alpha`"),
    ],
)
def test_what_cannot_be_is_refused(table: dict[str, Any], words: str) -> None:
    assert refusal(kind="lora", **table).startswith(words)
