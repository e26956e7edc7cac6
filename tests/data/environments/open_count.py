"""An environment of OpenEnv: to be counted up to a number."""

from typing import Any

from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State


class CountAction(Action):
    """What is said."""

    said: str


class CountObservation(Observation):
    """What comes back."""

    heard: str = ""
    count: int = 0


class Count(Environment[CountAction, CountObservation, State]):
    """Done when it was counted up to `goal`."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self._state = State()
        self._goal = 0

    def reset(self, seed: int | None = None, episode_id: str | None = None, goal: int = 3, **kwargs: Any) -> Any:
        self._state = State(episode_id=episode_id)
        self._goal = goal
        return CountObservation(heard=f"count to {goal}", reward=None, done=False)

    def step(self, action: CountAction, timeout_s: float | None = None, **kwargs: Any) -> CountObservation:
        right = action.said == str(self._state.step_count + 1)
        if right:
            self._state.step_count += 1
        done = self._state.step_count == self._goal
        heard = "go on" if right else "no"
        return CountObservation(heard=heard, count=self._state.step_count, reward=float(right), done=done)

    @property
    def state(self) -> State:
        return self._state


class MoveAction(Action):
    """Two numbers."""

    x: int
    y: int


class Move(Environment[MoveAction, CountObservation, State]):
    """Goes where it is told."""

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Any:
        return CountObservation(heard="at 0, 0")

    def step(self, action: MoveAction, timeout_s: float | None = None, **kwargs: Any) -> CountObservation:
        return CountObservation(heard=f"at {action.x}, {action.y}")

    @property
    def state(self) -> State:
        return State()
