"""Where rows wait between their turns: what each has said and read, and the histories of those that still have them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from troupe.policy.decode.cache import PromptCache
from troupe.policy.decode.histories import split

RowName: TypeAlias = tuple[int, ...]


@dataclass
class HeldRow:
    """A row that goes on."""

    ids: list[int]
    """All its tokens so far, the prompt's first."""
    experts: bytearray = field(default_factory=bytearray)
    """Where recorded, those of its first tokens, up to the last that was read."""

    def note(self, experts: bytes, kept: int) -> None:
        """Take over the experts of all its tokens behind the first `kept`; those that are known stay."""
        each = len(experts) // (len(self.ids) - kept)
        self.experts += experts[len(self.experts) - kept * each :]


class Shelf:
    """The histories of rows, some of them in one `PromptCache` as they left a batch."""

    def __init__(self) -> None:
        self._banks: list[tuple[list[RowName], PromptCache]] = []

    @property
    def rows(self) -> list[RowName]:
        """Those that lie here, in the order in which they were put here."""
        return [name for names, _ in self._banks for name in names]

    @property
    def bytes(self) -> int:
        """What all histories take."""
        return sum(array.nbytes for _, cache in self._banks for array in cache.arrays)

    def lengths(self) -> dict[RowName, int]:
        """How many tokens the history of each row has."""
        return {name: length for names, cache in self._banks for name, length in zip(names, cache.lengths, strict=True)}

    def make_room(self, kept: Iterable[RowName], limit_bytes: float) -> None:
        """Drop as few histories as there must be, those first that came last, so that all but those of the rows `kept`
        take no more than the limit together."""
        kept, dropped = set(kept), []
        held = [
            (name, sum(array.nbytes for array in cache.arrays) / len(names))
            for names, cache in self._banks
            for name in names
            if name not in kept
        ]
        total = sum(taken for _, taken in held)
        while held and total > limit_bytes:
            name, taken = held.pop()
            dropped.append(name)
            total -= taken
        self.drop(dropped)

    def put(self, names: Sequence[RowName], cache: PromptCache) -> None:
        """Keep the histories of these rows."""
        self._banks.append((list(names), cache))

    def shorten(self, name: RowName, length: int) -> None:
        """Forget what a row holds beyond so many tokens, at least one."""
        for names, cache in self._banks:
            if name in names:
                cache.lengths[names.index(name)] = length

    def take(self, orders: Sequence[Sequence[RowName]]) -> list[PromptCache]:
        """Give the histories of rows away, in as many parts as there are `orders`."""
        wanted = {name for order in orders for name in order}
        banks = [bank for bank in self._banks if not wanted.isdisjoint(bank[0])]
        self._banks = [bank for bank in self._banks if wanted.isdisjoint(bank[0])]
        places = {name: place for place, name in enumerate(name for names, _ in banks for name in names)}
        others = [name for name in places if name not in wanted]
        parts = split(
            [cache for _, cache in banks],
            [[places[name] for name in order] for order in (*([others] if others else []), *orders)],
        )
        if others:
            self.put(others, parts.pop(0))
        return parts

    def drop(self, names: Iterable[RowName]) -> None:
        """Forget the histories of these rows."""
        dropped = set(names)
        if not dropped:
            return
        banks, self._banks = self._banks, []
        for held, cache in banks:
            left = [place for place, name in enumerate(held) if name not in dropped]
            if len(left) == len(held):
                self._banks.append((held, cache))
            elif left:
                self._banks.append(([held[place] for place in left], split([cache], [left])[0]))
