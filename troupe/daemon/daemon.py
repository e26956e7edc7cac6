"""The daemon: a light process that keeps one trainer alive, and answers for it whether it is there or not.

It prepares nothing and computes nothing. A trainer that fails is started again from the newest checkpoint, as often
and as soon as `restarts` allows; what was given and cannot be used ends the daemon at once.
"""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import anyio
import msgspec

from troupe.daemon import frames
from troupe.daemon.frames import Answer, Ask, Begin, Failed, Finished, Last, Playing, Rejected, Stepped
from troupe.daemon.logs import LEVELS, LOGGER, set_limits
from troupe.daemon.orders import Order
from troupe.daemon.place import Peer
from troupe.daemon.protocol import Reply, Request
from troupe.daemon.restarts import Attempts
from troupe.daemon.settings import DaemonConfig
from troupe.errors import ConfigError
from troupe.messages import (
    NOT_STARTED,
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
from troupe.runtime import FrameError
from troupe.tables import flattened
from troupe.terminal import EXIT_BAD_INPUT, EXIT_FAULT, EXIT_INTERRUPTED

_ANSWER_S = 5.0
"""That a trainer may take to answer before the daemon answers for it."""
_GONE = (anyio.EndOfStream, anyio.BrokenResourceError, FrameError, msgspec.MsgspecError)
_FROM_SIGNAL = "a signal"


class Child(Protocol):
    """A trainer's process, as ChildProcess has it."""

    @property
    def pid(self) -> int: ...
    async def send(self, frame: bytes) -> None: ...
    async def receive(self) -> bytes: ...
    def kill(self) -> None: ...
    async def aclose(self, grace_s: float | None = None) -> None: ...


class _Trainer:
    """A process that plays, and the requests that it has not answered yet."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.speaks = True
        self._numbers = itertools.count()
        self._answers: dict[int, Reply | None] = {}
        self._answered = anyio.Event()

    async def ask(self, request: Request) -> Reply | None:
        """Its answer; None where it gives none in time."""
        number = next(self._numbers)
        self._answers[number] = None
        try:
            with anyio.move_on_after(_ANSWER_S):
                await self.child.send(frames.encode(Ask(number=number, request=request)))
                while self._answers[number] is None:
                    await self._answered.wait()
            return self._answers[number]
        except _GONE:
            return Refused(message="the trainer has just ended; ask again")
        finally:
            del self._answers[number]

    def take(self, answer: Answer) -> None:
        if answer.number in self._answers:  # who asked may have gone
            self._answers[answer.number] = answer.reply
        self._wake()

    def hang_up(self) -> None:
        """Nobody will answer any more."""
        for number, reply in self._answers.items():
            if reply is None:
                self._answers[number] = Refused(message="the trainer ended before it answered; ask again")
        self._wake()

    def _wake(self) -> None:
        self._answered.set()
        self._answered = anyio.Event()


class Daemon:
    """Plays one order to its end: `await Daemon(...).run()` → the exit code."""

    def __init__(
        self,
        order: Order,
        config: DaemonConfig,
        spawn: Callable[[], Awaitable[Child]],
        *,
        attempts: Attempts | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._order = order
        self._spawn = spawn
        self._clock = clock
        self._attempts = attempts or Attempts(config, clock=clock)
        self._known = NOT_STARTED
        self._in_force = flattened(order.table)
        """What the configuration file says that has been taken over."""
        self._trainer: _Trainer | None = None
        self._has_played = self._plays = self._paused = self._killed = False
        self._end: Drain | Stop | None = None
        self._told_to_end = anyio.Event()
        self._failure: str | None = None
        """How the run failed, until it has made a step again."""
        self._next_try_s: float | None = None
        """On the clock, where no trainer is there or about to be."""

    async def run(self) -> int:
        """Keep the run alive until it has ended, or cannot go on."""
        while True:
            end = await self._play_once()
            if self._killed:
                LOGGER.warning("left without saving; the newest checkpoint stays")
                return EXIT_INTERRUPTED
            if isinstance(end, Finished):
                LOGGER.info(self._farewell(end))
                return 0
            if isinstance(end, Rejected) and (self._plays or not self._has_played):
                LOGGER.error(end.message)
                return EXIT_BAD_INPUT
            LOGGER.error(_shortened(end.message))  # also of what a start before could use: disks fill up and empty
            pause_s = self._attempts.failed()
            if self._end is not None and not self._plays:
                LOGGER.info("ended while the trainer was being started; the newest checkpoint stays")
                return 0
            if self._end is not None:
                LOGGER.error("the run failed while it was to end; its newest checkpoint stays")
                return EXIT_FAULT
            if pause_s is None:
                LOGGER.error(
                    f"given up: {self._attempts.in_vain} failures without a new step (daemon.restarts is "
                    f"{self._attempts.config.restarts}); the newest checkpoint stays. The last one: {end.message}"
                )
                return EXIT_FAULT
            if await self._told_to_end_within(pause_s, end.message):
                LOGGER.info("ended while no trainer was there; the newest checkpoint stays")
                return 0

    async def obey_signals(self) -> None:
        """First SIGTERM or SIGINT: finish the steps begun. Second: save the last completed step. Third: leave.
        SIGHUP: read the configuration again."""
        requests: list[Request] = [Drain(), Stop()]
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            async with anyio.create_task_group() as tasks:
                async for number in signals:
                    if number == signal.SIGHUP:
                        tasks.start_soon(self._heed, Reload(), _FROM_SIGNAL)
                    elif requests:
                        tasks.start_soon(self._heed, requests.pop(0), _FROM_SIGNAL)
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
        return await self._heed(request, str(peer))

    async def _heed(self, request: Request, who: str) -> Reply:
        if isinstance(request, GetStatus):
            LOGGER.debug("%s asks for the status", who)
            return await self._status()
        LOGGER.info("%s asks: %.300r", who, request)
        reply = await self._answer(request)
        LOGGER.info("%s", reply.message if isinstance(reply, Done | Refused) else reply)
        return reply

    async def _answer(self, request: Request) -> Reply:
        match request:
            case Reload():
                return await self._reload()
            case Set(key="log.level", value=value):
                return _set_level(value)
            case Pause() | Resume():
                self._paused = isinstance(request, Pause)
            case Drain() | Stop():
                self._end = Stop() if isinstance(self._end, Stop) else request
                self._told_to_end.set()
        trainer = self._trainer
        if trainer is None:
            return self._answer_alone(request)
        reply = await trainer.ask(request)
        return reply or Done(message="the trainer has not answered yet; it heeds the request when it comes to it")

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
        trainer = _Trainer(child)
        try:
            LOGGER.info(f"trainer started (pid {child.pid})")
            await child.send(frames.encode(self._begin()))
            self._trainer = trainer
            async with anyio.create_task_group() as tasks:
                if self._killed:
                    child.kill()
                elif self._end is not None:  # asked while the process was started
                    tasks.start_soon(trainer.ask, self._end)
                end = await self._follow(trainer)
                tasks.cancel_scope.cancel()
        except* _GONE as gone:
            end = Failed(message=str(_first(gone)))
        finally:
            self._trainer = None
            trainer.hang_up()
            await child.aclose()
        return end

    async def _follow(self, trainer: _Trainer) -> Last:
        while True:
            match frames.decode_in_daemon(await trainer.child.receive()):
                case Answer() as answer:
                    trainer.take(answer)
                case Playing() as playing:
                    self._now_plays(trainer, playing)
                case Stepped() as stepped:
                    self._now_at(trainer, stepped)
                case Finished() | Rejected() | Failed() as last:
                    return last

    def _now_plays(self, trainer: _Trainer, playing: Playing) -> None:
        self._has_played = self._plays = True
        trainer.speaks = playing.speaks
        self._attempts.begins_at(playing.step)
        self._know(step=playing.step, policy_version=playing.step, total_steps=playing.total_steps)
        for notice in playing.notices:
            LOGGER.info(f"note: {notice}")
        LOGGER.info(f"playing from step {playing.step} of {playing.total_steps}{', paused' if self._paused else ''}")

    def _now_at(self, trainer: _Trainer, stepped: Stepped) -> None:
        self._attempts.reached(stepped.step)
        if not self._attempts.in_vain:
            self._failure = None
        reward = stepped.metrics.get("reward")
        figures = "" if reward is None else f", reward {reward:.4f}"
        LOGGER.log(
            LEVELS["debug" if trainer.speaks else "info"], f"step {stepped.step} of {stepped.total_steps}{figures}"
        )
        for kind, count in stepped.incidents.items():
            if count > self._known.incidents.get(kind, 0) and not trainer.speaks:
                LOGGER.warning(f"incidents of kind {kind}: {count}")
        self._know(
            step=stepped.step,
            policy_version=stepped.step,
            total_steps=stepped.total_steps,
            metrics=stepped.metrics,
            incidents=stepped.incidents,
        )

    def _know(self, **figures: Any) -> None:
        self._known = msgspec.structs.replace(self._known, **figures)

    def _begin(self) -> Begin:
        """What the next trainer is to play: once a run stands there, its own config counts, whatever became of ours."""
        order = self._order
        stored = order.output / "run.toml"
        if self._has_played and stored.is_file():
            return Begin(run_toml=str(stored), output=str(order.output), paused=self._paused)
        return Begin(
            run_toml=str(order.run_toml),
            output=str(order.output),
            settings=order.settings,
            allow_changes=order.allow_changes,
            paused=self._paused,
        )

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

    async def _status(self) -> Status:
        trainer = self._trainer
        if trainer is None:
            return self._status_alone("starting" if self._next_try_s is None else "restarting")
        reply = await trainer.ask(GetStatus())
        if not isinstance(reply, Status):
            why = f"has not answered for {_ANSWER_S:g} s" if reply is None else "has just ended"
            return self._status_alone("starting", doing={"trainer": why})
        if reply.total_steps == 0:  # it has not read yet what it is to go on from
            return self._status_alone(reply.phase)
        self._known = reply
        return msgspec.structs.replace(reply, restarting=self._restarting())

    def _status_alone(self, phase: Any, doing: dict[str, str] | None = None) -> Status:
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

    async def _reload(self) -> Reply:
        """Take over what has changed in the configuration file and may change; name the rest."""
        try:
            new = flattened(self._order.read())
        except ConfigError as error:
            return Refused(message=f"nothing was taken over: {error}")
        changed = sorted(
            key
            for key in self._in_force.keys() | new.keys()
            if key not in new or key not in self._in_force or new[key] != self._in_force[key]
        )
        said = [await self._take_over(key, new) for key in changed]
        return Done(message="; ".join(said) or "nothing has changed in the configuration")

    async def _take_over(self, key: str, new: dict[str, Any]) -> str:
        section, _, name = key.partition(".")
        if key not in new:
            return f"{key} is not named any more: its default needs a restart of the daemon"
        if section == "daemon":
            try:
                self._take_over_own(name, new[key])
            except (msgspec.ValidationError, AttributeError) as error:
                return f"{key} is {new[key]!r}: {error}"
        else:
            reply = await self._answer(Set(key=key, value=new[key]))
            if not isinstance(reply, Done):
                return f"{key} needs a restart: {reply.message if isinstance(reply, Refused) else reply}"
        self._in_force[key] = new[key]
        return f"{key} is now {new[key]!r}"

    def _take_over_own(self, name: str, value: Any) -> None:
        table = msgspec.to_builtins(self._attempts.config) | {name: value}
        self._attempts.config = msgspec.convert(table, DaemonConfig)
        if name == "log_level":
            LOGGER.setLevel(LEVELS[value])
        else:
            set_limits(self._attempts.config)


def _set_level(level: Any) -> Reply:
    if not isinstance(level, str) or level not in LEVELS:
        return Refused(message=f"log.level is {level!r}: give one of {', '.join(LEVELS)}")
    LOGGER.setLevel(LEVELS[level])
    return Done(message=f"log.level is now {level}")


def _shortened(obituary: str) -> str:
    """How a process ended and the last line that it wrote, of which the log has the others already."""
    first, *lines = obituary.splitlines() or [""]
    return f"{first.removesuffix('; its last lines:')}{': ' if lines else ''}{lines[-1].strip() if lines else ''}"


def _first(faults: BaseExceptionGroup[Any]) -> BaseException:
    fault: BaseException = faults
    while isinstance(fault, BaseExceptionGroup):
        fault = fault.exceptions[0]
    return fault
