"""Text in, text out: prompts, plain or chats, completed by a policy, all at once or word by word.

Stands between the tokenizer and the decoding engine. Knows nothing of files, rewards or the command line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec

from troupe.errors import InputError
from troupe.policy.decode.engine import GenerationConfig, RolloutEngine, RolloutRequest
from troupe.policy.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from troupe.policy.model import Policy

OPENED, CLOSED = "<think>", "</think>"
"""What thoughts stand between."""

TextPrompt: TypeAlias = str | Sequence[Mapping[str, Any]]
"""Text to continue, or the messages of a chat to answer."""


class TextCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """One completion of a text prompt."""

    text: str
    """Without prompt and special tokens."""
    prompt_tokens: int
    completion_tokens: int
    """The stop token included."""
    finish_reason: Literal["stop", "length", "repetition", "aborted"]


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


def opened_thought(tokenizer: Tokenizer, prompt: TextPrompt, ids: Sequence[int]) -> str:
    """What a prompt has written of the completion's thoughts: from its last `<think>` on, where that is still open.

    Of a text that is at its very end alone, and white space; of a chat anywhere in the turn that is begun, behind the
    last special token. Mostly "".
    """
    if isinstance(prompt, str):
        return prompt[prompt.rfind(OPENED) :] if prompt.rstrip().endswith(OPENED) else ""
    special = tokenizer.special_ids
    start = len(ids)
    while start and (ids[start - 1] not in special or tokenizer.decode([ids[start - 1]], False) in (OPENED, CLOSED)):
        start -= 1
    text = tokenizer.decode(ids[start:], skip_special_tokens=False)
    begun = text[text.rfind(OPENED) :] if OPENED in text else ""
    return begun if begun.strip() == OPENED or (start and CLOSED not in begun) else ""


def complete_texts(
    policy: Policy, prompts: Sequence[TextPrompt], generation: GenerationConfig, seed: int, **template_kwargs: Any
) -> list[list[TextCompletion]]:
    """Complete every prompt `generation.num_generations` times, all together → completions by prompt and sample.

    Sample i of prompt j depends on the seed, i and j alone, up to rounding. Raises InputError as `encode_prompt`, and
    for a prompt that is empty or leaves no room.
    """
    tokenizer = policy.tokenizer
    rows = [encode_prompt(tokenizer, prompt, **template_kwargs) for prompt in prompts]
    groups = sorted(_engine(policy, generation).decode(_requests(rows, seed)), key=lambda group: group.index)
    return [
        [
            TextCompletion(
                text=tokenizer.decode_sampled(completion.token_ids),
                prompt_tokens=len(row),
                completion_tokens=len(completion.token_ids),
                finish_reason=completion.finish_reason,
            )
            for completion in group.completions
        ]
        for row, group in zip(rows, groups, strict=True)
    ]


def stream_text(
    policy: Policy, prompt: TextPrompt, generation: GenerationConfig, seed: int, **template_kwargs: Any
) -> Iterator[str]:
    """Complete one prompt once → its text in pieces as they come, each of whole characters and none empty.

    The pieces join to the text that `complete_texts` gives. Raises at the call, not at the first piece, what
    `complete_texts` raises.
    """
    generation = msgspec.structs.replace(generation, num_generations=1)
    row = encode_prompt(policy.tokenizer, prompt, **template_kwargs)
    ids = _engine(policy, generation).stream(_requests([row], seed)[0])
    return _pieces(policy.tokenizer, ids)


def _pieces(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    decoder = tokenizer.decode_stream()
    for id_ in ids:
        with suppress(ValueError):  # an id of the model's padded vocabulary, which has no text
            if piece := decoder.push(id_):
                yield piece
    if rest := decoder.finish():
        yield rest


def _engine(policy: Policy, generation: GenerationConfig) -> RolloutEngine:
    policy.check_stop_ids()
    engine = RolloutEngine(policy.config, generation, stop_ids=policy.eos_ids, tokenizer=policy.tokenizer)
    engine.load(policy.weights, 0)
    return engine


def _requests(rows: Sequence[Sequence[int]], seed: int) -> list[RolloutRequest]:
    return [RolloutRequest(prompt_ids=tuple(row), key=(seed, place)) for place, row in enumerate(rows)]
