"""Makes the policy of this example: a small network that knows how to call the tool, and plays badly.

    python examples/higher_lower/make_policy.py

It writes `policy/`, and `games.jsonl` and `held-out.jsonl`, which are there already, beside this file. The policy is a
Qwen3 network of some 100,000 weights with a vocabulary of its own, in which every number of the game is one token. It
is trained, supervised, on games of a teacher who mostly tries one number after the other, and halves what is left only
in one game of five. A game is a range and a secret number in it; no held-out game is ever played in either training.
Takes half a minute on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_policy import END, Part, Shape, make_policy

HERE = Path(__file__).parent
CALL, CLOSE = '<tool_call>\n{"name": "guess", "arguments": {"number": ', "}}\n</tool_call>"
LARGEST = 30
WIDTH = 20
"""Numbers in a range."""
TRIES = 5
HELD_OUT = 50
WORDS = (CALL, CLOSE, "guess", "higher", "lower", "right", ": ", " to ", "done", *map(str, range(10, LARGEST + 1)))
CAREFUL = 0.2
"""Part of the games in which the teacher halves what is left; in the others it tries one number after the other."""


@dataclass(frozen=True)
class Game:
    """A range, and the number in it."""

    low: int
    secret: int

    @property
    def high(self) -> int:
        return self.low + WIDTH - 1

    def row(self) -> dict[str, Any]:
        """As the dataset has it."""
        prompt = [{"role": "user", "content": f"{self.low} to {self.high}"}]
        return {"prompt": prompt, "low": self.low, "high": self.high, "secret": self.secret}


def split_games() -> tuple[list[Game], list[Game]]:
    """All games, shuffled → (those that may be played in training, held-out ones)."""
    games = [Game(low, low + n) for low in range(1, LARGEST - WIDTH + 2) for n in range(WIDTH)]
    random.Random(0).shuffle(games)
    return games[HELD_OUT:], games[:HELD_OUT]


def play(game: Game, is_careful: bool) -> Iterator[tuple[int, str]]:
    """Guesses and what is answered, until the number is found or the tries are over."""
    low, high = game.low, game.high
    for _ in range(TRIES):
        guess = (low + high) // 2 if is_careful else low
        if guess == game.secret:
            yield guess, "right"
            return
        word, low, high = ("higher", guess + 1, high) if guess < game.secret else ("lower", low, guess - 1)
        yield guess, f"{word}: {low} to {high}"


def conversation(game: Game, rng: random.Random) -> list[Part]:
    """A whole game as the chat template writes it."""
    parts = [(f"<|system|>guess{END}<|user|>{game.low} to {game.high}{END}", False)]
    for guess, answer in play(game, rng.random() < CAREFUL):
        parts += [("<|assistant|>", False), (f"{CALL}{guess}{CLOSE}{END}", True), (f"<|tool|>{answer}{END}", False)]
    return [*parts, ("<|assistant|>", False), (f"done{END}", True)]


def lines(games: Sequence[Game]) -> str:
    """As a file of rows."""
    return "".join(f"{json.dumps(game.row())}\n" for game in games)


def make(out: Path, seed: int, shape: Shape) -> None:
    """Write `policy/`, `games.jsonl` and `held-out.jsonl` into the folder `out`."""
    games, held_out = split_games()
    rng = random.Random(seed)
    make_policy(out / "policy", WORDS, lambda: conversation(rng.choice(games), rng), shape, seed)
    (out / "games.jsonl").write_text(lines(games), encoding="utf-8")
    (out / "held-out.jsonl").write_text(lines(held_out), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the policy of this example.")
    parser.add_argument("--out", type=Path, default=HERE, metavar="FOLDER", help="default: beside this file")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args()
    make(options.out, options.seed, Shape(steps=240))
