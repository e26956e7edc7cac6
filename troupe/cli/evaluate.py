"""`troupe eval`: what policies come to on a dataset that they complete, and whether they differ."""

import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import anyio
import click
import msgspec

from troupe.cli.commands import Command, Number, report_errors
from troupe.cli.config import find_policy, flag_layers
from troupe.cli.demo import DEMO_CONFIG
from troupe.cli.evaluation_lines import (
    Evaluated,
    figures_shown,
    lines_of_many,
    lines_of_one,
    rows_that_differ,
    told_in_json,
)
from troupe.cli.tables import screen_width
from troupe.errors import InputError
from troupe.policy import GenerationConfig
from troupe.records.compare.settings import short_names
from troupe.records.sinks.display_lines import clock_time
from troupe.run.aliases import describe_meaning, ours_for
from troupe.run.config import RunConfig, known_keys, layered, load_config, settings_layers
from troupe.run.evaluate import Questions, answer, ask, check_model
from troupe.run.evaluation_file import EvaluationFile, identity_of
from troupe.run.status import Progress
from troupe.runtime.files import expanded
from troupe.runtime.guarding import Guard
from troupe.runtime.roles import together
from troupe.runtime.terminal import tell, tell_json

T = TypeVar("T")
_SILENT_S = 10.0
"""From one line that says how far an evaluation is to the next."""
_SECTIONS = ("data.", "environment.", "generation.", "rewards.")
_KEYS = {
    "models": "model.path",
    "adapter": "adapter.resume_from",
    "dataset": "data.path",
    "prompt_column": "data.prompt_column",
    "chat": "data.chat",
    "rewards": "rewards.functions",
    "environment": "environment.factory",
    "tools": "environment.tools",
    "num_samples": "generation.num_generations",
    "max_new_tokens": "generation.max_completion_length",
    "temperature": "generation.temperature",
    "seed": "seed",
    "dtype": "model.dtype",
}
_OWN_FLAGS = {
    "generation.num_generations": "-n",
    "generation.temperature": "--temperature",
    "generation.max_completion_length": "--max-new-tokens",
    "rewards.functions": "--reward",
}
"""Keys that are not set by `--set`."""


class Model(NamedTuple):
    """One that is evaluated."""

    name: str
    path: str
    adapter: Path | None


class Numbers(click.ParamType):  # type: ignore[type-arg]
    """Whole numbers ≥ 1 with commas between."""

    name = "K,K,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            numbers = sorted({int(part) for part in value.split(",")})
        except ValueError:
            numbers = [0]
        if numbers[0] < 1:
            self.fail(f"{value!r} is no list of whole numbers ≥ 1, such as 1,4,8.", param, ctx)
        return numbers


