"""What reward code logs becomes plain data on the spot, whatever it is and whatever it does when it is looked at."""

from __future__ import annotations

import datetime
import decimal
import enum
import functools
import math
import threading
from collections import OrderedDict, deque
from typing import Any, NoReturn

import mlx.core as mx
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from troupe.rewards.extras import DEEPEST, RewardLog, plain


class Shouting(str):
    """A text whose methods raise."""

    def refuse(self, *_: Any) -> NoReturn:
        raise RuntimeError("hands off")

    __str__ = __repr__ = __len__ = __hash__ = __eq__ = __getitem__ = encode = __iter__ = __format__ = refuse  # type: ignore[assignment]


class Odd(float):
    def __float__(self) -> NoReturn:
        raise RuntimeError("hands off")

    __repr__ = __str__ = __float__


class Whole(int):
    def __index__(self) -> NoReturn:
        raise RuntimeError("hands off")

    __int__ = __repr__ = __str__ = __index__


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    HIGH = 3


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


ITSELF: list[Any] = []
ITSELF.append(ITSELF)


STANDS_FOR: list[tuple[Any, Any]] = [
    (None, None),
    (True, True),
    (3, 3),
    (-(2**63), -(2**63)),
    (2**64 - 1, 2**64 - 1),
    (2**64, str(2**64)),
    (1.5, 1.5),
    (math.inf, math.inf),
    ("text", "text"),
    ("half \ud800", "half \\ud800"),
    (Shouting("loud"), "loud"),
    (Odd(2.5), 2.5),
    (Whole(7), 7),
    (Level.HIGH, 3),
    (Colour.RED, "Colour.RED"),
    (b"bytes \xff", "bytes \\xff"),
    ({3, 1, 2}, [1, 2, 3]),
    (frozenset({"b", "a"}), ["a", "b"]),
    ((1, (2,)), [1, [2]]),
    (deque([1]), "deque([1])"),
    (range(3), "range(0, 3)"),
    ({1: "a", None: {"b": 2}}, {"1": "a", "None": {"b": 2}}),
    (OrderedDict(a=1), {"a": 1}),
    (datetime.date(2026, 1, 2), "2026-01-02"),
    (decimal.Decimal("1.10"), "1.10"),
    (1 + 2j, "(1+2j)"),
    (np.float32(0.5), 0.5),
    (np.int64(5), 5),
    (np.bool_(True), True),
    (np.array(0.25), 0.25),
    (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
    (np.array(["a", None], dtype=object), ["a", None]),
    (np.datetime64("2026-01-02"), "2026-01-02"),
    (mx.array(0.5), 0.5),
    (mx.array([1.0, 2.0]) * 2, [2.0, 4.0]),
    (mx.array([0.5], dtype=mx.bfloat16), [0.5]),
]


@pytest.mark.parametrize("case", range(len(STANDS_FOR)))  # no value itself: pytest would look at it
def test_what_stands_for_what(case: int) -> None:
    value, expected = STANDS_FOR[case]
    found = plain(value)
    assert found == expected
    assert type(found) is type(expected)


def test_nothing_is_kept_that_is_larger_than_the_limits() -> None:
    cut = functools.partial(plain, most=5, longest=10)
    assert cut("x" * 25) == "x" * 10 + "… (15 more characters)"
    assert cut(["a" * 6, "b" * 6]) == ["aaaaaa", "bbbb… (2 more characters)"]
    assert cut(list(range(9))) == [0, 1, 2, 3, "… (5 more)"]
    assert cut([[1, 2, 3], [4, 5, 6]]) == [[1, 2, 3], ["… (3 more)"]]
    assert cut(dict.fromkeys("abcdefg", 0)) == {**dict.fromkeys("abcd", 0), "…": "3 more"}
    assert cut(mx.arange(9)) == [0, 1, 2, 3, "… (5 more)"]
    assert cut(np.arange(9).reshape(3, 3)) == [0, 1, 2, 3, "… (5 more)"]


def test_what_lies_too_deep_is_cut() -> None:
    for value in (nested(5000), ITSELF):
        found, depth = plain(value), 0
        while isinstance(found, list):
            found, depth = (found[0] if found else None), depth + 1
        assert (found, depth) == ("…", DEEPEST)


class Evil:
    """Raises whatever one does to it."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("hands off")

    __str__ = __repr__ = __len__ = __iter__ = __eq__ = __hash__ = __float__ = __bool__ = __getattribute__  # type: ignore[assignment]


class Mute:
    def __str__(self) -> str:
        raise SystemExit(3)


class EvilError(Exception):
    def __str__(self) -> str:
        raise ValueError("not even this")


class RaisesEvil:
    def __str__(self) -> str:
        raise EvilError


def huge() -> int:
    return 10**5000


def itself() -> list[Any]:
    return ITSELF


def deep() -> list[Any]:
    return nested(3000)


MAKERS: tuple[Any, ...] = (Evil, Mute, RaisesEvil, object, huge, itself, deep)
"""What hypothesis had better not look at is made in the test."""


def made(value: Any) -> Any:
    """The value with what its makers make."""
    if isinstance(value, (list, tuple)):
        return type(value)(made(item) for item in value)
    if isinstance(value, dict):
        return {key: made(item) for key, item in value.items()}
    return value() if any(value is maker for maker in MAKERS) else value


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(categories=None))  # surrogates too
    | st.binary()
    | st.decimals()
    | st.datetimes()
    | st.complex_numbers()
    | st.builds(Shouting, st.text())
    | st.builds(Odd, st.floats())
    | st.sampled_from(MAKERS)
    | st.builds(lambda xs: mx.array(xs) * 2, st.lists(st.floats(-9, 9, width=32), max_size=3))
    | st.builds(np.array, st.lists(st.floats(), max_size=3))
)
HASHABLE = st.none() | st.integers() | st.text(st.characters(categories=None)) | st.tuples(st.integers())
NASTY = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(HASHABLE, inner, max_size=3)
        | st.sets(HASHABLE, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(NASTY, min_size=2, max_size=2), NASTY | st.text(), NASTY | st.floats(), NASTY | st.text())
def test_whatever_is_logged_is_plain_afterwards_or_told(values: list[Any], column: Any, value: Any, name: Any) -> None:
    log = RewardLog(2)
    log.log_extra("kept", made(values))
    log.log_extra(made(column), made(values))
    log.log_metric(made(name), made(value))
    log.log_metric("kept", 1.0)
    assert len(log.extra["kept"]) == 2
    assert log.metrics["kept"] == 1.0
    for encoded in (msgspec.msgpack.encode([log.extra, log.logged]), msgspec.json.encode([log.extra, log.logged])):
        assert encoded
    assert all(type(key) is str for key in (*log.extra, *log.logged))
    assert all(type(number) is float for numbers in log.logged.values() for number in numbers)
    for fault in log.faults:
        assert fault.startswith(("log_extra(", "log_metric(")) or "more values" in fault
        assert len(fault.encode()) < 3000


def test_lazy_arrays_are_read_on_the_thread_that_logs_them() -> None:
    log = RewardLog(3)

    def reward() -> None:
        z = mx.arange(3) / 4
        log.log_extra("z", list(z - z.mean()))
        log.log_extra("whole", z * 2)  # type: ignore[arg-type]
        log.log_metric("mean", z.mean())  # type: ignore[arg-type]

    thread = threading.Thread(target=reward)
    thread.start()
    thread.join()
    assert log.faults == []
    assert log.extra == {"z": (-0.25, 0.0, 0.25), "whole": (0.0, 0.5, 1.0)}
    assert log.metrics == {"mean": 0.25}


def test_what_cannot_be_kept_costs_that_alone_and_is_told() -> None:
    log = RewardLog(2)
    log.log_extra("o", [Mute(), 1])
    log.log_extra("gone", 7)  # type: ignore[arg-type]
    log.log_metric("m", "much")  # type: ignore[arg-type]
    log.log_metric("m", 2)
    for name in (None, ("a",), 3):
        log.log_metric(name, 1.0)  # type: ignore[arg-type]
        log.log_extra(name, [1, 2])  # type: ignore[arg-type]
    log.log_metric("half \ud800", 1.0)
    assert log.extra == {"o": (None, 1)}
    assert log.metrics == {"m": 2.0, "half \\ud800": 1.0}
    assert [fault.partition(": ")[0] for fault in log.faults] == [
        "log_extra('o', …)",
        "log_extra('gone', …)",
        "log_metric('m', …)",
        "6 more values that it logged cannot be kept",
    ]
    assert "value 0, of type Mute, cannot be read: SystemExit: 3" in log.faults[0]


def test_a_call_logs_so_many_names_and_no_more() -> None:
    log = RewardLog(1)
    for number in range(1003):
        log.log_metric(f"m{number}", 1.0)
    log.log_metric("m5", 3.0)
    assert len(log.metrics) == 1000
    assert log.metrics["m5"] == 2.0
    assert log.faults[0] == "log_metric('m1000', …): a call may log 1000 names"


def test_infinities_that_cancel_out_have_no_mean() -> None:
    log = RewardLog(1)
    for value in (math.inf, -math.inf):
        log.log_metric("m", value)
    assert math.isnan(log.metrics["m"])
