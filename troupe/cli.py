"""The command line. Each command turns its flags into a config and calls what Python users call too.

Exit codes: 0 done, 2 bad input, 3 fault, 130 interrupted and resumable.
"""

from __future__ import annotations

import functools
import os
import secrets
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any, get_args

import anyio
import click
import msgspec
import tomli_w

from troupe import __version__, budget, doctor, inspecting
from troupe.config import DEMO_CONFIG, RUN_TOML, RunConfig, config_table, load_config, said_in
from troupe.daemon.answers import answer_client
from troupe.daemon.commands import control
from troupe.daemon.place import refuse_where_served
from troupe.daemon.server import ControlServer
from troupe.errors import InputError
from troupe.folder_names import run_folder_named
from troupe.messages import ClosedState
from troupe.policy import GenerationConfig, TextPrompt, complete_texts, load_policy, stream_text
from troupe.prepare import Prepared, prepare
from troupe.report.command import report
from troupe.rollouts import Evaluation, evaluate_folder
from troupe.stored_run import Choice, open_store
from troupe.summary import RunResult
from troupe.supervisor import Supervisor
from troupe.terminal import EXIT_INTERRUPTED, Number, report_errors, tell

_EXISTING_TEXT = click.Path(path_type=Path)
_COUNT = click.IntRange(min=1, max=2**31)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="troupe")
def main() -> None:
    """Teach Qwen3 models with GRPO on Apple's MLX."""


for _command in (*control.commands.values(), report):
    main.add_command(_command)


@main.command()
@click.argument("run_toml", type=_EXISTING_TEXT, required=False)
@click.option("-m", "--model", metavar="MODEL_DIR", help="Hugging Face folder of the policy to train.")
@click.option(
    "-d", "--dataset", metavar="PROMPTS", help="File (.json, .jsonl, .csv, .parquet), hf:… or reasoning_gym:…."
)
@click.option("-o", "--output", metavar="OUT_DIR", help="Run folder; default: the next free runs/NAME-NNN.")
@click.option("--lr", type=float, help="Peak learning rate.  [default: 1e-6]")
@click.option("--epochs", type=int, help="Passes over the prompts.  [default: 3]")
@click.option("--batch-size", type=int, help="Prompts a step.  [default: 4]")
@click.option("--num-generations", type=int, help="Completions a prompt.  [default: 8]")
@click.option("--reward", "rewards", multiple=True, metavar="NAME|FILE.py:FUNC", help="Reward; may be repeated.")
@click.option("--max-steps", type=int, help="Stop after so many learner batches.")
@click.option("--seed", type=int, help="Changes the run.  [default: 0]")
@click.option("--memory-limit", type=float, metavar="GB", help="Most that the run's arrays may take.")
@click.option("--resume", is_flag=True, help="Go on with the run in OUT_DIR from its newest whole checkpoint.")
@click.option(
    "--allow-change",
    "allow_changes",
    multiple=True,
    metavar="section.key",
    help="With --resume: a key that may differ from what the run was made with; may be repeated.",
)
@click.option("--set", "settings", multiple=True, metavar="section.key=value", help="Any config key; may be repeated.")
@click.option("--dry-run", is_flag=True, help="Check everything, print the resolved config, train nothing.")
@report_errors
def train(run_toml: Path | None, *, resume: bool, dry_run: bool, allow_changes: tuple[str, ...], **flags: Any) -> None:
    """Train a policy with GRPO.

    Without arguments it trains the small policy that ships with Troupe on the arithmetic that ships with it, and
    tells how much it learned.
    """
    config = train_config(run_toml, resume=resume, **flags)
    if dry_run:
        _show_plan(prepare(config, resume=resume, allow_changes=allow_changes))
        return
    result, interrupted = anyio.run(_train, config, resume, allow_changes)
    _show_result(result)
    if interrupted and not result.complete:
        tell(f"interrupted; go on with: troupe train -o {shlex.quote(result.folder)} --resume")
        sys.exit(EXIT_INTERRUPTED)


