"""One daemon, from the folder that it makes to the exit code: the parts of this room put together."""

import errno
from contextlib import AsyncExitStack, closing, suppress
from functools import partial
from pathlib import Path

import anyio

from troupe.daemon.control.server import ControlServer
from troupe.daemon.daemon import Daemon
from troupe.daemon.logs import LOGGER, logging_into
from troupe.daemon.orders import Order
from troupe.daemon.page.history import History
from troupe.errors import InputError, OutputError, RunError
from troupe.records.layout import LOG, RUN_TOML
from troupe.runtime.held_folder import HeldFolder
from troupe.runtime.process import ChildProcess
from troupe.runtime.terminal import EXIT_BAD_INPUT, tell

_TRAINER = "troupe.daemon.trainer.process"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


async def keep_alive(order: Order, *, trainer: str = _TRAINER) -> int:
    """Run an order with trainers of the module `trainer` → the exit code.

    Raises OutputError where the run folder cannot be made, or another daemon or trainer is there; RunError where a full
    or failing disk is why; ConfigError where the page cannot have its port.
    """
    folder = order.output
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    had_log = (folder / LOG).exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        kind = RunError if error.errno in _FULL else OutputError  # what no change of the configuration mends
        raise kind(f"{folder}: the output folder cannot be written: {error}") from None
    with closing(HeldFolder(folder)) as held:
        try:
            code = await _serve(order, trainer, held)
        except InputError:
            _remove(made)
            raise
        if code == EXIT_BAD_INPUT and not (folder / RUN_TOML).exists() and held.gone() is None:
            if not had_log:
                (folder / LOG).unlink(missing_ok=True)
            _remove(made)
        return code


async def _serve(order: Order, trainer: str, held: HeldFolder) -> int:
    folder, port = order.output, order.daemon.page
    with logging_into(folder, order.daemon):
        history = History(folder.name, str(folder)) if port else None
        spawn = partial(ChildProcess.start, trainer, tell=lambda line: LOGGER.info("| %s", line))
        daemon = Daemon(order, order.daemon, spawn, history=history, held=held)
        async with ControlServer(folder, daemon.answer) as server, AsyncExitStack() as stack:
            if server.unavailable is not None:
                LOGGER.warning(server.unavailable)
            if history is not None:
                from troupe.daemon.page.server import Page  # where it is asked for: the daemon is light

                await history.read(folder)
                page = await stack.enter_async_context(Page(daemon, history, folder, 0 if port is True else port))
                tell(f"live page: {page.address}")
                LOGGER.info("a live page is served; its address is in page.url")
            code = 0
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(daemon.obey_signals)
                code = await daemon.run()
                tasks.cancel_scope.cancel()
            if history is not None:
                await history.look(folder)
                history.end(daemon.outcome, well=code == 0)
            return code


def _remove(made: list[Path]) -> None:
    for folder in made:
        with suppress(OSError):  # somebody else uses it by now
            folder.rmdir()
