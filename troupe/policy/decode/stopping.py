"""When a completion ends before its length limit: stop ids, stop strings, repetition. Host side, one token at a time.

A completion keeps the token that ended it, so the text of one that a stop string
ended keeps that string, and whatever else its last token holds behind it: what is scored is what is trained.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, TypeAlias

EarlyReason: TypeAlias = Literal["stop", "repetition"]
"""A stop id or stop string, or the repetition cut-off."""


class TextStream(Protocol):
    """Text of a completion as its tokens come."""

    def push(self, token_id: int) -> str:
        """The text that this token completes. Raises ValueError for an id without text."""


class StopRules:
    """What ends a completion early. Immutable: the memory of a row is its `StopWatch`.

    Stop strings are looked for in the completion alone, not in its prompt, also across the borders of tokens; special
    tokens count with their text, so that naming one as a stop string works. Repetition: the last tokens are one pattern
    of at most `longest_pattern` tokens, `cutoff` times in succession; 0 is off.
    """

    def __init__(
        self,
        stop_ids: frozenset[int],
        strings: Sequence[str] = (),
        open_stream: Callable[[], TextStream] | None = None,
        cutoff: int = 0,
        longest_pattern: int = 1,
    ) -> None:
        """Raises ValueError for stop strings without `open_stream`, which opens the text of one completion."""
        if strings and open_stream is None:
            raise ValueError(f"stop is {list(strings)}, but there is no tokenizer to find it with; pass one")
        self.stop_ids = stop_ids
        self.strings = tuple(strings)
        self.open_stream = open_stream if strings else None
        self.cutoff = cutoff
        self.longest_pattern = longest_pattern


class StopWatch:
    """Sees the tokens of one completion; tells which one ends it."""

    def __init__(self, rules: StopRules) -> None:
        self._rules = rules
        self._stream = rules.open_stream() if rules.open_stream else None
        self._text = ""
        self._kept = max(map(len, rules.strings), default=1) - 1  # characters that may begin a string not yet whole
        self._recent: deque[int] = deque(maxlen=rules.longest_pattern)
        self._runs: dict[int, int] = {}

    def push(self, token_id: int) -> EarlyReason | None:
        """Take the next token → why the completion ends with it, if it does."""
        if token_id in self._rules.stop_ids or (self._stream is not None and self._completes_string(token_id)):
            return "stop"
        if self._rules.cutoff and self._is_repeating(token_id):
            return "repetition"
        return None

    def _completes_string(self, token_id: int) -> bool:
        assert self._stream is not None
        try:
            text = self._text + self._stream.push(token_id)
        except ValueError:  # an id that only the model's padded vocabulary has is no text
            return False
        self._text = text[max(0, len(text) - self._kept) :]
        return any(string in text for string in self._rules.strings)

    def _is_repeating(self, token_id: int) -> bool:
        """Count, for each distance p at which this token came before, how long tokens have equalled those p earlier."""
        runs = {}
        if token_id in self._recent:
            earlier = enumerate(reversed(self._recent), 1)
            runs = {p: self._runs.get(p, 0) + 1 for p, other in earlier if other == token_id}
        self._runs = runs
        self._recent.append(token_id)
        return any(run >= p * (self._rules.cutoff - 1) for p, run in runs.items())
