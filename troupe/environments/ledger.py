"""What environments have answered so far, by episode and turn: it outlives actors, and begins with what an earlier
start of the run has recorded."""

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import NamedTuple

from troupe.messages.episodes import Answer
from troupe.messages.turns import Answered

ENDING = -1
"""The turn under which it stands how an episode ended; its token ids are the number of turns."""


class EpisodeName(NamedTuple):
    """Which episode: a sample of a group."""

    gid: int
    sample: int


class _Entry(NamedTuple):
    token_ids: tuple[int, ...]
    answer: Answer


class EpisodeLedger:
    """Answers by episode and turn, each with the token ids that it answers. Nothing that stands here is asked again."""

    def __init__(self, recorded: Iterable[Answered] = ()) -> None:
        """`recorded`: the answers of an earlier start, in any order."""
        self._groups: dict[int, dict[int, dict[int, _Entry]]] = {}
        for each in recorded:
            self.note(EpisodeName(each.gid, each.sample), each.turn, each.token_ids, each.answer)

    def note(self, name: EpisodeName, turn: int, token_ids: Sequence[int], answer: Answer) -> None:
        """The answer to a turn is this."""
        turns = self._groups.setdefault(name.gid, {}).setdefault(name.sample, {})
        turns[turn] = _Entry(tuple(token_ids), answer)

    def find(self, name: EpisodeName, turn: int, token_ids: Sequence[int]) -> Answer | None:
        """The answer to just these tokens, None where there is none."""
        entry = self._turns(name).get(turn)
        return entry.answer if entry is not None and entry.token_ids == tuple(token_ids) else None

    def before(self, name: EpisodeName, turn: int) -> list[Answer]:
        """The answers to the turns 0 to `turn` − 1, as far as they are there one after the other."""
        turns = self._turns(name)
        return [turns[each].answer for each in takewhile(turns.__contains__, range(turn))]

    def cut(self, name: EpisodeName, turn: int) -> None:
        """The episode goes on in another way from this turn on: what was answered to it and later ones, and how it
        ended, holds no more. (How it ended holds no more, either, for `ENDING`.)"""
        turns = self._turns(name)
        for each in [each for each in turns if each == ENDING or (each >= turn and turn != ENDING)]:
            del turns[each]

    def forget(self, gid: int) -> None:
        """The group is done with; whatever there is of it is dropped."""
        self._groups.pop(gid, None)

    def _turns(self, name: EpisodeName) -> dict[int, _Entry]:
        return self._groups.get(name.gid, {}).get(name.sample, {})
