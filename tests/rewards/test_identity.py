"""A reward is told from another one of its name."""

from __future__ import annotations

from pathlib import Path

from troupe.rewards.identity import reward_identity
from troupe.rewards.loading import load_reward


def test_another_content_of_a_file_is_another_reward_and_another_place_is_not(tmp_path: Path) -> None:
    code = "def kind(completions, **_):\n    return [1.0] * len(completions)\n"
    told = []
    for folder, text in (("a", code), ("b", code), ("c", code + "# changed\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.py").write_text(text)
        spec = f"{tmp_path / folder / 'own.py'}:kind"
        told.append(reward_identity(spec))
        assert told[-1].startswith("own.py:kind (sum ")
        assert reward_identity(load_reward(spec)) == "kind"
    assert told[0] == told[1] != told[2]
    assert reward_identity("format:<a>.*") == "format:<a>.*"
    assert reward_identity("troupe.rewards.builtin:length_reward").startswith(
        "troupe.rewards.builtin:length_reward (sum "
    )
