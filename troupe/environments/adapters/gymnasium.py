"""`gymnasium:ENV_ID?option=value`: environments of gymnasium whose observations and actions are texts.

Options are arguments of `gymnasium.make`, but `wrapper`: FILE.py:NAME or MODULE:NAME of what makes texts of the
observations and actions of an environment that has others. A row's column `seed` says which world it is, and `options`
is given to `reset` where there is one.
"""

from collections.abc import Callable
from typing import Any

from troupe.environments.adapters.options import check_version, load_code, package, read_options
from troupe.environments.convention import StepResult
from troupe.errors import WorldError
from troupe.rewards.faults import described

PREFIX = "gymnasium"


class Gymnasium:
    """One environment of gymnasium: what the policy says is its action.

    What is no action of it is not made: the policy reads so, and may try again.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._env = make()

    def reset(self, seed: int, options: dict[str, Any] | None = None, **columns: Any) -> str:
        """Begin the world of this seed; its first observation."""
        observation, _ = self._env.reset(seed=seed, options=options)
        return str(observation)

    def step(self, text: str) -> StepResult:
        """Take what was said as the action."""
        action = text.strip()
        if action not in self._env.action_space:
            return StepResult(f"That is no action of {self._env.action_space}.", 0.0)
        observation, reward, terminated, truncated, info = self._env.step(action)
        return StepResult(str(observation), float(reward), bool(terminated or truncated), dict(info))

    def close(self) -> None:
        """Let go of what it holds."""
        self._env.close()


def factory(rest: str) -> Callable[[], Gymnasium]:
    """What makes the environment of a name with options.

    Raises:
        WorldError: gymnasium does not know it or cannot make it, or it has spaces that are no texts.
        ImportError: gymnasium is missing.
    """
    gymnasium = package(PREFIX)
    check_version(PREFIX, (1, 0))
    name, options = read_options(rest, PREFIX)
    wrapper = load_code(options.pop("wrapper"), "wrapper") if "wrapper" in options else None

    def make() -> Any:
        env = gymnasium.make(name, **options)
        return env if wrapper is None else wrapper(env)

    try:
        tried = make()
    except Exception as error:
        raise WorldError(f'environment "{PREFIX}:{rest}" cannot be made: {described(error)}') from error
    for kind in ("observation", "action"):
        space = getattr(tried, f"{kind}_space")
        if not isinstance(space, gymnasium.spaces.Text):
            raise WorldError(
                f'environment "{PREFIX}:{rest}" has the {kind} space {space}, which is no text; give a wrapper that '
                f"makes one of it: {PREFIX}:{name}?wrapper=FILE.py:NAME"
            )
    tried.close()
    return type(name, (Gymnasium,), {"__init__": lambda self: Gymnasium.__init__(self, make)})
