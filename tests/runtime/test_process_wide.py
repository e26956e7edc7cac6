"""A setting of the whole process is given back, in whatever order it is let go."""

from __future__ import annotations

import itertools
from contextlib import ExitStack

import pytest

from troupe.runtime.process_wide import ProcessWide


class Knob:
    """Something that a process has one of."""

    def __init__(self, value: int) -> None:
        self.value = value

    def swap(self, value: int) -> int:
        before, self.value = self.value, value
        return before


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_newest_who_is_there_has_it_and_the_last_gives_it_back(order: tuple[int, ...]) -> None:
    knob = Knob(7)
    shared = ProcessWide(knob.swap)
    stacks = [ExitStack() for _ in range(3)]
    for number, stack in enumerate(stacks):
        stack.enter_context(shared.at(number))
        assert knob.value == number
    there = [0, 1, 2]
    for number in order:
        stacks[number].close()
        there.remove(number)
        assert knob.value == (max(there) if there else 7)
    knob.value = 8
    with shared.at(1):
        assert knob.value == 1
    assert knob.value == 8, "what it is in between is what it goes back to"


def test_equal_values_are_two_holds_and_an_error_lets_go() -> None:
    knob = Knob(7)
    shared = ProcessWide(knob.swap)
    with shared.at(1):
        with pytest.raises(KeyError), shared.at(1):
            raise KeyError
        assert knob.value == 1
    assert knob.value == 7
