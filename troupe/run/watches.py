"""What is looked after while actors run: that something moves, and that the run folder stays in its place."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import anyio

from troupe.errors import FolderGoneError
from troupe.messages import Incident, LiveGroup, Update
from troupe.records.layout import RUN_TOML
from troupe.run.folder import RunFolder
from troupe.run.pipeline import Pipeline
from troupe.run.status import last_movement_s, live_groups, stall
from troupe.runtime.device import DeviceThread
from troupe.runtime.watchdog import watch


class StallWatch:
    """Tells when nothing has moved for a while."""

    def __init__(self, pipeline: Pipeline, limit_s: float, may_rest: Callable[[], bool]) -> None:
        """`limit_s`: 0 is never. `may_rest`: whether it is no wonder that nothing moves where no group is alive."""
        self._pipeline = pipeline
        self._limit_s = limit_s
        self._may_rest = may_rest
        self._watching = anyio.CancelScope()

    def set_limit(self, limit_s: float) -> None:
        """Begin anew with another limit."""
        self._limit_s = limit_s
        self._watching.cancel()

    async def run(self) -> None:
        """Watch for as long as it is awaited."""
        begun_s = time.perf_counter()

        def moved_s() -> float:
            return max(begun_s, last_movement_s(self._pipeline.actors))

        while True:  # once more whenever the limit is set
            with anyio.CancelScope() as self._watching:
                if not self._limit_s:
                    await anyio.Event().wait()  # without a timer, which would hide that nothing can go on
                await watch(self._limit_s, moved_s, self._tell_of_stall, clock=time.perf_counter)

    def _tell_of_stall(self, still_s: float) -> None:
        now_s = time.perf_counter()
        groups = groups_of(self._pipeline, now_s)
        if groups or not self._may_rest():
            incident = stall(groups, self._pipeline.actors, now_s, still_s)
            self._pipeline.wiring.supervisor_report.incident_nowait(incident)


def groups_of(pipeline: Pipeline, now_s: float) -> tuple[LiveGroup, ...]:
    """Groups between prompting and the end of their training, the oldest first."""
    ledgers = pipeline.ledgers
    return live_groups(ledgers.prompts.alive, pipeline.actors, now_s, handed_over=ledgers.handed_over)


async def watch_folder(place: RunFolder, pipeline: Pipeline, device: DeviceThread) -> None:
    """End the run where its folder is taken away: what would be written from then on is half a run."""

    def is_restored() -> bool:
        place.check()
        with suppress(OSError):  # a disk that fails now may not at the next step
            return place.restore_config()
        return False

    def tell(kind: str, message: str) -> None:
        incident = Incident(actor="supervisor", kind=kind, message=message)
        pipeline.wiring.supervisor_report.incident_nowait(incident)

    async for _ in pipeline.wiring.news.listen(1, Update):
        try:
            if await device.run(is_restored):
                tell("file_lost", f"{place.path / RUN_TOML} was removed under the run; it is stored again")
        except FolderGoneError as error:
            tell("folder_gone", str(error))
            raise
