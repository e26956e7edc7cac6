"""The command line. Each command turns its flags into a config and calls what Python users call too.

Exit codes: 0 done, 2 bad input, 3 fault, 130 interrupted and resumable.
"""

from __future__ import annotations

import functools
import secrets
import shlex
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import click
import msgspec
import tomli_w

from troupe.cli.control import control
from troupe.cli.demo import DEMO_CONFIG
from troupe.cli.flags import Commands
from troupe.cli.foreground import guarded, play_in_terminal
from troupe.cli.given import TRAIN_KEYS, flag_layers, train_config, with_flag
from troupe.cli.looking import doctor, inspect
from troupe.cli.plan import describe_plan
from troupe.cli.report import report
from troupe.cli.terminal import Number, report_errors
from troupe.errors import InputError
from troupe.policy import GenerationConfig, TextPrompt, complete_texts, load_policy, stream_text
from troupe.run.activity import Progress
from troupe.run.config import config_table, known_keys, layered, load_config, settings_layers
from troupe.run.evaluate import Evaluation, evaluate_folder
from troupe.run.folder_names import policy_folder
from troupe.run.naming import ours_for, told
from troupe.run.prepare import Prepared, prepare
from troupe.run.result import RunResult
from troupe.runtime.files import expanded
from troupe.runtime.machine import VERSION
from troupe.runtime.outlets import unhurried
from troupe.runtime.roles import together
from troupe.runtime.terminal import EXIT_INTERRUPTED, tell, tell_json

_EXISTING_TEXT = click.Path(path_type=Path)
_EVALUATES_SILENTLY_S = 10.0
"""From one line that says how far an evaluation is to the next."""

_GENERATE_KEYS = {
    "model": "model.path",
    "samples": "generation.num_generations",
    "max_new_tokens": "generation.max_completion_length",
    "chat": "data.chat",
    "system": "data.system_prompt",
    "temperature": "generation.temperature",
    "top_p": "generation.top_p",
    "top_k": "generation.top_k",
    "seed": "seed",
    "dtype": "model.dtype",
}
_EVAL_KEYS = {
    "model": "model.path",
    "dataset": "data.path",
    "prompt_column": "data.prompt_column",
    "chat": "data.chat",
    "rewards": "rewards.functions",
    "max_new_tokens": "generation.max_completion_length",
    "temperature": "generation.temperature",
    "seed": "seed",
    "dtype": "model.dtype",
}


__all__ = ["main", "train_config"]


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(VERSION, prog_name="troupe")
def main() -> None:
    """Teach Qwen3 models with GRPO on Apple's MLX."""


for _command in (*control.commands.values(), report, inspect, doctor):
    main.add_command(_command)


@main.command(keys=TRAIN_KEYS)
@click.argument("run_toml", type=_EXISTING_TEXT, required=False)
@click.option(
    "-m", "--model", metavar="MODEL_DIR", help="Policy to train: a Hugging Face folder, a hub id, or a run folder."
)
@click.option(
    "-d", "--dataset", metavar="PROMPTS", help="File (.json, .jsonl, .csv, .parquet), hf:… or reasoning_gym:…."
)
@click.option("--prompt-column", metavar="NAME", help="Column that holds the prompts.  [default: prompt]")
@click.option("--chat", is_flag=True, help="Take a prompt that is a text as a user's message.")
@click.option(
    "--eval-data",
    "--eval-dataset",
    "eval_data",
    metavar="PROMPTS",
    help="Held-out prompts, completed before and after the run.",
)
@click.option("-o", "--output", metavar="OUT_DIR", help="Run folder; default: the next free runs/NAME-NNN.")
@click.option("--lr", type=float, help="Peak learning rate.  [default: 1e-6]")
@click.option("--epochs", type=int, help="Passes over the prompts.  [default: 3]")
@click.option("--batch-size", type=int, help="Prompts a step.  [default: 4]")
@click.option("--num-generations", type=int, help="Completions a prompt.  [default: 8]")
@click.option("--max-completion-length", type=int, help="Most tokens of a completion.  [default: 256]")
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
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="section.key=value",
    help="Any key that --dry-run lists; may be repeated.",
)
@click.option("--dry-run", is_flag=True, help="Check everything, print plan and resolved config, train nothing.")
@unhurried()
@report_errors
def train(run_toml: Path | None, *, resume: bool, dry_run: bool, allow_changes: tuple[str, ...], **flags: Any) -> None:
    """Train a policy with GRPO.

    Without arguments it trains the small policy that ships with Troupe on the arithmetic that ships with it, and
    tells how much it learned.
    """
    _say_policy(flags["model"])
    config = train_config(run_toml, resume=resume, **flags)
    try:
        if dry_run:
            _show_plan(prepare(config, resume=resume, allow_changes=allow_changes, to_show=True))
            return
        play = functools.partial(play_in_terminal, resume=resume, allow_changes=allow_changes)
        result, interrupted = anyio.run(play, config)
    except InputError as error:
        raise with_flag(error, flags) from None
    _show_result(result)
    if interrupted and not result.complete:
        tell(f"interrupted; go on with: troupe train -o {shlex.quote(result.folder)} --resume")
        sys.exit(EXIT_INTERRUPTED)


