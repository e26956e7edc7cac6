"""Which cards of this machine a run's ranks and generators have.

A process of several ranks may see one card only, so this process lets go of the others before MLX looks.
"""

import ctypes
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from troupe.actors.schedule import ScheduleConfig
from troupe.errors import ConfigError
from troupe.run.config import RunConfig

VISIBLE = "CUDA_VISIBLE_DEVICES"
_ENTRY = re.compile(r"\s*(\d+)\s*:\s*([a-z,\s]+)")
_ROLES = ("learner", "generator")


class Cards(NamedTuple):
    """Names of cards, as `CUDA_VISIBLE_DEVICES` has them."""

    ranks: tuple[str, ...]
    """The card of each rank of the learner."""
    generators: tuple[str, ...]
    """Those that the generator's processes have in turn."""

    def of_rank(self, rank: int) -> dict[str, str]:
        """What is added to the environment of a rank."""
        return {VISIBLE: self.ranks[rank]}

    def of_generator(self, number: int) -> dict[str, str]:
        """What is added to that of a generator's process."""
        return {VISIBLE: self.generators[number % len(self.generators)]}


def claim_cards(config: RunConfig) -> Cards | None:
    """Who has which card, after which this process sees that of rank 0 alone; None: nothing is shared out. To be called
    before MLX has looked for cards. ConfigError for ranks, lanes or devices that cannot be had."""
    check_ranks(config)
    cards = shared_out(config.schedule, config.learner.lanes, seen_cards())
    if cards is not None:
        os.environ[VISIBLE] = cards.ranks[0]
    return cards


def check_ranks(config: RunConfig) -> None:
    """Raise ConfigError where ranks and lanes do not fit each other and the batch."""
    lanes, ranks = config.learner.lanes, config.schedule.learner_ranks or 1
    rows = config.learner.batch_size * config.generation.num_generations
    if lanes > rows:
        raise ConfigError(
            f"learner.lanes is {lanes}, but a batch has only {rows} rows (batch_size × num_generations) to lay into "
            "them; lower it"
        )
    if ranks > lanes or ranks & (ranks - 1):
        raise ConfigError(
            f"schedule.learner_ranks is {ranks}, but ranks share the lanes of a batch evenly, of which there are "
            f"{lanes} (learner.lanes); give a power of two up to that"
        )


def shared_out(schedule: ScheduleConfig, lanes: int, cards: Sequence[str]) -> Cards | None:
    """Who has which of these cards, as the settings say, or by themselves where several cards are there for a batch in
    lanes; None: nobody has a card of his own."""
    if not cards:
        return None
    if schedule.devices:
        named = _named(schedule.devices, cards)
    elif lanes > 1 and len(cards) > 1 and schedule.learner_ranks != 1:
        number = schedule.learner_ranks or _power_of_two(min(lanes, len(cards)))
        named = Cards(tuple(cards[:number]), tuple(cards[number:] or cards))
    else:
        return None
    ranks = len(named.ranks)
    if schedule.learner_ranks not in (None, ranks):
        raise ConfigError(
            f"schedule.learner_ranks is {schedule.learner_ranks}, but there are {ranks} cards for the learner "
            f"({len(cards)} are seen here, schedule.devices is {list(schedule.devices)}); a rank has a card of its own"
        )
    if ranks > lanes or ranks & (ranks - 1):
        raise ConfigError(
            f"schedule.devices gives the learner {ranks} cards, but learner.lanes is {lanes}; name a power of two up "
            "to that"
        )
    return named


def _named(devices: Sequence[str], cards: Sequence[str]) -> Cards:
    found: Mapping[str, list[str]] = {role: [] for role in _ROLES}
    for entry in devices:
        match = _ENTRY.fullmatch(entry)
        roles = [] if match is None else [role.strip() for role in match[2].split(",")]
        if match is None or not roles or not set(roles) <= set(_ROLES):
            raise ConfigError(f"schedule.devices has {entry!r}; write it as '0:learner,generator'")
        if int(match[1]) >= len(cards):
            raise ConfigError(f"schedule.devices has {entry!r}, but only {len(cards)} cards are seen here, 0 to begin")
        for role in roles:
            found[role].append(cards[int(match[1])])
    learner, generators = found["learner"], found["generator"]
    if not learner or len(set(learner)) < len(learner):
        raise ConfigError(f"schedule.devices is {list(devices)}; name a card for the learner, and each once")
    return Cards(tuple(learner), tuple(generators or learner[:1]))


def _power_of_two(most: int) -> int:
    return 1 << (most.bit_length() - 1)


@cache
def seen_cards() -> tuple[str, ...]:
    """The NVIDIA cards that this process was started with, by the names that they have in its environment. Asked
    without CUDA, which would hold on to them."""
    if VISIBLE in os.environ:
        return tuple(name.strip() for name in os.environ[VISIBLE].split(",") if name.strip())
    return tuple(map(str, range(_number_of_cards())))


def _number_of_cards() -> int:
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL("libnvidia-ml.so.1")
        count = ctypes.c_uint()
        if library.nvmlInit_v2() == 0 and library.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0:
            return count.value
    return len([path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdecimal()])
