"""What a run and a reward in a process say to each other, as msgpack: plain data, no pickle."""

from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec

from troupe.rewards.extras import TrainerState
from troupe.runtime.frames import decoder

LOOK = "look"
"""Has a worker load the reward and end."""


class Call(msgspec.Struct, frozen=True, tag=True):
    """Parent → child: score these."""

    name: str
    """Under which the reward is reported."""
    size: int
    arguments: dict[str, Any]
    """Those that the function takes, without trainer_state, environments and what logs."""
    trainer_state: TrainerState | None = None
    environments: list[tuple[str, dict[str, Any]]] | None = None
    """Of what the views of environments are made, where the function takes them."""


class Loaded(msgspec.Struct, frozen=True, tag="Ready"):
    """Child → parent: the reward is loaded."""


class Scores(msgspec.Struct, frozen=True, tag=True):
    """Child → parent: what came of a call."""

    scores: list[float | None]
    extra: dict[str, list[Any]]
    metrics: dict[str, list[float]]
    log_faults: list[str] = []
    """What was logged and could not be kept."""


class Raised(msgspec.Struct, frozen=True, tag=True):
    """Child → parent: the call failed."""

    message: str
    by_code: bool = False
    """As a fault's."""


class Broken(msgspec.Struct, frozen=True, tag=True):
    """Child → parent: the reward breaks the convention, or cannot be loaded."""

    message: str


Reply: TypeAlias = Loaded | Scores | Raised | Broken

decode_call: Callable[[bytes], Call] = decoder(Call, "a run and a reward")
decode_reply: Callable[[bytes], Reply] = decoder(Reply, "a run and a reward")
