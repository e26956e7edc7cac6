"""Text in, text out: prompts, plain or chats, completed by a policy, all at once or word by word."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol

import msgspec

from troupe.errors import InputError
from troupe.policy.decode.engine import RolloutEngine
from troupe.policy.decode.requests import Completion, FinishReason, GenerationConfig, RolloutRequest
from troupe.policy.text.tokenizer import TextPrompt, Tokenizer


class TextCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """One completion of a text prompt."""

    text: str
    """Without prompt and special tokens."""
    prompt_tokens: int
    completion_tokens: int
    """The stop token included."""
    finish_reason: FinishReason


class RolloutBatch(msgspec.Struct, frozen=True, kw_only=True):
    """Completions of several prompts, as lists in prompt-major order: G rows of the first prompt, then the next's."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    log_probs: list[list[float]]
    """Nats, under softmax(logits / temperature)."""
    texts: list[str]
    """Completions without special tokens."""


class TextPolicy(Protocol):
    """A policy that can be asked for text."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    def engine(self, generation: GenerationConfig) -> RolloutEngine: ...

    def check_stop_ids(self) -> None: ...


def encode_prompt(tokenizer: Tokenizer, prompt: TextPrompt, **template_kwargs: Any) -> list[int]:
    """Ids of a prompt; a chat goes through the model's template, up to where the assistant begins to speak, or goes on
    where `continue_final_message` is set.

    `template_kwargs` such as `enable_thinking` go to the template. Raises InputError for a prompt that is no Unicode
    text, and what `Tokenizer.apply_chat_template` raises.
    """
    if isinstance(prompt, str):
        text, add_special_tokens = prompt, True
    else:
        asks = {"add_generation_prompt": not template_kwargs.get("continue_final_message")}
        text = tokenizer.apply_chat_template(prompt, **{**asks, **template_kwargs})
        add_special_tokens = False  # the template has written them
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"prompt: its character {error.start} is no Unicode text; give the prompt as UTF-8") from None
    return tokenizer.encode(text, add_special_tokens)


def complete_texts(
    policy: TextPolicy, prompts: Sequence[TextPrompt], generation: GenerationConfig, seed: int, **template_kwargs: Any
) -> list[list[TextCompletion]]:
    """Complete every prompt `generation.num_generations` times, all together → completions by prompt and sample.

    Sample i of prompt j depends on the seed, i and j alone, up to rounding. Raises InputError as `encode_prompt`, and
    for a prompt that is empty or leaves no room.
    """
    tokenizer = policy.tokenizer
    rows = [encode_prompt(tokenizer, prompt, **template_kwargs) for prompt in prompts]
    policy.check_stop_ids()
    return [
        [
            TextCompletion(
                text=tokenizer.decode_sampled(completion.token_ids),
                prompt_tokens=len(row),
                completion_tokens=len(completion.token_ids),
                finish_reason=completion.finish_reason,
            )
            for completion in completions
        ]
        for row, completions in zip(rows, _decode(policy, rows, generation, seed), strict=True)
    ]


def generate_batch(
    policy: TextPolicy,
    prompts: Sequence[str],
    num_generations: int,
    generation: GenerationConfig | None = None,
    seed: int = 0,
) -> RolloutBatch:
    """Complete every prompt `num_generations` times, which overrides the field of `generation`.

    Raises ModelError for a prompt without room or a policy without tokenizer.
    """
    generation = msgspec.structs.replace(generation or GenerationConfig(), num_generations=num_generations)
    prompt_ids = policy.tokenizer.batch_encode(prompts)
    completions = [completion for group in _decode(policy, prompt_ids, generation, seed) for completion in group]
    return RolloutBatch(
        prompt_ids=[ids for ids in prompt_ids for _ in range(num_generations)],
        completion_ids=[list(completion.token_ids) for completion in completions],
        log_probs=[list(completion.log_probs) for completion in completions],
        texts=[policy.tokenizer.decode_sampled(completion.token_ids) for completion in completions],
    )


def stream_text(
    policy: TextPolicy, prompt: TextPrompt, generation: GenerationConfig, seed: int, **template_kwargs: Any
) -> Iterator[str]:
    """Complete one prompt once → its text in pieces as they come, each of whole characters and none empty.

    The pieces join to the text that `complete_texts` gives. Raises at the call, not at the first piece, what
    `complete_texts` raises.
    """
    generation = msgspec.structs.replace(generation, num_generations=1)
    row = encode_prompt(policy.tokenizer, prompt, **template_kwargs)
    policy.check_stop_ids()
    ids = policy.engine(generation).stream(_requests([row], seed)[0])
    return _pieces(policy.tokenizer, ids)


def _pieces(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    decoder = tokenizer.sampled_stream()
    for id_ in ids:
        with suppress(ValueError):  # an id of the model's padded vocabulary, which has no text
            if piece := decoder.push(id_):
                yield piece
    if rest := decoder.finish():
        yield rest


def _decode(
    policy: TextPolicy, rows: Sequence[Sequence[int]], generation: GenerationConfig, seed: int
) -> list[tuple[Completion, ...]]:
    """Completions of each row, in order."""
    groups = policy.engine(generation).decode(_requests(rows, seed))
    return [group.completions for group in sorted(groups, key=lambda group: group.index)]


def _requests(rows: Sequence[Sequence[int]], seed: int) -> list[RolloutRequest]:
    return [RolloutRequest(prompt_ids=tuple(row), key=(seed, place)) for place, row in enumerate(rows)]