def _say_policy(model: str | None) -> None:
    """Tell whoever names the folder of a run which policy that is."""
    if model is not None and (found := policy_folder(expanded(model))) != expanded(model):
        tell(f"note: {model} is the folder of a run, so its policy is taken: {found}", error=True)


def _show_plan(prepared: Prepared) -> None:
    """What matters first; all but the notes is TOML, so that it can be kept as a file."""
    for line in describe_plan(prepared):
        tell(f"# {line}".rstrip())
    for notice in prepared.notices:
        tell(f"note: {notice}")
    tell(f"\n{tomli_w.dumps(config_table(prepared.config)).rstrip()}")


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


@main.command(keys=_GENERATE_KEYS, short_help="Continue a text with a policy, or answer a chat.")
@click.option(
    "-m", "--model", metavar="MODEL_DIR", help="Hugging Face folder, or a run folder; default: the demo's policy."
)
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
    generation = GenerationConfig(num_generations=samples, max_completion_length=max_new_tokens, **sampling)
    seed = secrets.randbits(32) if seed is None else seed
    policy = load_policy(_named_model(model), dtype)
    raw = not sys.stdout.isatty()  # a file or a program wants the text as it was written
    options: dict[str, Any] = {"enable_thinking": False} if no_thinking else {}
    if options and policy.tokenizer.unknown_variables(**options):
        options = {}  # a template that does not know of thinking does not begin with it
    if samples == 1 and not as_json:
        for piece in stream_text(policy, asked, generation, seed, **options):
            tell(piece, newline=False, as_it_is=raw)
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
            tell_json(msgspec.json.encode({**figures, "seed": seed, "tokens_per_s": tokens_per_s}).decode())
        else:
            tell(f"# sample {number} of {samples}\n{completion.text}", as_it_is=raw)


@main.command(name="eval", keys=_EVAL_KEYS, short_help="Score a policy on a dataset.")
@click.option(
    "-m", "--model", metavar="MODEL_DIR", help="Hugging Face folder, or a run folder; default: the demo's policy."
)
@click.option(
    "-d", "--dataset", metavar="PROMPTS", help="Rows to complete, as of train; default: the demo's held-out ones."
)
@click.option("--prompt-column", metavar="NAME", help="Column that holds the prompts.  [default: prompt]")
@click.option("--chat", is_flag=True, help="Take a prompt that is a text as a user's message.")
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
    prompt_column: str | None,
    chat: bool,
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
        settings_layers(others)  # a setting of another form says so
        meaning = ours_for(others[0].partition("=")[0], known_keys())
        hint = f"; {told(meaning)}" if meaning is not None and meaning.ours else ""
        raise InputError(f"--set {others[0]}: of a config only [data] means something here; write data.key=value{hint}")
    flags = flag_layers({"prompt_column": prompt_column, "chat": chat})
    data = layered(None, [*flags, *settings_layers(settings)]).data
    started_s = time.perf_counter()
    result = anyio.run(
        _evaluated,
        functools.partial(
            evaluate_folder,
            _named_model(model),
            dataset or str(demo.data.eval_path),
            rewards,
            data=data,
            max_completion_length=max_new_tokens,
            temperature=temperature,
            seed=seed,
            dtype=dtype,
        ),
    )
    seconds = time.perf_counter() - started_s
    if result.incidents:
        first = result.incidents[0].message
        tell(f"note: scores are missing, {len(result.incidents)} incidents; the first: {first}", error=True)
    if as_json:
        figures = {"rows": result.rows, "accuracy": result.accuracy, "rewards": result.rewards, "wall_s": seconds}
        tell_json(msgspec.json.encode(figures).decode())
        return
    tell(f"{result.rows} rows in {seconds:.1f} s")
    if result.accuracy is not None:
        tell(f"accuracy {result.accuracy:.1%}")
    for name, mean in result.rewards.items():
        tell(f"{name} {mean:.4f}")


async def _evaluated(evaluating: Callable[..., Awaitable[Evaluation]]) -> Evaluation:
    """Evaluate, and say on stderr now and then how far it is."""
    stage, over, results = Progress(), anyio.CancelScope(), list[Evaluation]()

    async def work() -> None:
        with stage.at("evaluating"):
            results.append(await evaluating(progress=stage))
        over.cancel()

    async def speak() -> None:
        with over:
            while True:
                await anyio.sleep(_EVALUATES_SILENTLY_S)
                if (activity := stage.activity(time.perf_counter())) is not None:
                    tell(activity.text, error=True)

    await guarded(functools.partial(together, [work, speak]))
    return results[0]


def _named_model(model: str | None) -> str:
    """What `-m` names: a model, that of a run, or without it the demo's."""
    if model is None:
        return str(load_config(DEMO_CONFIG).model.path)
    _say_policy(model)
    return str(policy_folder(expanded(model)))
