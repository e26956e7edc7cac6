"""`verifiers:TASKSET?env=ID&key=value`: tasksets of verifiers (0.4 and later), with their own rewards.

TASKSET is the id under which verifiers finds it, options are those of the taskset's config, and `env` is an environment
of verifiers that plays it otherwise than the taskset's own. A row's column `idx` says which task it is; `task_rows`
makes the rows. What the environment's `run` wants of its agent is asked of the policy: that agent must be the only one,
and the taskset may have no tool servers and need no container, of which this process has none.
"""

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

from troupe.environments.adapters.options import check_version, package, read_options
from troupe.environments.convention import StepResult
from troupe.errors import WorldError
from troupe.rewards.extras import plain
from troupe.rewards.faults import described

PREFIX = "verifiers"


class Verifiers:
    """One task of a taskset, played by the policy."""

    def __init__(self, world: "Tasks") -> None:
        self._world = world
        self._player: _Player | None = None
        self._run: asyncio.Task[None] | None = None

    async def reset(self, idx: int, **columns: Any) -> None:
        """Begin the task of this number. What it asks is in the row's prompt."""
        await self.close()
        task = self._world.task(idx)
        self._player = _Player(self._world.seat)
        self._run = asyncio.create_task(_play(self._world.env, task, self._player))
        await self._heard(self._player)

    async def step(self, text: str) -> StepResult:
        """Give what was said to the environment's run. At the end, `info` has its rewards and metrics by name."""
        assert self._player is not None
        self._player.said.put_nowait(text)
        heard = await self._heard(self._player)
        if heard is not None:
            return StepResult(heard, 0.0)
        trace = self._player.trace
        rewards = {name: each.score for name, each in trace.rewards.items() if each is not None}
        info = plain({"rewards": rewards, "metrics": dict(trace.metrics)})
        return StepResult(None, float(trace.reward), True, info)

    async def _heard(self, player: "_Player") -> str | None:
        """What the run tells its agent next; None where it has ended. Raises what it raised."""
        assert self._run is not None
        hearing = asyncio.create_task(player.heard.get())
        await asyncio.wait({hearing, self._run}, return_when=asyncio.FIRST_COMPLETED)
        if hearing.done():
            return hearing.result()
        hearing.cancel()
        self._run.result()
        return None

    async def close(self) -> None:
        """End the run."""
        if self._run is not None:
            self._run.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._run
            self._run = None


async def _play(env: Any, task: Any, player: "_Player") -> None:
    """An episode as verifiers plays it, with the policy as the one agent."""
    episodes, traces = package("verifiers.v1.episode"), package("verifiers.v1.trace")
    agents = SimpleNamespace(**{player.name: player})
    await env.setup(agents)
    await env.run(task, agents)
    if player.trace is None:
        raise ValueError(f"{type(env).__name__}.run() asked its agent for nothing")
    told = traces.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
    info = episodes.EnvInfo(id=env.config.env_id)
    await env.finalize(task, episodes.Episode(env=info, task=told, traces=[player.trace]))


class _Player:
    """The agent, as far as `run` may use it: `run(task)`, and `interaction(task)` with `turn(message)`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.trainable = True
        self.said: asyncio.Queue[str] = asyncio.Queue()
        self.heard: asyncio.Queue[str] = asyncio.Queue()
        self.trace: Any = None

    async def run(self, task: Any) -> Any:
        """One turn, and its rewards."""
        async with self.interaction(task) as interaction:
            await interaction.turn()
        return self.trace

    @contextlib.asynccontextmanager
    async def interaction(self, task: Any) -> AsyncIterator["_Interaction"]:
        """A conversation; at its end the task's own rewards are asked for."""
        self.trace = _new_trace(task, self.name)
        await task.setup(self.trace, None)
        yield _Interaction(self)
        self.trace.stop("user_closed")
        self.trace.ok = True
        await task.finalize(self.trace, None)
        await task.score(self.trace, None)


class _Interaction:
    """A conversation that is going on."""

    def __init__(self, player: _Player) -> None:
        self._player = player
        self.trace = player.trace

    async def turn(self, message: str | None = None) -> Any:
        """Tell the policy something, and what it says then."""
        types = package("verifiers.v1.types")
        if message is not None:
            _append(self.trace, types.UserMessage(content=message), sampled=False)
        self._player.heard.put_nowait(message or "")
        said = types.AssistantMessage(content=await self._player.said.get())
        _append(self.trace, said, sampled=True)
        return package("verifiers.v1.agent").Segment(messages=[said], root_reply=said.content)


