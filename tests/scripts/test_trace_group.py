"""scripts.trace_group: a run of the program as it is, with a reward of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.trace_group import MOST_HOPS, REWARDS, trace


@pytest.mark.parametrize("kind", REWARDS)
def test_a_group_is_followed_from_its_prompt_to_the_weights(kind: str, tmp_path: Path) -> None:
    seen = trace(REWARDS[kind], tmp_path)
    assert seen.hops[0] == "rewards/manager.py"
    assert len(seen.hops) <= MOST_HOPS, seen.calls
    actors = {file for file in seen.stations if file.startswith("actors/")}
    assert {"actors/prompter.py", "actors/scorer.py"} < actors
    assert not actors & {"actors/metrics.py", "actors/checkpointer.py"}
    assert {"dataset/prompts.py", "grpo/loss.py", "grpo/optimizer.py"} < set(seen.stations)
