"""`troupe train`: from its flags to a run, or to the plan of one, and what became of it.

What a run in a terminal has beside the run itself: signals, a guardian, the control socket.
"""

import asyncio
import functools
import os
import shlex
import signal
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import click
import tomli_w

from troupe.cli import run_flags
from troupe.cli.commands import Command, report_errors
from troupe.cli.config import TRAIN_KEYS, tell_policy_of_run, train_config, with_flag
from troupe.daemon.control.answers import answer_checked
from troupe.daemon.control.place import refuse_where_served
from troupe.daemon.control.server import ControlServer
from troupe.errors import InputError
from troupe.policy import parameter_count
from troupe.policy.adapter.modules import describe_adapter
from troupe.records.diagnosis import in_a_line
from troupe.run.config import RunConfig, config_table
from troupe.run.folder_names import run_folder_named
from troupe.run.memory import describe as describe_memory
from troupe.run.prepare import Prepared, prepare
from troupe.run.result import RunResult
from troupe.run.supervisor import Supervisor
from troupe.runtime.guarding import Guard
from troupe.runtime.outlets import finish, unhurried
from troupe.runtime.terminal import EXIT_INTERRUPTED, tell

_LOADS_SILENTLY_S = 2.0
"""Before it is said that the model and the prompts are being loaded."""
_LAST_WORDS_S = 0.5
"""That a reader has, where the process ends at once."""


@click.command(cls=Command, keys=TRAIN_KEYS)
@click.argument("run_toml", type=click.Path(path_type=Path), required=False)
@run_flags.model
@run_flags.lora
@run_flags.adapter
@click.option(
    "-d", "--dataset", metavar="PROMPTS", help="File (.json, .jsonl, .csv, .parquet), hf:… or reasoning_gym:…."
)
@run_flags.prompt_column
@run_flags.chat
@run_flags.eval_data
@run_flags.output
@click.option("--lr", type=float, help="Peak learning rate.  [default: 1e-6]")
@click.option("--epochs", type=int, help="Passes over the prompts.  [default: 3]")
@click.option("--batch-size", type=int, help="Prompts a step.  [default: 4]")
@click.option("--num-generations", type=int, help="Completions a prompt.  [default: 8]")
@click.option("--max-completion-length", type=int, help="Most tokens of a completion.  [default: 256]")
@click.option("--reward", "rewards", multiple=True, metavar="NAME|FILE.py:FUNC", help="Reward; may be repeated.")
@click.option("--environment", metavar="FILE.py:CLASS", help="What the policy acts in, over several turns.")
@click.option("--tool", "tools", multiple=True, metavar="FILE.py:FUNC", help="Tool it may call; may be repeated.")
@click.option("--max-steps", type=int, help="Stop after so many learner batches.")
@run_flags.seed
@run_flags.memory_limit
@click.option("--serve", metavar="HOST:PORT", help="Let workers join, at this address of this machine.")
@run_flags.device
@run_flags.resume
@run_flags.allow_change
@run_flags.settings
@run_flags.dry_run
@unhurried()
@report_errors
def train(run_toml: Path | None, *, resume: bool, dry_run: bool, allow_changes: tuple[str, ...], **flags: Any) -> None:
    """Train a policy with GRPO.

    Without arguments it trains the small policy that ships with Troupe on the arithmetic that ships with it, and
    tells how much it learned.
    """
    tell_policy_of_run(flags["model"])
    config = train_config(run_toml, resume=resume, **flags)
    carry_out(config, flags, resume=resume, dry_run=dry_run, allow_changes=allow_changes)


def carry_out(
    config: RunConfig, flags: dict[str, Any], *, resume: bool, dry_run: bool, allow_changes: tuple[str, ...]
) -> None:
    """Make a run, or show what it would be, and tell what became of it. InputError names the flag that it is about."""
    try:
        if dry_run:
            _tell_plan(prepare(config, resume=resume, allow_changes=allow_changes, to_show=True))
            return
        run = functools.partial(run_in_terminal, resume=resume, allow_changes=allow_changes)
        result, interrupted = anyio.run(run, config)
    except InputError as error:
        raise with_flag(error, flags) from None
    if interrupted:  # one more signal, while Python ends, would find threads of MLX at work
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    tell_result(result)
    if interrupted and not result.complete:
        command = "train" if config.task == "grpo" else config.task
        tell(f"interrupted; go on with: troupe {command} -o {shlex.quote(result.folder)} --resume")
        sys.exit(EXIT_INTERRUPTED)


def _tell_plan(prepared: Prepared) -> None:
    """What matters first; all but the notes is TOML, so that it can be kept as a file."""
    for line in describe_plan(prepared):
        tell(f"# {line}".rstrip())
    for notice in prepared.notices:
        tell(f"note: {notice}")
    tell(f"\n{tomli_w.dumps(config_table(prepared.config)).rstrip()}")


