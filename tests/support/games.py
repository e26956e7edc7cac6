"""A game for whole runs, written to a file as a user's would be, and a policy that plays it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from tests.support.fakes import RAGGED
from tests.support.tiny import write_tiny_model

GAME = '''
import json, os, random, time
from pathlib import Path

from troupe.environments import StepResult

CALLS = Path(__file__).with_name("calls.jsonl")
DELAY_S = float(os.environ.get("GAME_DELAY_S", "0"))


def note(*what):
    with CALLS.open("a") as file:
        file.write(json.dumps(what) + "\\n")


class Game:
    """Says how long it was talked to; over after two to four turns."""

    def reset(self, answer, **columns):
        self.answer, self.heard = answer, []
        return f"({answer})"

    def step(self, text):
        time.sleep(random.random() * DELAY_S)
        self.heard.append(text)
        length = sum(map(len, self.heard))
        note(self.answer, self.heard)
        done = len(self.heard) >= 2 + length % 3
        return StepResult(f"{length}!", reward=length % 7 / 7, done=done, info={"call": [self.answer, self.heard]})

    def save_state(self):
        return [self.answer, self.heard]

    def load_state(self, saved):
        self.answer, self.heard = saved

    def get_reward(self):
        return len(self.heard) + sum(map(len, self.heard)) % 5 / 5
'''


def write_game(folder: Path) -> Path:
    """The file that has it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "game.py"
    path.write_text(GAME)
    return path


def calls(folder: Path) -> Counter[str]:
    """What the game was told, with how often."""
    file = folder / "calls.jsonl"
    return Counter(file.read_text().splitlines()) if file.exists() else Counter()


def write_player(folder: Path) -> Path:
    """A tiny model with room for conversations, whose turns end early."""
    return write_tiny_model(folder, msgspec.structs.replace(RAGGED, max_position_embeddings=256))


def acting(folder: Path, **settings: Any) -> dict[str, Any]:
    """Settings of a run that plays it."""
    return {
        "environment__factory": f"{write_game(folder)}:Game",
        "environment__max_turns": 4,
        "data__chat": "always",
        "generation__max_completion_length": 60,
        **settings,
    }
