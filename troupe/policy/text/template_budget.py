"""What rendering a chat template may take: steps, and characters that are built.

`Budget` has so much of both for one rendering, and what stands below says how much a value is, and how much an
operator, a filter or a method is about to make of its arguments.
"""

import operator
import re
import string
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from jinja2.sandbox import MAX_RANGE
from jinja2.utils import Namespace

MAX_STEPS = 200_000
"""Most steps of loops and calls in one rendering, together."""

MAX_SIZE = 200_000_000
"""Most characters that one rendering may build, what it throws away included; an entry of a list counts as 64."""

MAX_VALUE = 20_000_000
"""Most characters of one text."""

_ENTRY = 64
_MOST = 1_000_000  # of a width or a count
_LONG = 200  # characters of a format, or of what stands between the parts of JSON
_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
_SIMPLE = (str, int, float, bool, type(None))
"""What cannot hold anything; told by type, since most values are of these."""


class Budget:
    """What one rendering may still spend. Raises OverflowError where it is spent."""

    def __init__(self) -> None:
        self._steps = self._numbers = self._size = 0

    def step(self, steps: int) -> None:
        """Count steps of loops and calls."""
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise OverflowError(f"the template's loops and calls take more than {MAX_STEPS} steps, the limit")

    def step_over(self, items: Iterable[Any]) -> Iterable[Any]:
        """`items`, every one a step; those of unknown number are counted as they come."""
        if isinstance(items, Sized):
            self.step(len(items))
            return items
        return self._singly(items)

    def _singly(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.step(1)
            yield item

    def range(self, *args: int) -> range:
        """`range`; all calls together may count to the sandbox's limit for one, which bounds nested loops, too."""
        numbers = range(*args)
        self._numbers += len(numbers)
        if self._numbers > MAX_RANGE:
            raise OverflowError(f"the template's range() loops count past {MAX_RANGE} steps, the limit")
        return numbers

    def build(self, size: int) -> None:
        """Count what is about to be made, in characters."""
        if size > MAX_VALUE:
            raise OverflowError(f"the template builds a value of {size:.3g} characters; the limit is {MAX_VALUE}")
        self._size += size
        if self._size > MAX_SIZE:
            raise OverflowError(f"the template builds more than {MAX_SIZE} characters, the limit")

    def measure(self, value: Any) -> int:
        """Size of a value as text, at least; what stands in it many times is counted as often."""
        if type(value) in _SIMPLE:
            return _size(value)
        waiting, size = [value], 0
        while waiting:
            held = waiting.pop()
            size += _size(held)
            if isinstance(held, Namespace):
                held = getattr(held, "_Namespace__attrs", {})
            if isinstance(held, dict):
                waiting += [*held.keys(), *held.values()]
            elif isinstance(held, list | tuple | set | frozenset):
                waiting += held
            elif type(held) in _VIEWS:
                waiting += list(held)
            if size > MAX_VALUE:
                self.build(size)
        return size


_budget: ContextVar[Budget | None] = ContextVar("budget", default=None)


def spend() -> Budget:
    """The budget of the rendering that is going on; a new one where there is none, as while constants are folded."""
    return _budget.get() or Budget()


@contextmanager
def rendering() -> Iterator[Budget]:
    """`with rendering() as budget:` one rendering."""
    token = _budget.set(Budget())
    try:
        yield spend()
    finally:
        _budget.reset(token)


def _size(value: Any) -> int:
    if isinstance(value, str | bytes | bytearray):
        return len(value)
    if isinstance(value, int):
        return value.bit_length() // 3
    return _ENTRY * len(value) if isinstance(value, list | tuple | dict | set | frozenset) else 1


def built(value: Any) -> Any:
    """A value that was just made, counted; of a generator every item is a step."""
    if isinstance(value, Iterator):
        return spend().step_over(value)
    spend().build(_size(value))
    return value


# --- what operators, filters and methods make, before they do ---------------------------------------------------------


def _product(left: Any, right: Any) -> int:
    if isinstance(left, int) and isinstance(right, int):
        return _size(left) + _size(right)
    number, other = (left, right) if isinstance(left, int) else (right, left)
    return max(0, number) * _size(other) if isinstance(number, int) and isinstance(other, Sized) else 1


def _power(left: Any, right: Any) -> int:
    return abs(left).bit_length() * right if isinstance(left, int) and isinstance(right, int) and right > 0 else 1


def sum_size(left: Any, right: Any) -> int:
    """How much `left + right` makes."""
    return _size(left) + _size(right)


def _percent(text: Any, args: Any) -> int:
    if not isinstance(text, str | bytes):
        return 1
    shown = text if isinstance(text, str) else text.decode("latin-1")
    if "*" in shown and re.search(r"%[^a-zA-Z%]*\*", shown):
        raise OverflowError("a width of '*' in a format is not for chat templates")
    return _formatted(shown, "%", args)


def braces(text: str, args: Any) -> int:
    """How much `text.format` makes of its arguments."""
    if any("{" in (spec or "") for _, _, spec, _ in string.Formatter().parse(text)):
        raise OverflowError("a width that is an argument of a format is not for chat templates")
    return _formatted(text, "{", args)


def _formatted(text: str, mark: str, args: Any) -> int:
    widths = [int(digits) for digits in re.findall(r"\d{1,12}", text)]
    longest = max([spend().measure(args), *widths])
    return len(text) + text.count(mark) * longest


def _width(text: Any, width: int = 80, *_: Any, **__: Any) -> int:
    return max(_size(text), width)


def _tabs(text: Any, tabsize: int = 8) -> int:
    return len(text) * max(1, tabsize)


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> int:
    if not isinstance(text, str | bytes):
        text, old, new = str(text), str(old), str(new)
    return len(text) + (text.count(old) if count is None or count < 0 else count) * len(new)


def _join(separator: Any, parts: Any) -> int:
    return sum(_size(part) + len(separator) for part in parts) if isinstance(parts, Collection) else 1


def _translate(text: str, table: Any) -> int:
    values = table.values() if isinstance(table, Mapping) else ()
    return len(text) * max([1, *(_size(value) for value in values if isinstance(value, str))])


def _indent(text: Any, width: int | str = 4, *_: Any, **__: Any) -> int:
    return _size(text) + (str(text).count("\n") + 1) * (width if isinstance(width, int) else len(width))


def _wrap(text: Any, width: int = 79, *args: Any, wrapstring: str | None = None, **_: Any) -> int:
    string = next((arg for arg in args if isinstance(arg, str)), wrapstring) or "\n"
    return _size(text) * (1 + len(string)) if width < 2 else _size(text) + _size(text) // (width // 2) * len(string)


def _json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> int:
    spaces = len(indent) if isinstance(indent, str) else indent or 0
    if spaces > _LONG or spend().measure(separators) > _LONG:
        raise OverflowError(f"tojson: indent and separators take at most {_LONG} characters")
    return spend().measure(value) * (1 + spaces)


def _whole(value: Any, *_: Any, **__: Any) -> int:
    return spend().measure(value)


def _percent_filter(text: Any, *args: Any, **kwargs: Any) -> int:
    return _percent(str(text), kwargs or args)


def _join_filter(parts: Any, d: str = "", attribute: Any = None) -> int:
    return spend().measure(parts) + len(d) * len(parts) if isinstance(parts, Sized) else 1


OPERATORS: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any, Any], int]]] = {
    "*": (operator.mul, _product),
    "**": (operator.pow, _power),
    "+": (operator.add, sum_size),
    "%": (operator.mod, _percent),
}
"""Operator → what it does, and how much it makes."""

