"""The settings of a decode: defaults that change nothing, and bounds."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from troupe.policy.decode.requests import GenerationConfig


def test_defaults_end_completions_only_by_stop_ids_and_length() -> None:
    config = GenerationConfig()
    assert (config.num_generations, config.max_completion_length) == (8, 256)
    assert (config.stop, config.repetition_cutoff, config.memory_limit_gb) == ((), 0, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_generations": 0}, "num_generations is 0, but must be at least 1"),
        ({"max_completion_length": 0}, "max_completion_length is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"stop": ("a", "")}, "stop holds an empty string"),
        ({"repetition_cutoff": 1}, "repetition_cutoff is 1, but must be at least 2"),
        ({"repetition_cutoff": -1}, "repetition_cutoff is -1"),
        ({"repetition_pattern": 0}, "repetition_pattern is 0"),
        ({"memory_limit_gb": 0.0}, "memory_limit_gb is 0.0, but must be above 0"),
        ({"memory_limit_gb": float("inf")}, "memory_limit_gb is inf"),
    ],
)
def test_settings_out_of_bounds_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**change)


def test_a_file_gives_lists() -> None:
    config = msgspec.convert({"stop": ["</answer>", "\n\n"], "memory_limit_gb": 2}, GenerationConfig)
    assert config.stop == ("</answer>", "\n\n")
    assert config.memory_limit_gb == 2.0
