"""Who was refused at the message server, read off its log: told in words, and not for each knock at the door."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

from troupe.cluster.users import UserList
from troupe.runtime.backoff import backoff_s

_LINE = re.compile(r"\[ERR\] (?P<address>\S+):\d+ - cid:\d+ - (?:\"[^\"]*nkey:(?P<key>U[A-Z2-7]+)\" - )?(?P<what>.*)")
_SHOWN = re.compile(r'^authentication error - Nkey "(U[A-Z2-7]+)"')
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 60.0, 3600.0
"""Between two lines about the same; each pause is twice the one before."""
_MOST_BYTES = 256 * 1024
_MOST_LETTERS = 160
_KINDS = (
    ("authentication error", "showed no key that is known"),
    ("Violation", "tried what it may not"),
    ("TLS handshake error", "did not speak TLS 1.3 with this run"),
    ("uthentication timeout", "said nothing"),
    ("connections exceeded", "took more connections than it may"),
    ("payload exceeded", "sent what is too large"),
)
_OTHERWISE = "sent what is no message"


class Knocks:
    """The log of one server, from now on."""

    def __init__(self, log: Path, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._tell = tell
        self._clock = clock
        self._read = self._size()
        self._waiting: dict[str, tuple[int, str]] = {}
        self._names: dict[str, str] = {}
        self._told: dict[str, tuple[float, int]] = {}

    def look(self, known: UserList) -> None:
        """Read what has come, and tell of it: once of one kind by the same worker, or by strangers, then less often."""
        self._names |= {user.key: user.name for user in known.users}
        size = self._size()
        if size < self._read:
            self._read = 0  # a new file
        if size > self._read:
            with self._log.open("rb") as file:
                file.seek(max(self._read, size - _MOST_BYTES))
                text = file.read(size - file.tell()).decode(errors="replace")
            self._read = size
            for match in map(_LINE.search, text.splitlines()):
                if match is not None:
                    self._note(match)
        now = self._clock()
        for what, (count, last) in list(self._waiting.items()):
            due, times = self._told.get(what, (now, 0))
            if now >= due:
                del self._waiting[what]
                self._told[what] = now + backoff_s(times + 1, _FIRST_PAUSE_S, _LONGEST_PAUSE_S), times + 1
                self._tell(f"{what}{f' ({count} times)' if count > 1 else ''}; the last from {last}")

    def _note(self, match: re.Match[str]) -> None:
        said = match["what"]
        kind = next((words for sign, words in _KINDS if sign in said), _OTHERWISE)
        shown = _SHOWN.search(said)
        if shown is not None and shown[1] in self._names:
            what = f"worker {self._names[shown[1]]}, whose key is good no more, asks to be let in"
        else:
            name = self._names.get(match["key"] or "")
            what = f"{'somebody' if name is None else f'worker {name}'} {kind}"
        if what in self._waiting or len(self._waiting) < 32:
            count, _ = self._waiting.get(what, (0, ""))
            self._waiting[what] = count + 1, f"{match['address']}: {said[:_MOST_LETTERS]}"

    def _size(self) -> int:
        try:
            return self._log.stat().st_size
        except OSError:
            return 0