METHODS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _width),
    "expandtabs": _tabs,
    "replace": _replace,
    "join": _join,
    "translate": _translate,
}
"""Method of a text → how much it makes."""
_FILTERS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("string", "pprint", "dictsort", "sort", "unique", "groupby", "max", "min", "urlencode"), _whole),
    "center": _width,
    "replace": _replace,
    "join": _join_filter,
    "indent": _indent,
    "wordwrap": _wrap,
    "format": _percent_filter,
    "tojson": _json,
}
REMOVED = ("lipsum", "urlize", "xmlattr", "striptags")
"""Placeholder text, and HTML, which no prompt wants."""
_PASSING = frozenset(
    {
        *("attr", "batch", "count", "d", "default", "first", "items", "last", "length", "list", "map", "random"),
        *("reject", "rejectattr", "reverse", "select", "selectattr", "slice"),
    }
)
"""Filters that hand on what stands in a value, and never look into it."""
COMPARING = (
    *("eq", "==", "equalto", "ne", "!=", "in"),
    *("lt", "lessthan", "<", "le", "<=", "gt", "greaterthan", ">", "ge", ">="),
)
"""Tests that look into all of what they compare."""
_COUNTED = frozenset({"batch", "center", "indent", "slice", "truncate", "wordwrap"})
"""Filters whose numbers are widths and counts."""


def refuse_large(name: str, args: Iterable[Any]) -> None:
    """OverflowError where an argument is a width or a count past all sense."""
    for arg in args:
        if isinstance(arg, int) and abs(arg) > _MOST:
            raise OverflowError(f"{name}: {arg:.3g} is past the limit of chat templates, {_MOST}")


def guarded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that asks the budget before it builds, and counts what it has built."""
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0
    size = _FILTERS.get(name)

    @wraps(function)  # also the mark that it wants the context
    def guarded(*args: Any, **kwargs: Any) -> Any:
        given = list(args[skipped:])
        if given and isinstance(given[0], Iterator):
            given[0] = list(spend().step_over(given[0])) if name in _FILTERS else spend().step_over(given[0])
        if name in _COUNTED:
            refuse_large(name, (*given[1:], *kwargs.values()))
        if name not in _PASSING:
            for value in (*given, *kwargs.values()):
                spend().measure(value)
        if size is not None:
            spend().build(size(*given, **kwargs))
        return built(function(*args[:skipped], *given, **kwargs))

    return guarded


def guarded_test(function: Callable[..., bool]) -> Callable[..., bool]:
    """A test that measures what it compares."""

    @wraps(function)
    def guarded(*args: Any) -> bool:
        for value in args:
            spend().measure(value)
        return function(*args)

    return guarded
