"""What a reward is, so that another one is not taken for it: its name and, of somebody's code, a sum of its file."""

import hashlib
import sys
from pathlib import Path

from troupe.rewards.convention import Reward, reward_name
from troupe.rewards.loading import is_code
from troupe.runtime.files import expanded

_DIGITS = 8
"""Of sums: those that a person compares."""


def reward_identity(reward: Reward | str) -> str:
    """A reward that was loaded, in a short text. What its file imports does not count, nor where the file lies."""
    if not isinstance(reward, str):
        return reward_name(reward)
    if not is_code(reward):
        return reward
    place, _, name = reward.rpartition(":")
    file = getattr(sys.modules.get(place), "__file__", None)
    path = Path(file) if file else expanded(place)
    told = f"{place if file else path.name}:{name}"
    try:
        return f"{told} (sum {short_sum(path.read_bytes())})"
    except OSError:  # it was there when the reward was loaded
        return told


def short_sum(data: bytes) -> str:
    """By which a person sees that two things are not the same."""
    return hashlib.sha256(data).hexdigest()[:_DIGITS]
