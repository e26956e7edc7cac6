"""Tools of many signatures, as people write them: what schemas are made from."""

from __future__ import annotations

import enum
from typing import Any, Literal, Optional, Union


class Unit(enum.Enum):
    """What degrees are counted in."""

    CELSIUS = "celsius"
    KELVIN = "kelvin"


def plain(a: int, b: float, c: str, d: bool) -> float:
    """
    Adds and multiplies.

    Args:
        a: The first.
        b: The second, which
            goes on here: with a colon.
        c: The third
        d (bool): The fourth.

    Returns:
        A number. Raises: nothing.
    """
    return a * b


def defaults(city: str, unit: Unit = Unit.CELSIUS, days: int = 3) -> dict[str, Any]:
    """Tells the weather of a city,
    over two lines.

    And a paragraph more.

    Args:
        city: Its name (choices: ["Paris", " Rome "])
        unit: Of degrees
        days: How many.

        Blank lines do not end it.
    Raises:
        ValueError: never
    """
    return {}


def containers(
    rows: list[list[int]],
    pair: tuple[int, str],
    table: dict[str, list[float]],
    bare: list,  # type: ignore[type-arg]
    whole: dict,  # type: ignore[type-arg]
    some: tuple,  # type: ignore[type-arg]
) -> list[str]:
    """Containers.

    Args:
        rows: r
        pair: p
        table: t
        bare: b
        whole: w
        some: s

    Returns:
        texts
    """
    return []


def unions(
    one: Optional[int],  # noqa: UP045
    two: Union[int, str],  # noqa: UP007
    three: int | str | None,
    four: list[int] | None,
    five: list[int] | dict[str, int],
    six: float | int | None = None,
) -> int | None:
    """Unions.

    Args:
        one: 1
        two: 2
        three: 3
        four: 4
        five: 5
        six: 6
    """
    return None


def literals(a: Literal["x", "y"], b: Literal[1, "one", None], c: Literal[True], d: Any, e: Literal["z"] = "z") -> None:
    """Literals.
    Args:
        a: one of two (Choices: ["x"])
        b: mixed
        c: always
        d: anything
        e: z
    Returns: nothing of use
    """


async def later(query: str, *, top: int = 5) -> object:
    """Looks things up.

    Args:
        query: What for
        top: Most results
    """
    return None


def nothing() -> str:
    """Takes nothing."""
    return ""


class Counter:
    """Its methods are tools."""

    def add(self, amount: int) -> int:
        """Adds to the count.

        Args:
            amount: How much

        Returns:
            The count.
        """
        return amount

    @staticmethod
    def zero(why: str) -> int:
        """Zero.

        Args:
            why: A reason
        """
        return 0


FUNCTIONS = (plain, defaults, containers, unions, literals, later, nothing, Counter().add, Counter.zero)
