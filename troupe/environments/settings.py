"""The `[environment]` section: the tools that a policy may call, or the environment that it acts in."""

from typing import Annotated, Literal, TypeAlias

import msgspec

Run: TypeAlias = Literal["loop", "thread", "process", "worker"]
History: TypeAlias = Literal["keep", "fork"]
Calls: TypeAlias = Literal["auto", "hermes", "xml"]
OnLost: TypeAlias = Literal["repeat", "missing"]


class EnvironmentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[environment]` section. Without `factory` and `tools` a policy answers once."""

    factory: str | dict[str, str] | None = None
    """"FILE.py:NAME" or "MODULE:NAME" of an environment's class, or of a function that makes one, or what an adapter
    takes, such as "gymnasium:NAME"; or a table of them, of which a row's column `environment` names one."""
    tools: tuple[str, ...] = ()
    """"FILE.py:NAME" or "MODULE:NAME" of functions that the policy may call, beside those of the environment."""
    max_turns: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Most turns of the policy in an episode; TRL's max_tool_calling_iterations counts what comes back, and so is one
    less. None: an episode ends when no tool is called, when the environment is done, or at max_completion_length."""
    turn_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    """Seconds that one answer may take, with all that is called for it. A tool that takes longer is an error that the
    policy reads; an environment that does makes its episode missing."""
    start_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 300.0
    """Seconds that making an environment, or a process with what it loads, may take."""
    retries: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Further attempts, for environments and tools that say of themselves that they may be asked again
    (`retries = True`), after an error of a kind that passes, such as of a connection, after the time limit, or where
    their process was killed."""
    concurrency: Annotated[int, msgspec.Meta(ge=1)] = 64
    """Answers that are waited for at once, where they are not given in processes."""
    run: Run = "thread"
    """Where environments and tools run: `thread`, async functions in the event loop and others in threads; `loop`, all
    in the event loop, for what takes microseconds; `process`, in processes that can be killed; `worker`, in such
    processes of workers on other machines, which offer them (`--offers environments`)."""
    processes: Annotated[int, msgspec.Meta(ge=1)] = 4
    """With `run = "process"` or `"worker"`, how many, on all workers together; each does one thing at a time, and an
    episode stays in its own. Where there are environments and tools, so many for each."""
    breaker_failures: Annotated[int, msgspec.Meta(ge=0)] = 8
    """Answers in a row that fail by errors of a kind that passes, or the time limit, after which an environment is
    taken to be down: no step is begun until one succeeds. In as many groups its code may fail before it has worked
    once; then the run ends. 0: never."""
    breaker_max_wait_s: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    """Longest time between two tries whether an environment that is down is back."""
    history: History = "fork"
    """Where a chat template tells earlier turns in another way than they were sampled, as Qwen3's, which drops earlier
    thoughts: `fork`, the conversation goes on in a new row there, with the history as the template tells it; `keep`,
    nothing said before is changed, by a variant of the template that keeps it."""
    calls: Calls = "auto"
    """How tools are called: `hermes`, JSON in <tool_call>, as Qwen3 does; `xml`, as Qwen3-Coder does; `auto`, by what
    the chat template says."""
    gamma: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    """By which a turn's reward counts less than that of the turn before, where turns have rewards."""
    on_lost: OnLost = "repeat"
    """What becomes of an episode amid which a run was killed, where its environment cannot save itself: `repeat`, a new
    environment is brought to where it was by the calls that were answered; `missing`, the episode has no reward. So it
    is, too, where a process of environments had to be killed, or a worker was lost with them. Functions that are tools
    are never called again for what was answered."""

    def __post_init__(self) -> None:
        if isinstance(self.factory, dict) and not self.factory:
            raise ValueError("environment.factory names no environment; give at least one, or leave it out")

    @property
    def is_on(self) -> bool:
        """Whether the policy acts at all."""
        return self.factory is not None or bool(self.tools)
