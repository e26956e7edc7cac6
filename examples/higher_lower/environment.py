"""A number that is to be found: the environment's `guess` is the tool that the policy calls.

A row has `low`, `high` and `secret`. There are `TRIES` guesses; who halves what is left each time needs no more.
"""

from __future__ import annotations

from typing import Any

TRIES = 5
"""By halving, one of up to 31 numbers is found in five."""


class HigherLower:
    """One game."""

    def __init__(self) -> None:
        self.low = self.high = self.secret = 0
        self.guesses: list[int] = []

    def reset(self, low: int, high: int, secret: int, **columns: Any) -> None:
        """Begin a game. The prompt has told the policy what it needs to know, so nothing is added to it."""
        self.low, self.high, self.secret = low, high, secret
        self.guesses = []

    def guess(self, number: int) -> str:
        """Guess the number.

        Args:
            number: What is guessed.

        Returns:
            Whether the secret number is higher or lower, and what is left; or that the guess is right.
        """
        if len(self.guesses) >= TRIES or self.is_found:
            raise RuntimeError("the game is over")
        self.guesses.append(number)
        if number == self.secret:
            return "right"
        if number < self.secret:
            self.low = max(self.low, number + 1)
            return f"higher: {self.low} to {self.high}"
        self.high = min(self.high, number - 1)
        return f"lower: {self.low} to {self.high}"

    @property
    def is_found(self) -> bool:
        """Whether the last guess was right."""
        return self.guesses[-1:] == [self.secret]

    def get_reward(self) -> float:
        """1 where the number was found, else 0."""
        return float(self.is_found)
