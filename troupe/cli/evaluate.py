"""`troupe eval`: the mean score of each reward over a dataset that a policy completes."""

import functools
import time
from collections.abc import Awaitable, Callable

import anyio
import click
import msgspec

from troupe.cli.commands import Command, Number, report_errors
from troupe.cli.config import find_policy, flag_layers
from troupe.cli.demo import DEMO_CONFIG
from troupe.errors import InputError
from troupe.run.aliases import describe_meaning, ours_for
from troupe.run.config import known_keys, layered, load_config, settings_layers
from troupe.run.evaluate import Evaluation, evaluate_folder
from troupe.run.status import Progress
from troupe.runtime.guarding import Guard
from troupe.runtime.roles import together
from troupe.runtime.terminal import tell, tell_json

_SILENT_S = 10.0
"""From one line that says how far an evaluation is to the next."""
_KEYS = {
    "model": "model.path",
    "adapter": "adapter.resume_from",
    "dataset": "data.path",
    "prompt_column": "data.prompt_column",
    "chat": "data.chat",
    "rewards": "rewards.functions",
    "environment": "environment.factory",
    "tools": "environment.tools",
    "max_new_tokens": "generation.max_completion_length",
    "temperature": "generation.temperature",
    "seed": "seed",
    "dtype": "model.dtype",
}


@click.command(name="eval", cls=Command, keys=_KEYS, short_help="Score a policy on a dataset.")
@click.option(
    "-m",
    "--model",
    metavar="MODEL_DIR",
    help="Hugging Face folder, or a run folder; default: the adapter's base, or the demo's policy.",
)
@click.option("--adapter", metavar="ADAPTER_DIR", help="Adapter beside the model: a run's, PEFT's or mlx-lm's.")
@click.option(
    "-d", "--dataset", metavar="PROMPTS", help="Rows to complete, as of train; default: the demo's held-out ones."
)
@click.option("--prompt-column", metavar="NAME", help="Column that holds the prompts.  [default: prompt]")
@click.option("--chat", is_flag=True, help="Take a prompt that is a text as a user's message.")
@click.option("--reward", "rewards", multiple=True, metavar="NAME|FILE.py:FUNC", help="Reward; may be repeated.")
@click.option("--environment", metavar="FILE.py:CLASS", help="What the policy acts in, over several turns.")
@click.option("--tool", "tools", multiple=True, metavar="FILE.py:FUNC", help="Tool it may call; may be repeated.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--temperature", type=Number(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default=None)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="section.key=value",
    help="A key of [data] or [environment]; may be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@report_errors
def evaluate(
    model: str | None,
    adapter: str | None,
    dataset: str | None,
    prompt_column: str | None,
    chat: bool,
    rewards: tuple[str, ...],
    environment: str | None,
    tools: tuple[str, ...],
    settings: tuple[str, ...],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Complete every row of a dataset once and print the mean score of each reward."""
    demo = load_config(DEMO_CONFIG)
    if others := [setting for setting in settings if not setting.startswith(("data.", "environment."))]:
        settings_layers(others)  # a setting of another form says so
        meaning = ours_for(others[0].partition("=")[0], known_keys())
        hint = f"; {describe_meaning(meaning)}" if meaning is not None and meaning.ours else ""
        raise InputError(
            f"--set {others[0]}: of a config only [data] and [environment] mean something here; "
            f"write data.key=value{hint}"
        )
    flags = flag_layers({"prompt_column": prompt_column, "chat": chat, "environment": environment, "tools": tools})
    config = layered(None, [*flags, *settings_layers(settings)])
    path, beside = find_policy(model, adapter)
    started_s = time.perf_counter()
    result = anyio.run(
        evaluate_aloud,
        functools.partial(
            evaluate_folder,
            path,
            dataset or str(demo.data.eval_path),
            rewards,
            data=config.data,
            environment=config.environment,
            max_completion_length=max_new_tokens,
            temperature=temperature,
            seed=seed,
            dtype=dtype,
            adapter=beside,
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


async def evaluate_aloud(evaluating: Callable[..., Awaitable[Evaluation]], silent_s: float = _SILENT_S) -> Evaluation:
    """Evaluate, and say on stderr every `silent_s` how far it is."""
    progress, over, results = Progress(), anyio.CancelScope(), list[Evaluation]()

    async def work() -> None:
        with progress.at("evaluating"):
            results.append(await evaluating(progress=progress))
        over.cancel()

    async def speak() -> None:
        with over:
            while True:
                await anyio.sleep(silent_s)
                if (activity := progress.activity(time.perf_counter())) is not None:
                    tell(activity.text, error=True)

    with Guard():  # so that Ctrl-C comes to an end even where a reward holds Python's lock
        await together([work, speak])
    return results[0]
