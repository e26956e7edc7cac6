"""What tools and environments have returned, read beside them: on their thread, or in their process."""

import math
from typing import Any

from troupe.environments.convention import Content, EnvironmentFault, StepResult
from troupe.errors import RewardError, sayable
from troupe.rewards.convention import checked_score, shown
from troupe.rewards.extras import plain

_STEP = "return troupe.environments.StepResult(observation, reward, done, info)"


def tool_content(result: Any) -> Content:
    """What the policy reads of what a tool returned: its `str`, as in TRL; a list of blocks of text stays one.

    Raises:
        Whatever its `__str__` raises; ValueError for a block that is no text.
    """
    return _blocks(result) if _is_blocks(result) else sayable(str(result))


def _is_blocks(result: Any) -> bool:
    return (
        isinstance(result, list) and bool(result) and all(isinstance(each, dict) and "type" in each for each in result)
    )


def _blocks(result: list[dict[str, Any]]) -> Content:
    for block in result:
        if block["type"] != "text" or not isinstance(block.get("text"), str):
            raise ValueError(f"a block of type {shown(block['type'])} cannot be read by this model, which reads text")
    return [{"type": "text", "text": sayable(block["text"])} for block in result]


def text_of(content: Content | None) -> str:
    """The text of a content, its blocks one behind the other."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(block["text"] for block in content)


def checked_reset(result: Any, label: str) -> Content | None:
    """What `reset` returned: a text, a list of blocks of text, or None. EnvironmentFault for anything else."""
    if result is None:
        return None
    if isinstance(result, str):
        return sayable(result)
    if _is_blocks(result):
        try:
            return _blocks(result)
        except ValueError as error:
            raise EnvironmentFault(f"reset of {label} returned what cannot be used: {error}") from None
    raise EnvironmentFault(f"reset of {label} returned {shown(result)}; return a text or None")


def checked_step(result: Any, label: str) -> StepResult:
    """What `step` returned, its info plain: a StepResult, or a tuple of (observation, reward, done, info), or of
    gymnasium's five, where done is `terminated or truncated`.

    Raises:
        EnvironmentFault: for anything else.
    """
    if isinstance(result, tuple) and len(result) == 5:
        observation, reward, terminated, truncated, info = result
        done = bool(terminated) or bool(truncated)
    elif isinstance(result, tuple) and len(result) == 4:
        observation, reward, done, info = result
    elif isinstance(result, StepResult):
        observation, reward, done, info = result.observation, result.reward, result.done, result.info
    else:
        raise EnvironmentFault(f"step of {label} returned {shown(result)}; {_STEP}")
    if observation is not None and not isinstance(observation, str):
        raise EnvironmentFault(f"step of {label} returned the observation {shown(observation)}; it is a text or None")
    if not isinstance(info, dict):
        raise EnvironmentFault(f"step of {label} returned the info {shown(info)}; it is a dict")
    return StepResult(
        None if observation is None else sayable(observation),
        checked_reward(reward, f"step of {label}"),
        bool(done),
        plain(info),
    )


def checked_reward(value: Any, what: str) -> float | None:
    """A reward as a finite float, or None. EnvironmentFault for anything else."""
    try:
        reward = checked_score(value, what, 0)
    except RewardError:
        raise EnvironmentFault(f"{what} returned the reward {shown(value)}; it is a number or None") from None
    if reward is not None and not math.isfinite(reward):
        raise EnvironmentFault(f"{what} returned the reward {reward}; it is a finite number or None")
    return reward


def checked_state(value: Any, label: str) -> str:
    """What `state_id` returned, a text; numbers and other plain values by their `str`."""
    if not isinstance(value, str | int | float | bytes | tuple):
        raise EnvironmentFault(f"state_id of {label} returned {shown(value)}; return a text")
    return sayable(str(value))
