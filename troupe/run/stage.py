"""Stage: where the policy acts. The tools and environments of a run, who runs them, and how what is said there becomes
ids."""

from collections.abc import Mapping
from typing import Any

import msgspec

from troupe.actors.conversations import Conversations, Rules, Understand, Words
from troupe.environments.convention import World


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """What episodes are played with."""

    world: World
    manager: Any
    words: Mapping[str, Words]
    """Of each environment."""
    understand: Understand
    rules: Rules

    def conversations(self) -> Conversations:
        """New ones, over the same environments."""
        return Conversations(self.manager, self.world, self.words, understand=self.understand, rules=self.rules)
