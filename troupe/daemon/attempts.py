"""How often, and how soon, a run that has failed is started again.

What counts as progress is a step that no start has made before: a run that always fails at the same place would
otherwise be started for ever.
"""

import random
import time
from collections import deque
from collections.abc import Callable

from troupe.run.daemon_settings import DaemonConfig
from troupe.runtime.backoff import backoff_s

_IN_VAIN = 4
"""Times the limit that a run may fail in a row, however far apart, without progress."""


class Attempts:
    """The failures of one run since it last made progress."""

    def __init__(
        self,
        config: DaemonConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.config = config
        """May be changed at any time."""
        self.in_vain = 0
        """Failures without a new step in between."""
        self._furthest = 0
        self._hung_in: str | None = None
        self._failures: deque[float] = deque()
        self._clock = clock
        self._jitter = jitter

    def reached(self, step: int) -> None:
        """So many steps are done."""
        if step > self._furthest:
            self._furthest = step
            self.in_vain = 0
            self._failures.clear()
            self._hung_in = None

    def begins_at(self, step: int) -> None:
        """A start goes on from so many steps, which is no progress by itself."""
        self._furthest = max(self._furthest, step)

    def failed(self, hung_in: str | None = None) -> float | None:
        """One more failure → seconds until the next start; None: give up. `hung_in`: what kept the trainer from
        answering, where that was it; what hangs twice on end at the same place would do so again."""
        config, now_s = self.config, self._clock()
        hangs_again = hung_in is not None and hung_in == self._hung_in
        self._hung_in = hung_in
        self.in_vain += 1
        self._failures.append(now_s)
        while self._failures[0] < now_s - config.restart_window_s:
            self._failures.popleft()
        if hangs_again or len(self._failures) > config.restarts or self.in_vain > _IN_VAIN * max(1, config.restarts):
            return None
        pause_s = backoff_s(self.in_vain, config.first_pause_s) * self._jitter(0.75, 1.25)
        return min(config.longest_pause_s, pause_s)
