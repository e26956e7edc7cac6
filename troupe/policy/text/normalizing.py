"""What a text goes through before it is split: Unicode's normal forms, and texts that others stand for."""

from collections.abc import Sequence
from typing import TypeAlias

import msgspec

from troupe.policy.text.normal_forms import NormalForm, normalize


class Replaced(msgspec.Struct, frozen=True):
    """One text stands for another, wherever it is."""

    old: str
    new: str


class Prepended(msgspec.Struct, frozen=True):
    """A text goes before every piece that is not empty."""

    text: str


Step: TypeAlias = NormalForm | Replaced | Prepended


def normalized(steps: Sequence[Step], text: str) -> str:
    """`text` after all steps."""
    for step in steps:
        match step:
            case Replaced(old, new):
                text = text.replace(old, new)
            case Prepended(prefix):
                text = prefix + text if text else text
            case form:
                text = normalize(form, text)
    return text
