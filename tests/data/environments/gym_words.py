"""FrozenLake in words: a wrapper as somebody writes it for gymnasium."""

import string
from typing import Any

import gymnasium
from gymnasium.spaces import Text

MOVES = {"left": 0, "down": 1, "right": 2, "up": 3}


class Words(gymnasium.Wrapper[str, str, Any, Any]):
    """Says where the elf is, and takes a direction."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.observation_space = Text(20, charset=string.ascii_lowercase + string.digits + " ")
        self.action_space = Text(5, min_length=2, charset=string.ascii_lowercase)

    def reset(self, **kwargs: Any) -> Any:
        place, info = self.env.reset(**kwargs)
        return f"you are at {place}", info

    def step(self, action: str) -> Any:
        place, *rest = self.env.step(MOVES[action])
        return f"you are at {place}", *rest