@click.command(
    name="eval",
    cls=Command,
    keys=_KEYS,
    short_help="Score policies on a dataset.",
    epilog="\b\n"
    "Examples:\n"
    "  troupe eval -m runs/kind -d held-out.json --reward rewards.py:kind\n"
    "  troupe eval -m models/Qwen3-0.6B -m runs/kind -d held-out.json -n 8 --pass-at 1,8 --jsonl all.jsonl",
)
@click.option(
    "-m",
    "--model",
    "models",
    multiple=True,
    metavar="MODEL_DIR",
    help="Hugging Face folder, a run folder, or RUN@STEP or RUN@best; may be repeated: all are compared with the "
    "first; default: the adapter's base, or the demo's policy.",
)
@click.option("--adapter", metavar="ADAPTER_DIR", help="Adapter beside the model: a run's, PEFT's or mlx-lm's.")
@click.option(
    "-d", "--dataset", metavar="PROMPTS", help="Rows to complete, as of train; default: the demo's held-out ones."
)
@click.option("--limit", type=click.IntRange(min=1), help="Only so many rows, the first ones.")
@click.option("--prompt-column", metavar="NAME", help="Column that holds the prompts.  [default: prompt]")
@click.option("--chat", is_flag=True, help="Take a prompt that is a text as a user's message.")
@click.option("--reward", "rewards", multiple=True, metavar="NAME|FILE.py:FUNC", help="Reward; may be repeated.")
@click.option("--environment", metavar="FILE.py:CLASS", help="What the policy acts in, over several turns.")
@click.option("--tool", "tools", multiple=True, metavar="FILE.py:FUNC", help="Tool it may call; may be repeated.")
@click.option(
    "-n", "--num-samples", type=click.IntRange(min=1), default=1, show_default=True, help="Completions a row."
)
@click.option("--pass-at", type=Numbers(), help="Which k of pass@k are told.  [default: 1, 2, 4, … up to -n]")
@click.option("--passes-from", type=float, default=1.0, show_default=True, help="Score from which a completion passes.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--temperature", type=Number(min=0), help="0 is greedy.  [default: 0, or 1 where -n is more than 1]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default=None)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="section.key=value",
    help="A key of [data], [environment], [generation] or [rewards]; may be repeated.",
)
@click.option(
    "--jsonl", metavar="FILE", help="Write every completion there; the same command goes on where it stopped."
)
@click.option(
    "--rows", "with_rows", is_flag=True, help="List the rows that a model does better or worse than the first."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@report_errors
def evaluate(
    models: tuple[str, ...],
    adapter: str | None,
    dataset: str | None,
    settings: tuple[str, ...],
    num_samples: int,
    pass_at: list[int] | None,
    temperature: float | None,
    dtype: str | None,
    jsonl: str | None,
    with_rows: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Complete every row of a dataset, once or several times, and tell what that is worth: the mean of each reward, the
    mean score (avg@n) and how often one of k completions passes (pass@k), each with its standard error; of several
    models also whether they differ by more than noise.
    """
    if pass_at and pass_at[-1] > num_samples:
        raise InputError(f"--pass-at {pass_at[-1]} needs at least {pass_at[-1]} samples a row; give -n {pass_at[-1]}")
    if not math.isfinite(flags["passes_from"]):
        raise InputError(f"--passes-from {flags['passes_from']} is no finite number; give the score of a right answer")
    config = _config(flags, settings)
    if temperature is None:
        temperature = 0.0 if num_samples == 1 else 1.0
    generation = msgspec.structs.replace(
        config.generation, temperature=temperature, max_completion_length=flags["max_new_tokens"]
    )
    chosen = _models(models, adapter)
    asking = partial(
        ask,
        dataset or str(load_config(DEMO_CONFIG).data.eval_path),
        flags["rewards"],
        data=config.data,
        generation=generation,
        scoring=config.rewards,
        num_samples=num_samples,
        passes_from=flags["passes_from"],
        pass_at=pass_at,
        limit=flags["limit"],
        seed=flags["seed"],
        environment=config.environment,
    )
    found = anyio.run(aloud, partial(_evaluate, asking, chosen, dtype, None if jsonl is None else expanded(jsonl)))
    _tell_incidents(found)
    if as_json:
        tell_json(msgspec.json.encode(told_in_json(found, with_rows=with_rows)).decode())
        return
    _tell(found, generation, num_samples, pass_at, with_rows)


def _config(flags: dict[str, Any], settings: tuple[str, ...]) -> RunConfig:
    """What flags and `--set` say. InputError where they mean nothing here."""
    if others := [setting for setting in settings if not setting.startswith(_SECTIONS)]:
        settings_layers(others)  # a setting of another form says so
        meaning = ours_for(others[0].partition("=")[0], known_keys())
        hint = f"; {describe_meaning(meaning)}" if meaning is not None and meaning.ours else ""
        raise InputError(
            f"--set {others[0]}: of a config only [data], [environment], [generation] and [rewards] mean something "
            f"here; write data.key=value{hint}"
        )
    for setting in settings:
        if (flag := _OWN_FLAGS.get(setting.partition("=")[0].strip())) is not None:
            raise InputError(f"--set {setting}: this has a flag of its own here: {flag}")
    named = {name: flags[name] for name in ("prompt_column", "chat", "environment", "tools")}
    return layered(None, [*flag_layers(named), *settings_layers(settings)])


def _models(models: Sequence[str], adapter: str | None) -> list[Model]:
    """The models by the names that tell them apart."""
    if adapter is not None and len(models) > 1:
        raise InputError("--adapter belongs to one model; name each adapter folder by -m, which knows its base")
    if len(set(models)) < len(models):
        raise InputError("-m names the same model twice; name each once")
    found = [find_policy(model, adapter) for model in models or (None,)]
    names = short_names([Path(model) for model in models]) if len(models) > 1 else [str(found[0][0])]
    return [Model(name, *policy) for name, policy in zip(names, found, strict=True)]


async def _evaluate(
    asking: Callable[[], Awaitable[Questions]],
    models: Sequence[Model],
    dtype: str | None,
    path: Path | None,
    progress: Progress,
) -> list[Evaluated]:
    """One model after the other, so that only one is in memory."""
    questions = await asking()
    for model in models if len(models) > 1 else ():
        check_model(model.path, questions, model.adapter)
    identity = identity_of([(model.path, model.adapter) for model in models], questions, dtype)
    file = None if path is None else EvaluationFile(path, [model.name for model in models], questions, identity)
    found = []
    with file or nullcontext():
        for model in models:
            done = () if file is None else file.done.get(model.name, ())
            if done:
                tell(f"note: {path} has {len(done)} of {len(questions.rows)} rows of {model.name} already", error=True)
            started_s = time.perf_counter()
            with progress.at("evaluating" if len(models) == 1 else f"evaluating {model.name}"):
                result = await answer(
                    model.path,
                    questions,
                    adapter=model.adapter,
                    dtype=dtype,
                    progress=progress,
                    done=done,
                    each=None if file is None else partial(file.add, model.name),
                )
            found.append(Evaluated(model.name, result, time.perf_counter() - started_s))
    return found


def _tell_incidents(found: Sequence[Evaluated]) -> None:
    for one in found:
        if incidents := one.found.incidents:
            of = "" if len(found) == 1 else f" of {one.name}"
            first = incidents[0].message
            tell(f"note: scores{of} are missing, {len(incidents)} incidents; the first: {first}", error=True)


def _tell(
    found: Sequence[Evaluated],
    generation: GenerationConfig,
    num_samples: int,
    pass_at: Sequence[int] | None,
    with_rows: bool,
) -> None:
    first = found[0]
    how = "" if num_samples == 1 else f", {num_samples} samples a row at temperature {generation.temperature:g}"
    tell(f"{first.found.rows} rows in {sum(one.seconds for one in found):.1f} s{how}")
    shown = list(dict.fromkeys(figure for one in found for figure in figures_shown(one.found, asked=bool(pass_at))))
    for line in lines_of_one(first, shown) if len(found) == 1 else lines_of_many(found, shown, screen_width()):
        tell(line)
    for other in found[1:] if with_rows else ():
        tell(f"\n{other.name} against {first.name}:")
        for line in rows_that_differ(first, other):
            tell(line)


async def aloud(evaluating: Callable[..., Awaitable[T]], silent_s: float = _SILENT_S) -> T:
    """Evaluate, and say on stderr every `silent_s` how far it is, and how much time is left."""
    progress, over, results, pace = Progress(), anyio.CancelScope(), list[T](), _Pace()

    async def work() -> None:
        results.append(await evaluating(progress=progress))
        over.cancel()

    async def speak() -> None:
        with over:
            while True:
                await anyio.sleep(silent_s)
                if (line := pace.line(progress, time.perf_counter())) is not None:
                    tell(line, error=True)

    with Guard():  # so that Ctrl-C comes to an end even where a reward holds Python's lock
        await together([work, speak])
    return results[0]


class _Pace:
    """How quickly it goes, seen from one line to another."""

    def __init__(self) -> None:
        self._what, self._done, self._since_s = "", 0, 0.0

    def line(self, progress: Progress, now_s: float) -> str | None:
        """How far it is; None where nothing is done."""
        activity = progress.activity(now_s)
        if activity is None:
            return None
        if progress.what != self._what:
            self._what, self._done, self._since_s = progress.what, progress.done, now_s
        made, left = progress.done - self._done, progress.total - progress.done
        if made <= 0 or left <= 0:
            return activity.text
        return f"{activity.text}, about {clock_time((now_s - self._since_s) * left / made)} left"