def train_config(
    run_toml: Path | None,
    *,
    resume: bool,
    model: str | None = None,
    dataset: str | None = None,
    output: str | None = None,
    rewards: tuple[str, ...] = (),
    settings: tuple[str, ...] = (),
    seed: int | None = None,
    memory_limit: float | None = None,
    num_generations: int | None = None,
    **learner: float | None,
) -> RunConfig:
    """The config that the flags of `troupe train` mean; None means "not given".

    Of a run that is resumed all stays that neither `run_toml` nor a flag says.
    """
    said = {} if run_toml is None else said_in(run_toml)
    name = said.get("output") if output is None else output
    if resume and isinstance(name, str) and (stored := run_folder_named(name) / RUN_TOML).is_file():
        run_toml = stored
    else:
        said = {}  # which `load_config` reads by itself
    named = {setting.partition("=")[0].strip() for setting in settings} & {"model.path", "data.path"}
    if run_toml is None and model is None and dataset is None and not named:
        if resume and isinstance(name, str):  # a name that was mistyped must not begin the demo
            raise InputError(f"{name}: there is no run here to go on with; correct the name, or leave out --resume")
        run_toml = DEMO_CONFIG
    sections: dict[str, dict[str, Any]] = {
        "model": {"path": model},
        "data": {"path": dataset},
        "generation": {"num_generations": num_generations},
        "rewards": {"functions": list(rewards) or None},
        "learner": learner,
    }
    override: dict[str, Any] = {
        section: given
        for section, keys in sections.items()
        if (given := {key: value for key, value in keys.items() if value is not None})
    }
    top = {"seed": seed, "output": output, "memory_limit_gb": memory_limit}
    override |= {key: value for key, value in top.items() if value is not None}
    if run_toml is None:
        override = _with_demo_parts(override)
    return load_config(run_toml, [said, override, *settings])


def _with_demo_parts(override: dict[str, Any]) -> dict[str, Any]:
    """Where only the model or only the data is named, the other is the demo's."""
    demo = config_table(load_config(DEMO_CONFIG))
    return {
        **override,
        "model": {"path": demo["model"]["path"], **override.get("model", {})},
        "data": {"path": demo["data"]["path"], **override.get("data", {})},
    }


async def _train(config: RunConfig, resume: bool, allow_changes: tuple[str, ...]) -> tuple[RunResult, bool]:
    interrupted = False
    if config.output is not None:
        refuse_where_served(run_folder_named(config.output))

    async def obey_signals(run: Supervisor) -> None:
        """First: finish the steps begun. Second: checkpoint and end. Third: leave."""
        nonlocal interrupted
        requests = iter(
            (
                (run.drain, "finishing the steps begun; a second signal ends at once with the last completed one"),
                (run.stop, "saving the last completed step; a third signal leaves without saving"),
            )
        )
        # SIGHUP: the terminal was closed
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            async for _ in signals:
                interrupted = True
                request = next(requests, None)
                if request is None:
                    os._exit(EXIT_INTERRUPTED)
                act, meaning = request
                act()
                down = run.status().rewards_down if act == run.drain else {}
                waits = "".join(f"; what was begun waits for the reward {name}, which is down" for name in down)
                tell(f"interrupt: {meaning}{waits}", error=True)

    async with Supervisor(config, resume=resume, allow_changes=allow_changes) as run:
        for notice in run.notices:
            tell(f"note: {notice}", error=notice in run.lost)
        async with ControlServer(run.folder, functools.partial(answer_client, run)) as server:
            if server.unavailable is not None:
                tell(f"note: {server.unavailable}")
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(obey_signals, run)
                await run.wait()
                tasks.cancel_scope.cancel()
    return run.result, interrupted


def _show_plan(prepared: Prepared) -> None:
    for notice in prepared.notices:
        tell(f"note: {notice}")
    tell(tomli_w.dumps(config_table(prepared.config)))
    for line in [*prepared.prompts.splitlines(), *budget.describe(prepared.memory.phases).splitlines()]:
        tell(f"# {line}".rstrip())
    tell(f"# {prepared.total_steps} steps into {prepared.folder}; nothing was written")


