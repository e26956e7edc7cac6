"""The daemon: a light process that keeps one trainer alive, and answers for it whether it is there or not.

It prepares nothing and computes nothing. A trainer that fails is started again from the newest checkpoint, as often
and as soon as `restarts` allows; what was given and cannot be used ends the daemon at once.
"""

import logging
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import anyio
from msgspec.structs import asdict, replace

from troupe.daemon.attempts import Attempts
from troupe.daemon.control.answers import takes_a_while
from troupe.daemon.control.place import Peer
from troupe.daemon.control.protocol import Reply, Request
from troupe.daemon.logs import LOGGER, log_incidents
from troupe.daemon.orders import Order, Reloading, set_level
from troupe.daemon.page.history import History
from troupe.daemon.trainer.frames import Answer, Begin, Failed, Finished, Happened, Last, Rejected, Started, Stepped
from troupe.daemon.trainer.link import ANSWER_S, CHECKED_S, GONE, Child, Link
from troupe.errors import FolderGoneError
from troupe.messages import (
    NOT_STARTED,
    Done,
    Drain,
    GetStatus,
    Pause,
    Phase,
    Refused,
    Reload,
    Restarting,
    Resume,
    Set,
    Status,
    Stop,
)
from troupe.records.layout import RUN_TOML
from troupe.records.standing import Silence, remedy, silence_of
from troupe.run.daemon_settings import DaemonConfig
from troupe.runtime.guardian import SILENT
from troupe.runtime.held_folder import HeldFolder
from troupe.runtime.roles import first_fault
from troupe.runtime.terminal import EXIT_BAD_INPUT, EXIT_FAULT, EXIT_INTERRUPTED

_FROM_SIGNAL = "a signal"
_STAYS = "the newest checkpoint stays"


