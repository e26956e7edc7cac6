"""One daemon, from the folder that it makes to the exit code: the parts of this room put together."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path

import anyio

from troupe.daemon.daemon import Child, Daemon
from troupe.daemon.logs import LOGGER, logging_into
from troupe.daemon.orders import Order
from troupe.daemon.place import LOG
from troupe.daemon.server import ControlServer
from troupe.errors import OutputError
from troupe.runtime import ChildProcess
from troupe.terminal import EXIT_BAD_INPUT

_TRAINER = "troupe.daemon.trainer"


async def keep_alive(order: Order, *, trainer: str = _TRAINER) -> int:
    """Play an order with trainers of the module `trainer` → the exit code.

    Raises OutputError where the run folder cannot be made, or another daemon or trainer is there.
    """
    folder = order.output
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    had_log = (folder / LOG).exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: the output folder cannot be written: {error}") from None
    try:
        code = await _serve(order, trainer)
    except OutputError:
        _remove(made)
        raise
    if code == EXIT_BAD_INPUT and not (folder / "run.toml").exists():
        if not had_log:
            (folder / LOG).unlink(missing_ok=True)
        _remove(made)
    return code


async def _serve(order: Order, trainer: str) -> int:
    with logging_into(order.output, order.daemon):
        daemon = Daemon(order, order.daemon, partial(_spawned, trainer))
        async with ControlServer(order.output, daemon.answer) as server:
            if server.unavailable is not None:
                LOGGER.warning(server.unavailable)
            code = 0
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(daemon.obey_signals)
                code = await daemon.run()
                tasks.cancel_scope.cancel()
            return code


async def _spawned(module: str) -> Child:
    return await ChildProcess.start(module, tell=lambda line: LOGGER.info("| %s", line))


def _remove(made: list[Path]) -> None:
    for folder in made:
        with suppress(OSError):  # somebody else uses it by now
            folder.rmdir()