def tell_result(result: RunResult) -> None:
    """Print what became of a run."""
    groups = ", ".join(f"{count} {state}" for state, count in sorted(result.closed_groups.items())) or "none"
    tell(f"{result.steps} of {result.total_steps} steps in {result.wall_s:.1f} s; groups: {groups}")
    if result.stopped_early:
        tell(result.stopped_early)
    if result.incidents:
        tell("incidents: " + ", ".join(f"{count} {kind}" for kind, count in sorted(result.incidents.items())))
    if told := in_a_line(result.findings):
        tell(f"diagnosis: {told}")
    for name, reason in result.switched_off_sinks.items():
        tell(f"the sink {name} was switched off: {reason}")
    if result.accuracy_before is not None and result.accuracy_after is not None:
        tell(f"held-out greedy accuracy: {result.accuracy_before:.1%} before, {result.accuracy_after:.1%} after")
    for name in {**result.rewards_before, **result.rewards_after}:
        before, after = (
            f"{means[name]:.3f}" if name in means else "no score"
            for means in (result.rewards_before, result.rewards_after)
        )
        tell(f"held-out {name}: {before} before, {after} after")
    if result.unevaluated:
        tell(f"not evaluated yet, which --resume makes up for: step {', '.join(map(str, result.unevaluated))}")
    final = Path(result.folder) / "final"
    if final.is_dir():  # a run that was stopped has only checkpoints
        tell(f"policy: {final}")


def describe_plan(prepared: Prepared) -> list[str]:
    """What a run would do, in lines, what matters most first: model, prompts, batch, rewards, memory."""
    config, policy = prepared.config, prepared.start.policy
    learner, limit = config.learner, prepared.memory.limit_gb
    steps = f"{prepared.inputs.total_steps} steps into {prepared.folder}; nothing was written"
    if prepared.start.first_step:
        done = f"{prepared.start.first_step} of them done"
        steps = f"{prepared.inputs.total_steps} steps, {done}, {steps.partition(' steps ')[2]}"
    return [
        steps,
        f"model: {prepared.inputs.source}, {_count(parameter_count(policy.config))} weights in {policy.dtype}",
        *([] if policy.base.adapter is None else [f"adapter: {describe_adapter(policy.config, policy.base.adapter)}"]),
        *prepared.inputs.description.splitlines(),
        *([] if config.task == "grpo" else [f"a step: {learner.batch_size} rows, learned by their likelihood"]),
        *([] if config.warm_start.path is None else [_describe_warm_start(prepared)]),
        *(_describe_sampling(prepared) if config.task == "grpo" else []),
        *_describe_teachers(prepared),
        *([] if config.task == "grpo" else [f"learning rate {learner.lr:g} ({learner.lr_scheduler})"]),
        f"schedule: {config.schedule.mode}, max_staleness {config.schedule.max_staleness}; a checkpoint every "
        f"{config.checkpoint.every} steps",
        *([] if prepared.ranks == 1 else [_describe_ranks(prepared)]),
        *describe_memory(prepared.memory.phases).splitlines(),
        "memory limit: none" if limit is None else f"memory limit: {config.memory_limit_gb or limit:g} GB",
    ]


def _describe_sampling(prepared: Prepared) -> list[str]:
    """What a step samples, and how that is scored and learned."""
    config, names = prepared.config, prepared.inputs.rewards.names
    learner, generation = config.learner, config.generation
    weights = config.rewards.weights or (1.0,) * len(names)
    scored = [f"{name} × {weight:g}" for name, weight in zip(names, weights, strict=False)]
    compares = "" if learner.advantage == "grpo" else f" with the advantage {learner.advantage}"
    return [
        f"a step: {learner.batch_size} prompts × {generation.num_generations} completions of at most "
        f"{generation.max_completion_length} tokens, at temperature {generation.temperature:g}",
        f"rewards: {', '.join(scored)}",
        f"learning: {learner.loss_type}{compares}, learning rate {learner.lr:g} ({learner.lr_scheduler}), "
        f"beta {learner.beta:g}",
    ]


def _describe_warm_start(prepared: Prepared) -> str:
    """What comes before the first step that is sampled."""
    warm, rows = prepared.config.warm_start, prepared.config.learner.batch_size
    steps = prepared.inputs.warm_steps
    return f"warm start: {steps} steps of {rows} rows, learning rate {warm.lr:g} ({warm.lr_scheduler})"


def _describe_teachers(prepared: Prepared) -> list[str]:
    """Who is asked about each token, and what the answer counts."""
    teacher, loaded = prepared.config.teacher, prepared.inputs.teachers
    counts = f"its word counts {teacher.coef:g}, the rewards {teacher.reward_coef:g}"
    if (shown := prepared.inputs.demonstrated) is not None:
        follows = f" by {teacher.update_rate:g} every {teacher.sync_steps}" if teacher.model_kind == "ema" else ""
        return [
            f'teacher: the policy itself ("{teacher.model_kind}"{follows}) behind {max(map(len, shown))} tokens at the '
            f"most, with {teacher.privileged_context_column!r}; {counts}"
        ]
    if loaded is None:
        return []
    paths = {"": teacher.path} | {model.name: model.path for model in teacher.models}
    return [
        f"teacher{name and f' {name}'}: {paths[name]}, {_count(parameter_count(each.policy.config))} weights in "
        f"{each.policy.dtype}; {counts}"
        for name, each in loaded.by_name.items()
    ]


def _describe_ranks(prepared: Prepared) -> str:
    """How many learn together, and on which cards."""
    lanes, cards = prepared.config.learner.lanes, prepared.cards
    told = f"learner: {prepared.ranks} ranks of a batch in {lanes} lanes"
    if cards is None:
        return told
    return f"{told}, on the cards {', '.join(cards.ranks)}; generators on {', '.join(cards.generators)}"


def _count(number: int) -> str:
    if number >= 1e8:
        return f"{number / 1e9:.2f} billion"
    return f"{number / 1e6:.2f} million" if number >= 1e5 else str(number)


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
