"""A run in a terminal: what `troupe train` has beside the run itself. Its signals, a guardian, the control socket."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import anyio

from troupe.daemon.control.answers import answer_checked
from troupe.daemon.control.place import refuse_where_served
from troupe.daemon.control.server import ControlServer
from troupe.run.config import RunConfig
from troupe.run.folder_names import run_folder_named
from troupe.run.result import RunResult
from troupe.run.supervisor import Supervisor
from troupe.runtime.guarding import Guard
from troupe.runtime.outlets import finish
from troupe.runtime.terminal import EXIT_INTERRUPTED, tell

_LOADS_SILENTLY_S = 2.0
"""Before it is said that the model and the prompts are being loaded."""
_LAST_WORDS_S = 0.5
"""That a reader has, where the process ends at once."""


async def run_in_terminal(
    config: RunConfig, *, resume: bool, allow_changes: tuple[str, ...], silent_s: float = _LOADS_SILENTLY_S
) -> tuple[RunResult, bool]:
    """Make a run, to its end → what became of it, and whether somebody interrupted it.

    After `silent_s` it says that it is still loading.
    """
    if config.output is not None:
        refuse_where_served(run_folder_named(config.output))
    with Guard(config.daemon.kill_after_s, tell=lambda text: tell(text, error=True)) as guard:
        if guard.unavailable is not None:
            tell(f"note: {guard.unavailable}")
        async with AsyncExitStack() as stack:
            loading = asyncio.get_running_loop().call_later(silent_s, _tell_of_loading, config)
            try:
                run = await stack.enter_async_context(Supervisor(config, resume=resume, allow_changes=allow_changes))
            finally:
                loading.cancel()
            guard.writes_in(run.folder)
            for notice in run.notices:
                tell(f"note: {notice}", error=notice in run.lost)
            signals = _Signals(run)
            async with ControlServer(run.folder, functools.partial(answer_checked, run)) as server:
                if server.unavailable is not None:
                    tell(f"note: {server.unavailable}")
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(signals.obey, guard)
                    await run.wait()
                    tasks.cancel_scope.cancel()
    return run.result, signals.received


def _tell_of_loading(config: RunConfig) -> None:
    model, prompts = (Path(path or "").name for path in (config.model.path, config.data.path))
    tell(f"loading the model {model} and the prompts {prompts}")


class _Signals:
    """First: finish the steps begun. Second: checkpoint and end. Third: leave."""

    def __init__(self, run: Supervisor) -> None:
        self.received = False
        self._run = run
        self._requests: list[Callable[[], None]] = [self._drain, self._stop]

    async def obey(self, guard: Guard) -> None:
        """Until the run has ended."""
        # SIGHUP: the terminal was closed
        with guard.received(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            async for _ in signals:
                self.received = True
                if not self._requests:
                    finish(_LAST_WORDS_S)
                    os._exit(EXIT_INTERRUPTED)
                self._requests.pop(0)()

    def _drain(self) -> None:
        self._run.drain()
        self._run.remind("Ctrl-C again stops now")
        down = self._run.status().rewards_down
        waits = "".join(f"; what was begun waits for the reward {name}, which is down" for name in down)
        tell(
            "interrupt: finishing the steps begun; a second signal ends at once with the last completed one" + waits,
            error=True,
        )

    def _stop(self) -> None:
        self._run.stop()
        self._run.remind("Ctrl-C again leaves at once")
        tell("interrupt: saving the last completed step; a third signal leaves without saving", error=True)
