"""How long a run has gone on, by clocks that may have been set meanwhile."""

import math
from collections.abc import Mapping

_A_MOMENT_S = 60.0
"""That the end of a step may be told late."""
_LONGEST_START_S = 12 * 3600.0
"""Before the first step of a start: loading, held-out rows."""


class RunTime:
    """How long a run has gone on, from times of day that may have been set meanwhile and from what the steps measured.

    Each step says by a clock that is never set how long it took (`step_time`), and by the other one when it ended.
    Where the two differ by more than the start of a run or a moment explains, somebody has set the clock, or the
    machine slept, and the step's own measure counts. Takes the steps in order.
    """

    def __init__(self, began: Mapping[int, float]) -> None:
        """`began`: start → when it began, unix seconds."""
        self._began = began
        self._before: tuple[int, float] | None = None
        self._seconds: list[float] = []
        self._jumps: list[tuple[int, float]] = []

    def add(self, step: int, start: int, unix_s: float, step_s: float | None) -> None:
        """`step_s`: what the step measured; None where it did not."""
        is_first = self._before is None or self._before[0] != start
        since_s = self._began.get(start) if is_first or self._before is None else self._before[1]
        self._before = start, unix_s
        measured_s = step_s if step_s is not None and math.isfinite(step_s) and step_s >= 0 else None
        if since_s is None:
            self._seconds.append(measured_s or 0.0)
            return
        gap_s = unix_s - since_s
        beyond_s = gap_s - (measured_s or 0.0)
        most_s = _LONGEST_START_S if is_first or measured_s is None else max(_A_MOMENT_S, measured_s)
        if -_A_MOMENT_S <= beyond_s <= most_s:
            self._seconds.append(max(0.0, gap_s))
        else:
            self._jumps.append((step, beyond_s))
            self._seconds.append(measured_s or 0.0)

    @property
    def seconds(self) -> float:
        """From the start of each start to its newest step, all starts together."""
        return math.fsum(self._seconds)

    @property
    def note(self) -> str | None:
        """What is to be said of a clock that was set; None where it was not."""
        if not self._jumps:
            return None
        step, beyond_s = max(self._jumps, key=lambda jump: abs(jump[1]))
        way = "on" if beyond_s > 0 else "back"
        times = "" if len(self._jumps) == 1 else f" and at {len(self._jumps) - 1} other steps"
        return (
            f"Before step {step:,}{times} the clock went {way} by {_duration(abs(beyond_s))} that no step took: it was "
            "set, or the machine slept. Durations are what the steps measured; times of day do not compare across it."
        )


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"
