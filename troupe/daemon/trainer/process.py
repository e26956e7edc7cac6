"""The trainer in a process of its own: `python -m troupe.daemon.trainer.process`, started by the daemon alone.

A Supervisor that is spoken to in frames. What the user gave and cannot be used is told as such, so that the daemon does
not try it again; any other fault is told in one sentence, or by the traceback that the daemon reads.
"""

import errno
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import TypeAlias

import anyio

from troupe.daemon.control.answers import answer_checked, takes_a_while
from troupe.daemon.page.news import News
from troupe.daemon.trainer.frames import (
    Answer,
    Ask,
    Begin,
    Failed,
    Finished,
    Last,
    Rejected,
    Started,
    Stepped,
    decode_in_trainer,
)
from troupe.errors import InputError, OutputError, TroupeError, sayable
from troupe.messages import GroupClosed, Incident, Refused
from troupe.records.layout import RUN_TOML
from troupe.records.standing import read_summary
from troupe.run.config import Layer, RunConfig, layered, load_config, read_overrides, settings_layers
from troupe.run.supervisor import Supervisor
from troupe.runtime.frames import Connection, encode
from troupe.runtime.guarding import Guard
from troupe.runtime.held_folder import HeldFolder
from troupe.runtime.process import serve
from troupe.runtime.roles import together

Supervise: TypeAlias = Callable[..., Supervisor]

_NEWS_GAP_S = 0.5
"""Between two frames with news, at least."""
_CHECKS = 64
"""Requests that may wait for a look at what they ask for."""
_PASSES = {errno.ENOSPC, errno.EDQUOT, errno.EIO}
"""What is wrong with a disk today and may not be tomorrow."""


async def run_trainer(connection: Connection, supervise: Supervise = Supervisor) -> None:
    """Make one run from the first frame on, and tell how it ended."""
    begin = decode_in_trainer(await connection.receive())
    assert isinstance(begin, Begin)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # the daemon decides; a handler, because processes of a reward would inherit that a signal is ignored
        signal.signal(number, lambda *_: None)
    try:
        with Guard(signals=False) as guard:  # that it ends is the daemon's business
            guard.writes_in(Path(begin.output))
            last: Last = await _run(connection, begin, supervise)
    except InputError as error:
        message = sayable(str(error))
        last = Failed(message=message) if _passes(error) else Rejected(message=message)
    except TroupeError as error:
        last = Failed(message=sayable(str(error)))
    await connection.send(encode(last))


async def _run(connection: Connection, begin: Begin, supervise: Supervise) -> Finished:
    folder = Path(begin.output)
    if begin.identity is not None and not _leads_to(folder, begin.identity):
        raise OutputError(f"{folder}: the folder was moved, deleted or exchanged while the run was to be started")
    stands = (folder / RUN_TOML).is_file()
    # of a run that stands there all stays that neither the file nor a setting says
    base, said = begin.run_toml, []
    if stands:
        base, said = str(folder / RUN_TOML), [Layer(begin.run_toml, read_overrides(begin.run_toml))]
    config = layered(base, [*said, Layer("--output", {"output": begin.output}), *settings_layers(begin.settings)])
    if stands and (finished := _finished(folder, config)):
        return finished
    run = supervise(config, resume=stands, allow_changes=begin.allow_changes)
    if begin.paused:
        run.pause()
    listening, checking = anyio.CancelScope(), anyio.CancelScope()
    to_check, checks = anyio.create_memory_object_stream[Ask](_CHECKS)

    async def listen() -> None:
        with listening, to_check:
            while True:
                ask = decode_in_trainer(await connection.receive())
                assert isinstance(ask, Ask)
                if takes_a_while(ask.request):  # others are answered meanwhile
                    with suppress(anyio.WouldBlock):  # who asked so often is told that there was no answer
                        to_check.send_nowait(ask)
                else:
                    await _answer(run, ask, connection)

    async def check() -> None:
        with checking, checks:
            async for ask in checks:
                await _answer(run, ask, connection)

    async def work() -> None:
        try:
            async with run:
                await _tell(connection, run, completions=begin.completions)
        finally:
            listening.cancel()
            checking.cancel()

    await together([listen, check, work])
    result = run.result
    return Finished(steps=result.steps, total_steps=result.total_steps, stopped_early=result.stopped_early)


async def _answer(run: Supervisor, ask: Ask, connection: Connection) -> None:
    """Answer a request, which must not end the run."""
    try:
        frame = encode(Answer(number=ask.number, reply=await answer_checked(run, ask.request)))
    except Exception as error:
        refused = Refused(message=f"the request failed: {error!a}")
        frame = encode(Answer(number=ask.number, reply=refused))
    await connection.send(frame)


def _passes(error: InputError) -> bool:
    """Whether another try may succeed although nobody has changed what was given."""
    return isinstance(error, OutputError) and getattr(error.__context__, "errno", None) in _PASSES


async def _tell(connection: Connection, run: Supervisor, *, completions: bool) -> None:
    """Tell the daemon that the run has begun, of every step and of what else happens, until it has ended."""
    status, speaks = run.status(), "console" in run.config.metrics.sinks
    started = Started(notices=run.notices, step=status.step, total_steps=status.total_steps, speaks=speaks)
    await connection.send(encode(started))
    news, over = News(), anyio.CancelScope()

    async def hear(messages: AsyncIterator[Incident | GroupClosed]) -> None:
        async for message in messages:
            news.add(message)

    async def tell_news() -> None:
        with over:
            while True:
                await news.some()
                await connection.send(encode(news.collect()))
                await anyio.sleep(_NEWS_GAP_S)

    async def tell_steps() -> None:
        async for update in run.updates():
            step, total_steps, metrics = update.step, update.total_steps, update.metrics
            stepped = Stepped(step=step, total_steps=total_steps, metrics=metrics, incidents=run.status().incidents)
            await connection.send(encode(stepped))
        over.cancel()

    hearing = [partial(hear, run.incidents())]
    if completions:
        hearing.append(partial(hear, run.closed_groups()))
    await together([tell_steps, tell_news, *hearing])
    if news:
        await connection.send(encode(news.collect()))


def _leads_to(folder: Path, identity: tuple[int, int]) -> bool:
    try:
        with closing(HeldFolder(folder)) as held:
            return held.identity == identity
    except OSError:
        return False


def _finished(folder: Path, config: RunConfig) -> Finished | None:
    """How far the run in the folder came, where no step is left that this config asks for."""
    summary = read_summary(folder)
    if summary is None or summary.total_steps is None:
        return None
    whole = load_config(folder / RUN_TOML)
    stored, asked = whole.learner, config.learner
    ends_alike = (whole.evaluation, whole.curriculum) == (config.evaluation, config.curriculum)
    over = summary.steps >= summary.total_steps or (summary.stopped_early and ends_alike)
    as_long = (stored.epochs, stored.max_steps, stored.batch_size) == (asked.epochs, asked.max_steps, asked.batch_size)
    if not over or not as_long:
        return None
    return Finished(steps=summary.steps, total_steps=summary.total_steps, stopped_early=summary.stopped_early)


if __name__ == "__main__":
    serve(run_trainer)
