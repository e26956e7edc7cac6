"""What reward code logs, as plain data: None, booleans, numbers, texts, and lists and objects of these, never huge.

Read where it is logged, on the thread of whoever made it, so that nothing lazy and no user's object goes further. Knows
nothing of rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

from troupe.errors import sayable

LONGEST = 100_000
"""Characters of all texts of one value."""
MOST = 10_000
"""Numbers, texts and so on of one value."""
DEEPEST = 32
"""Lists and objects inside each other."""


def plain(value: Any) -> Any:
    """The value as msgpack and JSON have it, cut where it is larger than the limits, which a text in it says.

    Arrays of any library become numbers or lists of numbers, sets lists in a fixed order, keys texts; whole numbers of
    more than 64 bits, dates and all other objects their text; lone surrogates their escapes.

    Raises:
        Whatever the value raises when it is looked at.
    """
    return _Reading().of(value, 0)


class _Reading:
    """One value being read, and how much of it may still be taken."""

    def __init__(self) -> None:
        self._values, self._characters = MOST, LONGEST

    def of(self, value: Any, depth: int) -> Any:
        self._values -= 1
        if value is None or value is True or value is False:
            return value
        # by the built-in types' own methods: those of a subclass may do anything
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, int):
            number = int.__index__(value)
            return number if -(2**63) <= number < 2**64 else self._text(str(number))
        if isinstance(value, float):
            return float.__float__(value)
        if isinstance(value, (bytes, bytearray)):
            return self._text(bytes(value[:LONGEST]).decode(errors="backslashreplace"))
        if depth == DEEPEST and isinstance(value, (Mapping, list, tuple, set, frozenset)):
            return "…"
        if isinstance(value, Mapping):
            return self._object(value, depth)
        if isinstance(value, (list, tuple)):
            return self._list(value, len(value), depth)
        if isinstance(value, (set, frozenset)):
            return sorted(self._list(value, len(value), depth), key=repr)
        tolist = getattr(value, "tolist", None)
        return self._text(str(value)) if tolist is None else self._array(value, tolist, depth)

    def _text(self, text: str) -> str:
        text = str.__str__(text)
        if len(text) > self._characters:
            cut = len(text) - self._characters
            text = f"{text[: self._characters]}… ({cut} more characters)"
        self._characters = max(0, self._characters - len(text))
        return sayable(text)

    def _list(self, values: Iterable[Any], size: int, depth: int) -> list[Any]:
        taken = max(0, min(size, self._values))
        read = [self.of(item, depth + 1) for item in islice(values, taken)]
        return read if taken == size else [*read, f"… ({size - taken} more)"]

    def _object(self, value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        taken = max(0, min(len(value), self._values))
        read = {self._key(key): self.of(item, depth + 1) for key, item in islice(value.items(), taken)}
        return read if taken == len(value) else {**read, "…": f"{len(value) - taken} more"}

    def _key(self, key: Any) -> str:
        return self._text(key if isinstance(key, str) else str(key))

    def _array(self, value: Any, tolist: Callable[[], Any], depth: int) -> Any:
        size = getattr(value, "size", None)
        if callable(size):  # PyTorch's
            size = value.numel()
        if isinstance(size, int) and size > self._values:
            first = value.reshape(-1)[: max(0, self._values)].tolist()
            return [*self._list(first, len(first), depth), f"… ({size - len(first)} more)"]
        read = tolist()
        if getattr(read, "tolist", None) is not None:
            return self._text(str(value))
        return self.of(read, depth)