def _show_result(result: RunResult) -> None:
    groups = ", ".join(f"{count} {state}" for state, count in sorted(result.closed_groups.items())) or "none"
    tell(f"{result.steps} of {result.total_steps} steps in {result.wall_s:.1f} s; groups: {groups}")
    if result.incidents:
        tell("incidents: " + ", ".join(f"{count} {kind}" for kind, count in sorted(result.incidents.items())))
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
    final = Path(result.folder) / "final"
    if final.is_dir():  # a run that was stopped has only checkpoints
        tell(f"policy: {final}")


@main.command()
@click.option("-m", "--model", metavar="MODEL_DIR", help="Hugging Face folder; default: the demo's policy.")
@click.option("-p", "--prompt", required=True, help="Text to continue; - reads it from standard input.")
@click.option("--chat", is_flag=True, help="Take the prompt as a user's message, and let the assistant answer.")
@click.option("--system", metavar="TEXT", help="The system message of the chat.")
@click.option("--no-thinking", is_flag=True, help="Ask the chat template for an answer without thinking.")
@click.option("-n", "--samples", type=click.IntRange(min=1), default=1, show_default=True, help="Completions to draw.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--temperature", type=Number(min=0), default=0.8, show_default=True)
@click.option("--top-p", type=Number(min=0, max=1, min_open=True), default=0.95, show_default=True)
@click.option("--top-k", type=click.IntRange(min=0), default=0, help="Keep this many likeliest tokens.")
@click.option("--seed", type=click.IntRange(min=0), default=None, help="Draw the same text again.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default=None)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a completion, on a line of its own.")
@report_errors
def generate(
    *,
    model: str | None,
    prompt: str,
    chat: bool,
    system: str | None,
    no_thinking: bool,
    samples: int,
    max_new_tokens: int,
    seed: int | None,
    dtype: str | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue a text with a policy, or answer a chat, and print the completion as it comes."""
    if not chat and (system is not None or no_thinking):
        raise InputError("--system and --no-thinking shape a chat, and this prompt is plain text; add --chat")
    # bytes that are no UTF-8 are refused where every prompt is
    text = sys.stdin.buffer.read().decode(errors="surrogateescape") if prompt == "-" else prompt
    asked: TextPrompt = text
    if chat:
        asked = [{"role": "system", "content": system}] if system is not None else []
        asked = [*asked, {"role": "user", "content": text}]
    options: dict[str, Any] = {"enable_thinking": False} if no_thinking else {}
    generation = GenerationConfig(num_generations=samples, max_completion_length=max_new_tokens, **sampling)
    seed = secrets.randbits(32) if seed is None else seed
    policy = load_policy(model or _demo_model(), dtype)
    if samples == 1 and not as_json:
        for piece in stream_text(policy, asked, generation, seed, **options):
            tell(piece, newline=False)
        tell("")
        return
    started_s = time.perf_counter()
    [completions] = complete_texts(policy, [asked], generation, seed, **options)
    seconds = time.perf_counter() - started_s
    tokens_per_s = sum(completion.completion_tokens for completion in completions) / seconds
    for number, completion in enumerate(completions, 1):
        if as_json:
            figures = {"prompt": text, "completion": completion.text, **msgspec.structs.asdict(completion)}
            del figures["text"]
            tell(msgspec.json.encode({**figures, "seed": seed, "tokens_per_s": tokens_per_s}).decode())
        else:
            tell(f"# sample {number} of {samples}\n{completion.text}")


@main.command(name="eval")
@click.option("-m", "--model", metavar="MODEL_DIR", help="Hugging Face folder; default: the demo's policy.")
@click.option(
    "-d", "--dataset", metavar="PROMPTS", help="Rows to complete, as of train; default: the demo's held-out ones."
)
@click.option("--reward", "rewards", multiple=True, metavar="NAME|FILE.py:FUNC", help="Reward; may be repeated.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--temperature", type=Number(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default=None)
@click.option("--set", "settings", multiple=True, metavar="data.key=value", help="How rows are read; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@report_errors
def eval_command(
    model: str | None,
    dataset: str | None,
    rewards: tuple[str, ...],
    settings: tuple[str, ...],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Complete every row of a dataset once and print the mean score of each reward."""
    demo = load_config(DEMO_CONFIG)
    if others := [setting for setting in settings if not setting.startswith("data.")]:
        raise InputError(f"--set {others[0]}: of a config only [data] means something here; write data.key=value")
    data = load_config(None, settings).data
    started_s = time.perf_counter()
    result: Evaluation = anyio.run(
        functools.partial(
            evaluate_folder,
            model or _demo_model(),
            dataset or str(demo.data.eval_path),
            rewards,
            data=data,
            max_completion_length=max_new_tokens,
            temperature=temperature,
            seed=seed,
            dtype=dtype,
        )
    )
    seconds = time.perf_counter() - started_s
    if result.incidents:
        first = result.incidents[0].message
        tell(f"note: scores are missing, {len(result.incidents)} incidents; the first: {first}", error=True)
    if as_json:
        figures = {"rows": result.rows, "accuracy": result.accuracy, "rewards": result.rewards, "wall_s": seconds}
        tell(msgspec.json.encode(figures).decode())
        return
    tell(f"{result.rows} rows in {seconds:.1f} s")
    if result.accuracy is not None:
        tell(f"accuracy {result.accuracy:.1%}")
    for name, mean in result.rewards.items():
        tell(f"{name} {mean:.4f}")


@main.command(name="inspect")
@click.argument("out", metavar="OUT_DIR", type=_EXISTING_TEXT)
@click.option(
    "--step", metavar="N|last|all", help="Completions of this step.  [default: last; all with --gid, --jsonl]"
)
@click.option("--best", type=_COUNT, metavar="K", help="The K completions with the highest reward.")
@click.option("--worst", type=_COUNT, metavar="K", help="The K completions with the lowest reward.")
@click.option("--random", type=_COUNT, metavar="K", help="K completions by lot.")
@click.option("--min-reward", "least", type=Number(), metavar="X", help="Only those with at least this reward.")
@click.option("--max-reward", "most", type=Number(), metavar="X", help="Only those with at most this reward.")
@click.option("--reward", metavar="NAME", help="Look at this score, not at the weighted sum of all.")
@click.option("--state", type=click.Choice(get_args(ClosedState)), help="Only those of groups that ended so.")
@click.option("--gid", type=click.IntRange(min=0, max=2**63 - 1), metavar="G", help="Only those of this group.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, or one a completion.")
@click.option(
    "--jsonl", type=_EXISTING_TEXT, metavar="FILE", help="Write all that fit to a file, one JSON object each."
)
@report_errors
def inspect_command(
    out: Path,
    *,
    step: str | None,
    best: int | None,
    worst: int | None,
    random: int | None,
    as_json: bool,
    jsonl: Path | None,
    **conditions: Any,
) -> None:
    """Look into a run, also while it goes on: what happened, and what the policy wrote for which reward.

    Without options: an overview, with the best and the worst completion of the newest step.
    """
    chosen: dict[Choice, int | None] = {"best": best, "worst": worst, "random": random}
    with open_store(out) as run:
        if jsonl is None and step is None and not any(v is not None for v in (*chosen.values(), *conditions.values())):
            inspecting.tell_overview(run, out, as_json=as_json)
            return
        query = inspecting.query_for(run, chosen=chosen, step=step, everywhere=jsonl is not None, **conditions)
        if jsonl is not None:
            tell(f"{inspecting.export(run, query, jsonl)} completions written to {jsonl}")
        else:
            inspecting.tell_completions(run, query, as_json=as_json)


@main.command(name="doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor_command(as_json: bool) -> None:
    """Tell what this machine gives, what is slow, and how to mend it."""
    report = doctor.examine()
    tell(msgspec.json.encode(report).decode() if as_json else doctor.describe(report))


def _demo_model() -> str:
    return str(load_config(DEMO_CONFIG).model.path)
