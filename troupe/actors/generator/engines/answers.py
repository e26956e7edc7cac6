"""What an engine answers, read and checked: completions as token ids and log-probs, or the reason why it is of no use.

Servers say ids and log-probs in several ways; each is read by what stands there:

    ids         `token_ids` of a choice (vLLM), `id` of each entry of `logprobs.content` (mlx-lm, llama.cpp), or
                `token_id:N` in `logprobs.tokens` (vLLM before 0.10.2)
    log-probs   `logprobs.token_logprobs` (completions) or `logprob` of each entry of `logprobs.content`
"""

import math
from collections.abc import Callable, Sequence

import msgspec

from troupe.errors import sayable
from troupe.messages import FinishReason, Rollout
from troupe.policy.decode.stopping import StopRules, StopWatch

_ID = "token_id:"
_ROUNDING = 1e-3
"""By which the log-prob of a token that is all but certain may be above 0."""
_SHOWN = 300  # characters of what a server says


class EngineDownError(Exception):
    """It gave no answer, or one that says that it cannot just now: asked again, it may."""

    def __init__(self, message: str, *, again: bool = True, of_request: bool = False) -> None:
        """`again`: worth asking again at once. `of_request`: it is there, and what it was asked for may be why."""
        super().__init__(message)
        self.again = again
        self.of_request = of_request or not again


class EngineRefusedError(Exception):
    """What it answers is of no use, for a reason that stays until somebody changes something there."""


class _Entry(msgspec.Struct):
    """A token, where each has an entry of its own."""

    id: int | None = None
    logprob: float | None = None


class _LogProbs(msgspec.Struct):
    content: list[_Entry] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    logprobs: _LogProbs | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage | None = None


class Sampled(msgspec.Struct, frozen=True):
    """A completion as an engine gave it, checked; nothing is cut."""

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]


def read_answer(body: bytes, prompt_ids: Sequence[int], *, samples: int, most: int, vocab_size: int) -> list[Sampled]:
    """The completions in an answer to a prompt, `samples` of at most `most` tokens each, in order.

    Raises EngineDownError where it is no JSON of that form, as of a server that ended amid it; EngineRefusedError where
    ids or log-probs are missing, or are none.
    """
    try:
        answer = msgspec.json.decode(body, type=_Answer)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise EngineDownError(f"its answer cannot be read ({error}): {shown(body)}", of_request=True) from None
    if len(answer.choices) != samples or {choice.index for choice in answer.choices} != set(range(samples)):
        raise EngineRefusedError(f"it gave {len(answer.choices)} completions where {samples} were asked for")
    _check_prompt(answer, prompt_ids)
    in_order = sorted(answer.choices, key=lambda choice: choice.index)
    return [_sampled(choice, most, vocab_size) for choice in in_order]


def _check_prompt(answer: _Answer, prompt_ids: Sequence[int]) -> None:
    """EngineRefusedError where it read another prompt, as far as it says."""
    read = answer.choices[0].prompt_token_ids
    count = answer.usage.prompt_tokens if answer.usage else None
    if (read is not None and read != list(prompt_ids)) or (count is not None and count != len(prompt_ids)):
        found = len(read) if read is not None else count
        raise EngineRefusedError(
            f"it read another prompt: {found} tokens instead of {len(prompt_ids)}, or others; it has to have the "
            "tokenizer of the model that is trained"
        )


def _sampled(choice: _Choice, most: int, vocab_size: int) -> Sampled:
    ids, log_probs = _ids_of(choice), _log_probs_of(choice)
    if ids is None:
        raise EngineRefusedError(
            "it gives no token ids, and text alone does not say which tokens were sampled; vLLM gives them from 0.10.2 "
            "on (return_token_ids), mlx_lm.server beside log-probs"
        )
    if log_probs is None:
        raise EngineRefusedError("it gives no log-probs, without which nothing can correct for how it samples")
    if len(ids) != len(log_probs):
        raise EngineRefusedError(f"it gave {len(ids)} token ids and {len(log_probs)} log-probs for one completion")
    if not 1 <= len(ids) <= most:
        raise EngineRefusedError(f"it gave {len(ids)} tokens where 1 to {most} were asked for")
    if bad := [id_ for id_ in ids if not 0 <= id_ < vocab_size]:
        raise EngineRefusedError(f"it gave the token {bad[0]}, but the model's embedding ends at {vocab_size - 1}")
    if wrong := [x for x in log_probs if not (math.isfinite(x) and x <= _ROUNDING)]:
        raise EngineRefusedError(f"it gave the log-prob {wrong[0]}, which none is")
    return Sampled(tuple(ids), tuple(min(0.0, x) for x in log_probs))


def _ids_of(choice: _Choice) -> list[int] | None:
    if choice.token_ids is not None:
        return choice.token_ids
    log_probs = choice.logprobs
    if log_probs is None:
        return None
    if log_probs.content is not None:
        found = [entry.id for entry in log_probs.content if entry.id is not None]
        return found if len(found) == len(log_probs.content) else None
    tokens = log_probs.tokens or []
    numbers = [token.removeprefix(_ID) for token in tokens if token.startswith(_ID)]
    if not tokens or len(numbers) != len(tokens) or not all(number.isdecimal() for number in numbers):
        return None
    return [int(number) for number in numbers]


def _log_probs_of(choice: _Choice) -> list[float] | None:
    log_probs = choice.logprobs
    if log_probs is None:
        return None
    if log_probs.token_logprobs is not None:
        given = log_probs.token_logprobs
    elif log_probs.content is not None:
        given = [entry.logprob for entry in log_probs.content]
    else:
        return None
    found = [x for x in given if x is not None]
    return found if len(found) == len(given) else None


def finished(
    sampled: Sampled, rules: StopRules, most: int, *, version: int, text_of: Callable[[Sequence[int]], str]
) -> Rollout:
    """A completion as ours would have ended: at the first token that ends one, or at `most` tokens.

    Raises EngineRefusedError where the engine ended it elsewhere.
    """
    watch, reason, end = StopWatch(rules), None, len(sampled.token_ids)
    for place, id_ in enumerate(sampled.token_ids):
        if (reason := watch.push(id_)) is not None:
            end = place + 1
            break
    if reason is None and end < most:
        raise EngineRefusedError(
            f"it ended a completion after {end} of {most} tokens with the token {sampled.token_ids[-1]}, which ends no "
            "text here; the model that it serves has to say the same ends (generation_config.json), and to have room "
            "for a prompt and a whole completion"
        )
    ids, log_probs = sampled.token_ids[:end], sampled.log_probs[:end]
    why: FinishReason = "length" if reason is None else reason
    return Rollout(
        token_ids=ids,
        log_probs=log_probs,
        sampling_log_probs=log_probs,
        versions=(version,) * end,
        finish_reason=why,
        text=text_of(ids),
    )


def shown(body: bytes) -> str:
    """The beginning of what a server said, in one line."""
    return sayable(" ".join(body[: 4 * _SHOWN].decode("utf-8", "replace").split())[:_SHOWN])