class Daemon:
    """Runs one order to its end: `await Daemon(...).run()` → the exit code."""

    def __init__(
        self,
        order: Order,
        config: DaemonConfig,
        spawn: Callable[[], Awaitable[Child]],
        *,
        attempts: Attempts | None = None,
        history: History | None = None,
        held: HeldFolder | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`history`: what writes down what is told, where there is a page to show it. `held`: the run
        folder, which has to stay in its place."""
        self.outcome = ""
        """In words, once it has ended."""
        self._order = order
        self._spawn = spawn
        self._clock = clock
        self._attempts = attempts or Attempts(config, clock=clock)
        self._history = history
        self._held = held
        self._reloading = Reloading(order, self._attempts, self._answer)
        self._known = NOT_STARTED
        self._trainer: Link | None = None
        self._has_run = self._runs = self._paused = self._killed = False
        self._end: Drain | Stop | None = None
        self._end_asked = anyio.Event()
        self._silence: Silence | None = None
        """What kept the last trainer from answering until it was killed."""
        self._failure: str | None = None
        """How the run failed, until it has made a step again."""
        self._next_try_s: float | None = None
        """On the clock, where no trainer is there or about to be."""

    async def run(self) -> int:
        """Keep the run alive until it has ended, or cannot go on."""
        while True:
            if (gone := self._gone()) is not None:  # another start would begin a new run in its place
                return self._end_with(EXIT_BAD_INPUT, str(gone))
            end = await self._run_trainer()
            if self._killed:
                return self._end_with(EXIT_INTERRUPTED, f"left without saving; {_STAYS}")
            if isinstance(end, Finished):
                return self._end_with(0, self._describe(end))
            if isinstance(end, Rejected) and (self._runs or not self._has_run):
                return self._end_with(EXIT_BAD_INPUT, end.message)
            if (gone := self._gone()) is not None:
                return self._end_with(EXIT_BAD_INPUT, str(gone))
            LOGGER.error(_shortened(end.message))  # also of what a start before could use: disks fill up and empty
            if self._history is not None:
                self._history.failed(_shortened(end.message))
            pause_s = self._attempts.failed(None if self._silence is None else self._silence.what)
            if self._end is not None and not self._runs:
                return self._end_with(0, f"ended while the trainer was being started; {_STAYS}")
            if self._end is not None:
                return self._end_with(EXIT_FAULT, "the run failed while it was to end; its newest checkpoint stays")
            if pause_s is None:
                return self._end_with(EXIT_FAULT, f"given up: {self._why_given_up(end)}")
            if await self._end_comes_within(pause_s, end.message):
                return self._end_with(0, f"ended while no trainer was there; {_STAYS}")

    def _why_given_up(self, end: Rejected | Failed) -> str:
        if (hang := self._silence) is not None:
            again = "and a start from the same step came to the same"
            return f"{hang.reason}, {again}; {remedy(hang)}. The newest checkpoint stays"
        return (
            f"{self._attempts.in_vain} failures without a new step (daemon.restarts is "
            f"{self._attempts.config.restarts}); {_STAYS}. The last one: {end.message}"
        )

    def _gone(self) -> FolderGoneError | None:
        return None if self._held is None else self._held.gone()

    def _end_with(self, code: int, message: str) -> int:
        self.outcome = message
        level = {0: logging.INFO, EXIT_INTERRUPTED: logging.WARNING}.get(code, logging.ERROR)
        LOGGER.log(level, message)
        return code

    async def obey_signals(self) -> None:
        """First SIGTERM or SIGINT: finish the steps begun. Second: save the last completed step. Third: leave.
        SIGHUP: read the configuration again."""
        requests: list[Request] = [Drain(), Stop()]
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            async with anyio.create_task_group() as tasks:
                async for number in signals:
                    if number == signal.SIGHUP:
                        tasks.start_soon(self.answer, Reload(), _FROM_SIGNAL)
                    elif requests:
                        tasks.start_soon(self.answer, requests.pop(0), _FROM_SIGNAL)
                    else:
                        self.kill()

    def kill(self) -> None:
        """End the trainer where it stands, and the daemon with it."""
        self._killed = True
        self._end = Stop()
        self._end_asked.set()
        if self._trainer is not None:
            self._trainer.child.kill()

    async def answer(self, request: Request, who: Peer | str) -> Reply:
        """What whoever asks is told; the log says that he did."""
        if isinstance(request, GetStatus):
            LOGGER.debug("%s asks for the status", who)
            return await self.status()
        LOGGER.info("%s asks: %.300r", who, request)
        reply = await self._answer(request)
        LOGGER.info("%s", reply.message if isinstance(reply, Done | Refused) else reply)
        return reply

    async def _answer(self, request: Request) -> Reply:
        match request:
            case Reload():
                return await self._reloading.reload()
            case Set(key="log.level", value=value):
                return set_level(value)
            case Pause() | Resume():
                self._paused = isinstance(request, Pause)
            case Drain() | Stop():
                self._end = Stop() if isinstance(self._end, Stop) else request
                self._end_asked.set()
        trainer = self._trainer
        if trainer is None:
            return self._answer_alone(request)
        reply = await trainer.ask(request, CHECKED_S if takes_a_while(request) else ANSWER_S)
        if reply is not None:
            return reply
        why = silence_of(self._order.output, trainer.child.pid) or "it has not answered yet"
        return Done(message=f"the trainer heeds the request when it comes to it; {why}")

    def _answer_alone(self, request: Request) -> Reply:
        match request:
            case Pause():
                return Done(message="no trainer is there; the next one will begin no step until told to resume")
            case Resume():
                return Done(message="no trainer is there; the next one will begin steps")
            case Drain() | Stop():
                return Done(message=f"no trainer is there; the daemon ends, and {_STAYS}")
        wait_s = self._wait_s()
        when = "it is being started" if wait_s is None else f"the next one starts in {wait_s:.0f} s"
        return Refused(message=f"no trainer is there to heed this, {when}; ask again then")

    async def _run_trainer(self) -> Last:
        """One trainer, from its start to its end."""
        self._runs = False
        try:
            child = await self._spawn()
        except OSError as error:
            return Failed(message=f"the trainer's process could not be started: {error}")
        trainer = Link(child)
        try:
            LOGGER.info(f"trainer started (pid {child.pid})")
            await trainer.send(self._begin())
            self._trainer = trainer
            async with anyio.create_task_group() as tasks:
                if self._killed:
                    child.kill()
                elif self._end is not None:  # asked while the process was started
                    tasks.start_soon(trainer.ask, self._end)
                why = partial(silence_of, self._order.output, child.pid)
                tasks.start_soon(trainer.watch, lambda: self._attempts.config.kill_after_s, why)
                end = await self._follow(trainer)
                tasks.cancel_scope.cancel()
        except* GONE as gone:
            end = Failed(message=trainer.verdict or str(first_fault(gone)))
        finally:
            self._trainer, self._silence = None, trainer.silence
            trainer.hang_up()
            await child.aclose()
            with suppress(OSError):
                (self._order.output / SILENT).unlink(missing_ok=True)
        return end

    async def _follow(self, trainer: Link) -> Last:
        while True:
            frame = await trainer.receive()
            match frame:
                case Answer():
                    trainer.settle(frame)
                    continue
                case Started():
                    self._note_start(trainer, frame)
                case Stepped():
                    self._note_step(trainer, frame)
                case Happened() if not trainer.speaks:
                    log_incidents(frame)
                case Finished() | Rejected() | Failed():
                    return frame
            if self._history is not None:
                self._history.add(frame)

    def _note_start(self, trainer: Link, started: Started) -> None:
        self._has_run = self._runs = True
        trainer.speaks = started.speaks
        self._attempts.begins_at(started.step)
        step, total_steps = started.step, started.total_steps
        self._known = replace(self._known, step=step, policy_version=step, total_steps=total_steps)
        for notice in started.notices:
            LOGGER.info(f"note: {notice}")
        LOGGER.info(f"running from step {step} of {total_steps}{', paused' if self._paused else ''}")

    def _note_step(self, trainer: Link, stepped: Stepped) -> None:
        self._attempts.reached(stepped.step)
        if not self._attempts.in_vain:
            self._failure = None
        reward = stepped.metrics.get("reward")
        figures = "" if reward is None else f", reward {reward:.4f}"
        level = logging.DEBUG if trainer.speaks else logging.INFO
        LOGGER.log(level, f"step {stepped.step} of {stepped.total_steps}{figures}")
        self._known = replace(self._known, policy_version=stepped.step, **asdict(stepped))

    def _begin(self) -> Begin:
        """What the next trainer is to run: once a run stands there, its own config counts, whatever became of ours."""
        order = self._order
        begin = Begin(
            run_toml=str(order.run_toml),
            output=str(order.output),
            identity=None if self._held is None else self._held.identity,
            settings=order.settings,
            allow_changes=order.allow_changes,
            paused=self._paused,
            completions=self._history is not None,
        )
        stored = order.output / RUN_TOML
        if not self._has_run or not stored.is_file():
            return begin
        # of the machine: what was allowed holds until a checkpoint was written here
        allowed = tuple(key for key in order.allow_changes if key.partition(".")[0] == "machine")
        return replace(begin, run_toml=str(stored), settings=(), allow_changes=allowed)

    async def _end_comes_within(self, pause_s: float, reason: str) -> bool:
        self._failure = _shortened(reason)
        self._next_try_s = self._clock() + pause_s
        LOGGER.info(
            f"start {self._attempts.in_vain} of {self._attempts.config.restarts} after a failure in {pause_s:.1f} s"
        )
        with anyio.move_on_after(pause_s):
            await self._end_asked.wait()
        self._next_try_s = None
        return self._end is not None

    async def status(self) -> Status:
        """What the run is doing, whether a trainer is there or not."""
        trainer = self._trainer
        if trainer is None:
            return self._status_alone("starting" if self._next_try_s is None else "restarting")
        reply = await trainer.ask(GetStatus())
        if not isinstance(reply, Status):
            why = f"has not answered for {ANSWER_S:g} s" if reply is None else "has just ended"
            hang = silence_of(self._order.output, trainer.child.pid)
            if reply is not None or hang is None:
                return self._status_alone("starting", doing={"trainer": why})
            phase: Phase = "running" if self._runs else "starting"
            return self._status_alone(phase, doing={"trainer": str(hang)}, notice=hang.reason)
        if reply.total_steps == 0:  # it has not read yet what it is to go on from
            return self._status_alone(reply.phase, activity=reply.activity)
        self._known = reply
        return replace(reply, restarting=self._restarting())

    def _status_alone(self, phase: Phase, doing: dict[str, str] | None = None, **others: Any) -> Status:
        """The status where the trainer says none: what it said last, without what went with it."""
        gone: dict[str, Any] = {"groups": (), "queues": {}, "held": (), "rewards_down": {}, "activity": None}
        gone |= {"doing": doing or {}, "restarting": self._restarting()}
        return replace(self._known, phase=phase, **gone | others)

    def _restarting(self) -> Restarting | None:
        if self._failure is None:
            return None
        return Restarting(
            attempt=self._attempts.in_vain,
            limit=self._attempts.config.restarts,
            next_try_s=self._wait_s() or 0.0,
            reason=self._failure,
        )

    def _wait_s(self) -> float | None:
        return None if self._next_try_s is None else max(0.0, self._next_try_s - self._clock())

    def _describe(self, end: Finished) -> str:
        if end.steps >= end.total_steps:
            return f"the run is complete: {end.steps} of {end.total_steps} steps, in {self._order.output}"
        if end.stopped_early:
            return f"{end.stopped_early}, in {self._order.output}"
        return f"ended after {end.steps} of {end.total_steps} steps; the same command goes on with it"


def _shortened(message: str) -> str:
    """How a process ended and the last line that it wrote, of which the log has the others already."""
    first, *lines = message.splitlines() or [""]
    return f"{first.removesuffix('; its last lines:')}{': ' if lines else ''}{lines[-1].strip() if lines else ''}"
