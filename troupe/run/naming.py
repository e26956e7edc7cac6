"""From a name that we do not have to the nearest of ours: another spelling, another section, somebody else's word.

Pure functions over names.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from troupe.run.aliases import Meaning, known_names, meaning_of, normalized

_LINK = re.compile(r"\[([^\]]+)\]\([^)]+\)")


def ours_for(name: str, keys: Sequence[str]) -> Meaning | None:
    """What a name, in any spelling and with any section or none, is among our `section.key`s; None: nothing is known.

    `learning_rate`, `--Learner.LR`, `lr` and `generation.lr` are all `learner.lr`.
    """
    whole = normalized(name)
    leaf = whole.rpartition(".")[2]
    own = [key for key in keys if key == whole] or [key for key in keys if key.rpartition(".")[2] == leaf]
    alias = meaning_of(leaf)
    if own:
        return Meaning(tuple(own), alias.note if alias is not None and set(alias.ours) <= set(own) else "")
    return alias


def foreign_for(name: str) -> tuple[str, Meaning] | None:
    """Somebody else's name that looks most like this one, and what it is here."""
    close = close_to(normalized(name).rpartition(".")[2], known_names())
    meaning = meaning_of(close) if close is not None else None
    return (close, meaning) if close is not None and meaning is not None else None


def describe_meaning(meaning: Meaning) -> str:
    """What a name is here, as a clause for a message."""
    note = plain(meaning.note)
    if not meaning.ours:
        return f"there is none here: {note}"
    return f"it is {' or '.join(meaning.ours)} here{f' ({note})' if note else ''}"


def plain(note: str) -> str:
    """A note without its Markdown."""
    return _LINK.sub(r"\1", note).replace("`", "")


def close_to(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like it, if any does."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return close[0] if close else None