def _new_trace(task: Any, seat: str) -> Any:
    """A trace with the task's prompt in it."""
    traces = package("verifiers.v1.trace")
    told = traces.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
    agent = traces.AgentInfo(config=package("verifiers.v1.configs.agent").AgentConfig(), name=seat)
    trace = traces.Trace(task=told, agent=agent, state=package("verifiers.v1.state").state_cls(type(task))())
    for message in _prompt(task.data):
        _append(trace, message, sampled=False)
    return trace


def _prompt(data: Any) -> list[Any]:
    types = package("verifiers.v1.types")
    system = [types.SystemMessage(content=data.system_prompt)] if data.system_prompt else []
    if data.prompt is None:
        return system
    return [*system, *([types.UserMessage(content=data.prompt)] if isinstance(data.prompt, str) else data.prompt)]


def _append(trace: Any, message: Any, *, sampled: bool) -> None:
    parent = len(trace.nodes) - 1 if trace.nodes else None
    trace.nodes.append(package("verifiers.v1.graph").MessageNode(parent=parent, message=message, sampled=sampled))


class Tasks:
    """A taskset, read as far as tasks were asked for."""

    def __init__(self, name: str, env: Any, seat: str) -> None:
        self.name = name
        self.env = env
        self.seat = seat
        self._read: list[Any] = []
        self._rest: Iterator[Any] = iter(env.taskset)

    def task(self, idx: int) -> Any:
        """The task of a number. ValueError where there is none."""
        while len(self._read) <= idx:
            found = next(self._rest, None)
            if found is None:
                raise ValueError(f"taskset {self.name} has {len(self._read)} tasks, none with idx {idx}")
            self._read.append(found)
        return self._read[idx]


def load_tasks(rest: str) -> Tasks:
    """The taskset of a name with options.

    Raises:
        WorldError: verifiers cannot load it, or it needs more than a policy.
        ImportError: verifiers is missing, or older than 0.4.
    """
    package(PREFIX)  # says at once where it is missing
    check_version(PREFIX, (0, 4))
    loaders = package("verifiers.v1.utils.loaders")
    name, options = read_options(rest, PREFIX)
    env_id = options.pop("env", "")
    try:
        config = loaders.resolve_env_config({"id": env_id, "taskset": {"id": name, **options}})
        env = loaders.load_environment(config)
    except Exception as error:
        raise WorldError(f'environment "{PREFIX}:{rest}" cannot be loaded: {described(error)}') from error
    seats = list(package("verifiers.v1.configs.agent").agent_config_fields(env.config))
    task = type(env.taskset).task_type()
    servers = [*env.taskset.toolsets(env.taskset.config), *task.toolsets(env.taskset.config.task)]
    wants = {
        f"{len(seats)} agents ({', '.join(seats)}), of which a policy can be one": len(seats) != 1,
        "tool servers; give its tools as functions in environment.tools, with a reward of your own": bool(servers),
        "a container": task.NEEDS_CONTAINER,
    }
    for want, is_so in wants.items():
        if is_so:
            raise WorldError(f'environment "{PREFIX}:{rest}" has {want}: this cannot be played here')
    tasks = Tasks(name, env, seats[0])
    if blind := _blind(tasks.task(0)):
        raise WorldError(
            f'environment "{PREFIX}:{rest}" has rewards that need a container ({", ".join(blind)}): this cannot be '
            "played here"
        )
    return tasks


def _blind(task: Any) -> list[str]:
    """Names of a task's rewards that ask for the container it was done in; verifiers leaves them out silently."""
    asked = [(each.__name__, inspect.signature(each).parameters.get("runtime")) for each in task.hooks("reward")]
    return [name for name, parameter in asked if parameter is not None and parameter.default is parameter.empty]


def factory(rest: str) -> Callable[[], Verifiers]:
    """What makes the environment of a taskset; WorldError and ImportError as `load_tasks`."""
    tasks = load_tasks(rest)
    return type(tasks.name, (Verifiers,), {"__init__": lambda self: Verifiers.__init__(self, tasks)})


def task_rows(rest: str, first: int) -> list[dict[str, Any]]:
    """Rows of a dataset for the first tasks of a taskset, each with `prompt` and `idx`.

    WorldError and ImportError as `load_tasks`; ValueError where a task has no prompt.
    """
    tasks = load_tasks(rest)
    rows = []
    for idx in range(first):
        try:
            data = tasks.task(idx).data
        except ValueError:
            break
        if data.prompt is None:
            raise ValueError(f"task {idx} of {tasks.name} has no prompt: its conversation is begun by somebody else")
        rows.append({"prompt": [each.model_dump(exclude_none=True) for each in _prompt(data)], "idx": idx})
    return rows


def write_rows(rest: str, first: int, file: str) -> None:
    """Write `task_rows` into a JSONL file."""
    Path(file).write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in task_rows(rest, first)))
