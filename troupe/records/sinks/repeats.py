"""Which incidents are worth a line each: the first of a kind at once, and of many like it how many there were.

A judge that is away can make hundreds in a second. Nothing is lost by it: run.sqlite has every one.
"""

from __future__ import annotations

from troupe.messages import Incident

_LINES = 3
"""Of one kind and actor, before the others are counted."""
_WINDOW_S = 10.0


class Repeats:
    """Takes incidents with the time at which they come, which never goes back."""

    def __init__(self, *, lines: int = _LINES, window_s: float = _WINDOW_S) -> None:
        self._lines, self._window_s = lines, window_s
        self._windows: dict[tuple[str, str], _Window] = {}

    def is_told_alone(self, incident: Incident, now_s: float) -> bool:
        """Whether this one is told by itself; it is not where the same was, or several of its kind, a moment ago."""
        window = self._windows.setdefault((incident.actor, incident.kind), _Window(now_s))
        if incident.message not in window.told and len(window.told) < self._lines:
            window.told.add(incident.message)
            return True
        window.left_out += 1
        window.newest = incident.message
        return False

    def counted(self, now_s: float, *, all_of_them: bool = False) -> list[str]:
        """A line for each kind of which some were left out, when it is time to say so."""
        lines = []
        for (actor, kind), window in list(self._windows.items()):
            if now_s - window.since_s < self._window_s and not all_of_them:
                continue
            del self._windows[actor, kind]
            if window.left_out:
                times = f"{window.left_out:,} more {kind} in {actor} within {max(1.0, now_s - window.since_s):.0f} s"
                lines.append(f"{times}, the newest: {window.newest}")
                again = self._windows[actor, kind] = _Window(now_s)  # what goes on like this is told as a number
                again.told |= window.told
        return lines


class _Window:
    def __init__(self, since_s: float) -> None:
        self.since_s = since_s
        self.told: set[str] = set()
        self.left_out = 0
        self.newest = ""
