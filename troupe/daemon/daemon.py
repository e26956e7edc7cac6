"""The daemon: a light process that keeps one trainer alive, and answers for it whether it is there or not.

It prepares nothing and computes nothing. A trainer that fails is started again from the newest checkpoint, as often
and as soon as `restarts` allows; what was given and cannot be used ends the daemon at once.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import anyio
import msgspec

from troupe.daemon.attempts import Attempts
from troupe.daemon.control.answers import takes_a_while
from troupe.daemon.control.place import Peer
from troupe.daemon.control.protocol import Reply, Request
from troupe.daemon.logs import LEVELS, LOGGER
from troupe.daemon.orders import Order
from troupe.daemon.page.history import History
from troupe.daemon.reloading import Reloading, set_level
from troupe.daemon.trainer.frames import Answer, Begin, Failed, Finished, Last, Playing, Rejected, Stepped, Told
from troupe.daemon.trainer.link import ANSWER_S, CHECKED_S, GONE, Child, Player, first_of
from troupe.errors import FolderGoneError
from troupe.messages import (
    NOT_STARTED,
    Activity,
    Done,
    Drain,
    GetStatus,
    Pause,
    Refused,
    Reload,
    Restarting,
    Resume,
    Set,
    Status,
    Stop,
)
from troupe.records.silence import Silence, remedy, silence_of
from troupe.run.daemon_settings import DaemonConfig
from troupe.runtime.guardian import SILENT
from troupe.runtime.held_folder import HeldFolder
from troupe.runtime.terminal import EXIT_BAD_INPUT, EXIT_FAULT, EXIT_INTERRUPTED

_FROM_SIGNAL = "a signal"


class Daemon:
    """Plays one order to its end: `await Daemon(...).run()` → the exit code."""

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
        self.last_words = ""
        """How it ended."""
        self._order = order
        self._spawn = spawn
        self._clock = clock
        self._attempts = attempts or Attempts(config, clock=clock)
        self._history = history
        self._held = held
        self._reloading = Reloading(order, self._attempts, self._answer)
        self._known = NOT_STARTED
        self._trainer: Player | None = None
        self._has_played = self._plays = self._paused = self._killed = False
        self._end: Drain | Stop | None = None
        self._told_to_end = anyio.Event()
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
                return self._over(EXIT_BAD_INPUT, str(gone))
            end = await self._play_once()
            if self._killed:
                return self._over(EXIT_INTERRUPTED, "left without saving; the newest checkpoint stays")
            if isinstance(end, Finished):
                return self._over(0, self._farewell(end))
            if isinstance(end, Rejected) and (self._plays or not self._has_played):
                return self._over(EXIT_BAD_INPUT, end.message)
            if (gone := self._gone()) is not None:
                return self._over(EXIT_BAD_INPUT, str(gone))
            LOGGER.error(_shortened(end.message))  # also of what a start before could use: disks fill up and empty
            if self._history is not None:
                self._history.failed(_shortened(end.message))
            hang = self._silence
            pause_s = self._attempts.failed(None if hang is None else hang.what)
            if self._end is not None and not self._plays:
                return self._over(0, "ended while the trainer was being started; the newest checkpoint stays")
            if self._end is not None:
                return self._over(EXIT_FAULT, "the run failed while it was to end; its newest checkpoint stays")
            if pause_s is None and hang is not None:
                text = (
                    f"given up: {hang.reason}, and a start from the same step came to the same; {remedy(hang)}. The "
                    "newest checkpoint stays"
                )
                return self._over(EXIT_FAULT, text)
            if pause_s is None:
                text = (
                    f"given up: {self._attempts.in_vain} failures without a new step (daemon.restarts is "
                    f"{self._attempts.config.restarts}); the newest checkpoint stays. The last one: {end.message}"
                )
                return self._over(EXIT_FAULT, text)
            if await self._told_to_end_within(pause_s, end.message):
                return self._over(0, "ended while no trainer was there; the newest checkpoint stays")

    def _gone(self) -> FolderGoneError | None:
        return None if self._held is None else self._held.gone()

    def _over(self, code: int, message: str) -> int:
        self.last_words = message
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
                        tasks.start_soon(self.heed, Reload(), _FROM_SIGNAL)
                    elif requests:
                        tasks.start_soon(self.heed, requests.pop(0), _FROM_SIGNAL)
                    else:
                        self.kill()

    def kill(self) -> None:
        """End the trainer where it stands, and the daemon with it."""
        self._killed = True
        self._end = Stop()
        self._told_to_end.set()
        if self._trainer is not None:
            self._trainer.child.kill()

    async def answer(self, request: Request, peer: Peer) -> Reply:
        """What a client of the control socket is told."""
        return await self.heed(request, str(peer))

    async def heed(self, request: Request, who: str) -> Reply:
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
                self._told_to_end.set()
        trainer = self._trainer
        if trainer is None:
            return self._answer_alone(request)
        reply = await trainer.ask(request, CHECKED_S if takes_a_while(request) else ANSWER_S)
        if reply is not None:
            return reply
        hang = silence_of(self._order.output, trainer.child.pid)
        why = "it has not answered yet" if hang is None else str(hang)
        return Done(message=f"the trainer heeds the request when it comes to it; {why}")

    def _answer_alone(self, request: Request) -> Reply:
        match request:
            case Pause():
                return Done(message="no trainer is there; the next one will begin no step until told to resume")
            case Resume():
                return Done(message="no trainer is there; the next one will begin steps")
            case Drain() | Stop():
                return Done(message="no trainer is there; the daemon ends, and the newest checkpoint stays")
        wait_s = self._wait_s()
        when = "it is being started" if wait_s is None else f"the next one starts in {wait_s:.0f} s"
        return Refused(message=f"no trainer is there to heed this, {when}; ask again then")

    async def _play_once(self) -> Last:
        """One trainer, from its start to its end."""
        self._plays = False
        try:
            child = await self._spawn()
        except OSError as error:
            return Failed(message=f"the trainer's process could not be started: {error}")
        trainer = Player(child)
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
            end = Failed(message=trainer.verdict or str(first_of(gone)))
        finally:
            self._trainer, self._silence = None, trainer.silence
            trainer.hang_up()
            await child.aclose()
            with suppress(OSError):
                (self._order.output / SILENT).unlink(missing_ok=True)
        return end

    async def _follow(self, trainer: Player) -> Last:
        while True:
            frame = await trainer.receive()
            match frame:
                case Answer():
                    trainer.take(frame)
                    continue
                case Playing():
                    self._now_plays(trainer, frame)
                case Stepped():
                    self._now_at(trainer, frame)
                case Told():
                    self._tell(trainer, frame)
                case Finished() | Rejected() | Failed():
                    return frame
            if self._history is not None:
                self._history.take(frame)

    def _now_plays(self, trainer: Player, playing: Playing) -> None:
        self._has_played = self._plays = True
        trainer.speaks = playing.speaks
        self._attempts.begins_at(playing.step)
        self._know(step=playing.step, policy_version=playing.step, total_steps=playing.total_steps)
        for notice in playing.notices:
            LOGGER.info(f"note: {notice}")
        LOGGER.info(f"playing from step {playing.step} of {playing.total_steps}{', paused' if self._paused else ''}")

    def _now_at(self, trainer: Player, stepped: Stepped) -> None:
        self._attempts.reached(stepped.step)
        if not self._attempts.in_vain:
            self._failure = None
        reward = stepped.metrics.get("reward")
        figures = "" if reward is None else f", reward {reward:.4f}"
        LOGGER.log(
            LEVELS["debug" if trainer.speaks else "info"], f"step {stepped.step} of {stepped.total_steps}{figures}"
        )
        self._know(
            step=stepped.step,
            policy_version=stepped.step,
            total_steps=stepped.total_steps,
            metrics=stepped.metrics,
            incidents=stepped.incidents,
        )

    def _tell(self, trainer: Player, told: Told) -> None:
        if trainer.speaks:
            return
        if told.left_out:
            LOGGER.warning(f"{told.left_out} further incidents, which came before these")
        for incident, times in zip(told.incidents, told.times or (1,) * len(told.incidents), strict=True):
            again = f" ({times} times)" if times > 1 else ""
            LOGGER.warning(f"incident in {incident.actor}: {incident.message}{again}")

    def _know(self, **figures: Any) -> None:
        self._known = msgspec.structs.replace(self._known, **figures)

    def _begin(self) -> Begin:
        """What the next trainer is to play: once a run stands there, its own config counts, whatever became of ours."""
        order = self._order
        identity = None if self._held is None else self._held.identity
        stored = order.output / "run.toml"
        if self._has_played and stored.is_file():
            return Begin(
                run_toml=str(stored),
                output=str(order.output),
                identity=identity,
                # of the machine: what was allowed holds until a checkpoint was written here
                allow_changes=tuple(key for key in order.allow_changes if key.partition(".")[0] == "machine"),
                paused=self._paused,
                completions=self._has_page,
            )
        return Begin(
            run_toml=str(order.run_toml),
            output=str(order.output),
            identity=identity,
            settings=order.settings,
            allow_changes=order.allow_changes,
            paused=self._paused,
            completions=self._has_page,
        )

    @property
    def _has_page(self) -> bool:
        return self._history is not None

    async def _told_to_end_within(self, pause_s: float, reason: str) -> bool:
        self._failure = _shortened(reason)
        self._next_try_s = self._clock() + pause_s
        LOGGER.info(
            f"start {self._attempts.in_vain} of {self._attempts.config.restarts} after a failure in {pause_s:.1f} s"
        )
        with anyio.move_on_after(pause_s):
            await self._told_to_end.wait()
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
            phase = "running" if self._plays else "starting"
            return msgspec.structs.replace(self._status_alone(phase, doing={"trainer": str(hang)}), notice=hang.reason)
        if reply.total_steps == 0:  # it has not read yet what it is to go on from
            return self._status_alone(reply.phase, activity=reply.activity)
        self._known = reply
        return msgspec.structs.replace(reply, restarting=self._restarting())

    def _status_alone(
        self, phase: Any, doing: dict[str, str] | None = None, activity: Activity | None = None
    ) -> Status:
        known = self._known
        return msgspec.structs.replace(
            known,
            phase=phase,
            groups=(),
            queues={},
            doing=doing or {},
            held=(),
            rewards_down={},
            restarting=self._restarting(),
            activity=activity,
        )

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

    def _farewell(self, end: Finished) -> str:
        if end.complete:
            return f"the run is complete: {end.steps} of {end.total_steps} steps, in {self._order.output}"
        return f"ended after {end.steps} of {end.total_steps} steps; the same command goes on with it"


def _shortened(obituary: str) -> str:
    """How a process ended and the last line that it wrote, of which the log has the others already."""
    first, *lines = obituary.splitlines() or [""]
    return f"{first.removesuffix('; its last lines:')}{': ' if lines else ''}{lines[-1].strip() if lines else ''}"
