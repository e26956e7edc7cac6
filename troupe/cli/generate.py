"""`troupe generate`: a policy continues a text, or answers a chat."""

import secrets
import sys
import time
from collections.abc import Iterable
from typing import Any

import click
import msgspec

from troupe.cli.commands import Command, Number, report_errors
from troupe.cli.config import find_policy
from troupe.errors import InputError
from troupe.policy import GenerationConfig, TextPrompt, complete_texts, load_policy, stream_text
from troupe.runtime.terminal import tell, tell_json

_KEYS = {
    "model": "model.path",
    "adapter": "adapter.resume_from",
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


@click.command(cls=Command, keys=_KEYS, short_help="Continue a text with a policy, or answer a chat.")
@click.option(
    "-m",
    "--model",
    metavar="MODEL_DIR",
    help="Hugging Face folder, or a run folder; default: the adapter's base, or the demo's policy.",
)
@click.option("--adapter", metavar="ADAPTER_DIR", help="Adapter beside the model: a run's, PEFT's or mlx-lm's.")
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
    adapter: str | None,
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
    path, beside = find_policy(model, adapter)
    policy = load_policy(path, dtype, adapter=beside)
    raw = not sys.stdout.isatty()  # a file or a program wants the text as it was written
    options: dict[str, Any] = {"enable_thinking": False} if no_thinking else {}
    if options and policy.tokenizer.unknown_variables(**options):
        options = {}  # a template that does not know of thinking does not begin with it
    if samples == 1 and not as_json:
        tell_as_it_comes(stream_text(policy, asked, generation, seed, **options), raw=raw)
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


def tell_as_it_comes(parts: Iterable[str], *, raw: bool) -> None:
    """Print each part of a text before the next is asked for."""
    for part in parts:
        tell(part, newline=False, as_it_is=raw)
    tell("")
