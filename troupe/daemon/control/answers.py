"""What a Supervisor makes of a request: the same from a socket, from a daemon and from a terminal."""

from typing import Any, Protocol

from troupe.daemon.control.place import Peer
from troupe.daemon.control.protocol import Reply, Request
from troupe.errors import InputError, sayable
from troupe.messages import (
    Checkpoint,
    Done,
    Drain,
    GetStatus,
    Pause,
    Refused,
    Reload,
    Resume,
    Set,
    Status,
    Step,
    Stop,
)


class Run(Protocol):
    """What is asked of a Supervisor; all of it returns at once, but for `check`."""

    @property
    def pausing(self) -> bool: ...

    def status(self) -> Status: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def step(self, n: int = 1) -> None: ...
    def checkpoint(self) -> None: ...
    def drain(self) -> None: ...
    def stop(self) -> None: ...
    def set(self, key: str, value: Any) -> None: ...
    async def check(self, key: str, value: Any) -> None: ...


def answer(run: Run, request: Request) -> Reply:
    """Pass a request on to a run → what to tell who asked."""
    status = run.status()
    if isinstance(request, GetStatus):
        return status
    if status.phase in ("ended", "failed"):
        return Refused(message=f"the run has {status.phase}, after {_steps(status)}")
    match request:
        case Pause():
            run.pause()
            return Done(message="no further step will be begun; those begun will be finished")
        case Resume():
            run.resume()
            return Done(message="steps will be begun again")
        case Step():
            if not run.pausing or status.phase in ("draining", "stopping"):
                now = "going on" if status.phase == "paused" else status.phase  # a resume may not be heeded yet
                return Refused(message=f"the run is {now}, not paused: pause it first, then it goes by steps")
            run.step(request.steps)
            return Done(message=f"{request.steps} more will be begun, and then no further one")
        case Checkpoint():
            run.checkpoint()
            return Done(message=f"a checkpoint will be written when the step in hand is done; now {_steps(status)}")
        case Drain():
            run.drain()
            return Done(message="the run will end after the steps already begun")
        case Stop():
            run.stop()
            return Done(message="the run will end now, with a checkpoint of the last completed step")
        case Set():
            return _set(run, request)
        case Reload():
            return Refused(message="only a daemon reads its configuration again; use `troupe set`")


def takes_a_while(request: Request) -> bool:
    """Whether the answer waits for something to be looked at: another reward is loaded first."""
    return isinstance(request, Set) and request.key.startswith("rewards.")


async def answer_checked(run: Run, request: Request, peer: Peer | None = None) -> Reply:
    """The same, with a look at what shows only where it is tried. The run goes on meanwhile.

    `peer` may be anybody: the control socket lets in nobody else's.
    """
    if isinstance(request, Set) and takes_a_while(request) and run.status().phase not in ("ended", "failed"):
        try:
            await run.check(request.key, request.value)
        except InputError as error:
            return Refused(message=sayable(str(error)))
    return answer(run, request)


def _set(run: Run, request: Set) -> Reply:
    try:
        run.set(request.key, request.value)
    except InputError as error:
        return Refused(message=str(error))
    return Done(message=f"{request.key} will be {request.value!r} from the next step on")


def _steps(status: Status) -> str:
    return f"{status.step} of {status.total_steps} steps"
