"""What rewards get of episodes: conversations as TRL gives them, and the environments at their ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn

from troupe.messages import ChatMessage, Episode, PromptText, RolloutGroup


class EnvironmentView:
    """An environment as it was at the end of its episode, for who cannot have the environment itself: its public
    attributes, as far as they are plain data, to be read only."""

    __slots__ = ("_attributes", "_name")

    def __init__(self, name: str, attributes: dict[str, Any]) -> None:
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_attributes", attributes)

    @property
    def plain(self) -> tuple[str, dict[str, Any]]:
        """What it is made of."""
        return object.__getattribute__(self, "_name"), object.__getattribute__(self, "_attributes")

    def __getattr__(self, name: str) -> Any:
        environment, attributes = self.plain
        if name not in attributes:
            there = ", ".join(sorted(attributes)) or "none"
            raise AttributeError(
                f"the environment {environment} is told of by its public attributes that are plain data, and {name!r} "
                f"is none of them; there are: {there}"
            )
        return attributes[name]

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"{name!r} cannot be set: the episode is over, and its environment can only be read")

    def __repr__(self) -> str:
        environment, attributes = self.plain
        return f"EnvironmentView({environment!r}, {attributes!r})"


def view_of(episode: Episode) -> EnvironmentView:
    """What is known of an episode's environment when it is gone."""
    return EnvironmentView(episode.environment, episode.attributes)


def messages_of(episode: Episode) -> list[ChatMessage]:
    """What was said in an episode, by the policy and by what it talked to, without what stood before."""
    return [message for turn in episode.turns for message in (turn.answer.said, *turn.answer.messages) if message]


def prompt_of(episode: Episode, prompt: PromptText) -> PromptText:
    """The prompt as the episode began with it, with what its environment added; a text stays one, where it can."""
    opening = list(episode.opening.messages)
    if not opening:
        return prompt
    content = opening[-1].get("content")
    return content if isinstance(prompt, str) and isinstance(content, str) else opening


def environments_of(group: RolloutGroup, live: Sequence[Any] | None) -> list[Any]:
    """(G,) environments, as far as they are still there, and views of the others."""
    here = [None] * len(group.episodes) if live is None else live
    return [
        view_of(episode) if environment is None else environment
        for environment, episode in zip(here, group.episodes, strict=True)
    ]


def environment_reward(environment_rewards: Sequence[float | None], **columns: Any) -> list[float | None]:
    """What environments themselves give: `get_reward`, or the rewards of an episode's turns; missing where there are
    neither."""
    return list(environment_rewards)


environment_reward.quick = True  # type: ignore[attr-defined]


def get_environment_reward(name: str, environments: Collection[str] | None = None) -> Callable[..., list[float | None]]:
    """What environments give, as a reward of another name, such as their class's.

    `environments`: by their names in the rows' column `environment`, those whose rewards count; None: all.
    """

    def reward(
        environment_rewards: Sequence[float | None], environment: Sequence[str] | None = None, **columns: Any
    ) -> list[float | None]:
        if environments is None or environment is None:
            return list(environment_rewards)
        return [
            score if one in environments else None for score, one in zip(environment_rewards, environment, strict=True)
        ]

    reward.__name__ = reward.__qualname__ = name
    reward.quick = True  # type: ignore[attr-defined]
    return reward
