"""What a run and a process of environments say to each other, as msgpack: plain data, no pickle."""

from collections.abc import Callable
from typing import TypeAlias

import msgspec

from troupe.environments.live import Deed
from troupe.environments.settings import EnvironmentConfig
from troupe.runtime.frames import decoder


class Load(msgspec.Struct, frozen=True, tag=True):
    """Parent → child, first: load what this section names."""

    config: EnvironmentConfig


class Take(msgspec.Struct, frozen=True, tag=True):
    """Parent → child: have an instance of an environment under this number; `new`, one that nobody has had."""

    number: int
    environment: str
    new: bool


class Do(msgspec.Struct, frozen=True, tag=True):
    """Parent → child: do this with an instance, or where there is no number call a tool that is no environment's."""

    number: int | None
    deed: Deed


class Leave(msgspec.Struct, frozen=True, tag=True):
    """Parent → child: nobody needs the instance any more; `again`: it may be used for another episode."""

    number: int
    again: bool


class Done(msgspec.Struct, frozen=True, tag=True):
    """Child → parent: that was done."""

    data: bytes = b""
    """What came of a deed, as msgpack."""


class Threw(msgspec.Struct, frozen=True, tag=True):
    """Child → parent: the code raised; as `Raised` has it."""

    text: str
    told: str
    passing: bool


class Broken(msgspec.Struct, frozen=True, tag=True):
    """Child → parent: what the section names cannot be loaded."""

    message: str


Order: TypeAlias = Load | Take | Do | Leave
Reply: TypeAlias = Done | Threw | Broken

decode_order: Callable[[bytes], Order] = decoder(Order, "a run and its environments")
decode_reply: Callable[[bytes], Reply] = decoder(Reply, "a run and its environments")
