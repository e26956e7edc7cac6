"""What a decode is asked for and what it gives: settings, requests, completions. Data only, in token ids."""

import math
from typing import Annotated, Literal, TypeAlias

import msgspec

from troupe.policy.decode.sampling import SamplingConfig

FinishReason: TypeAlias = Literal["stop", "length", "repetition", "aborted"]
"""A stop id or string, the length limit, the repetition cut-off, or `RolloutEngine.abort`."""


class GenerationConfig(SamplingConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How completions are sampled, and how many of what length."""

    num_generations: Annotated[int, msgspec.Meta(ge=1)] = 8
    """G, completions of each prompt."""
    max_completion_length: Annotated[int, msgspec.Meta(ge=1)] = 256
    """Most tokens of a completion. The model's positions may leave less beside a long prompt; in a run the longest
    prompt lowers it for all."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion. The token that completes one is kept, and so is the string in the text."""
    repetition_cutoff: Annotated[int, msgspec.Meta(ge=0)] = 0
    """End a completion whose last tokens are one pattern this many times in succession; 0 is off, else at least 2."""
    repetition_pattern: Annotated[int, msgspec.Meta(ge=1)] = 16
    """Longest pattern, in tokens, that the cut-off looks for."""
    memory_limit_gb: Annotated[float, msgspec.Meta(gt=0.0)] | None = None
    """Most memory of a decode beside the weights, in 10⁹ bytes by the formula of `decode/memory.py`; prompts that do
    not fit together are decoded in waves, one after the other. Without it all are decoded together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_generations", "max_completion_length", "repetition_pattern"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1")
        if "" in self.stop:
            raise ValueError("stop holds an empty string, which would end every completion at once; leave it out")
        if self.repetition_cutoff < 0 or self.repetition_cutoff == 1:
            raise ValueError(f"repetition_cutoff is {self.repetition_cutoff}, but must be at least 2, or 0 for off")
        if self.memory_limit_gb is not None and not 0.0 < self.memory_limit_gb < math.inf:
            raise ValueError(f"memory_limit_gb is {self.memory_limit_gb}, but must be above 0; leave it out for none")


class RolloutRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One prompt to be completed G times."""

    prompt_ids: tuple[int, ...]
    """Token ids, at least one."""
    key: tuple[int, ...]
    """Integers in [0, 2⁶⁴) that name the random stream of the group, such as (seed, step, place, attempt)."""
    policy: int = 0
    """Which of the policies that the engine has loaded completes it."""


class Completion(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One completion of T tokens; the fields are those of `troupe.messages.Rollout`."""

    token_ids: tuple[int, ...]
    """(T,) sampled ids, the one that ended the completion included."""
    log_probs: tuple[float, ...]
    """(T,) nats, under softmax(logits / temperature); at temperature 0 under softmax(logits)."""
    sampling_log_probs: tuple[float, ...]
    """(T,) nats, under the distribution really drawn from: after penalties, bias and filters."""
    versions: tuple[int, ...]
    """(T,) version of the weights that made each token."""
    finish_reason: FinishReason
    experts: bytes = b""
    """Where recorded, the experts that its tokens but the last went to; see `troupe.messages.RolloutGroup`."""


class CompletedGroup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All samples of one request, handed over when the last of them ended."""

    index: int
    """Which request, counted from 0 in the order given."""
    completions: tuple[Completion, ...]
    """(G,) in sample order."""
    prompt_experts: bytes = b""
    """Where recorded, those of the prompt's tokens."""


class TurnRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One turn of a row that goes on over several."""

    row: tuple[int, ...]
    """Names the row and its random stream: the key of a request, and the sample."""
    ids: tuple[int, ...]
    """To be read before sampling, at least one: the whole prompt of a new row, else what is new since its last turn."""
    start: int
    """Tokens that the rollout has so far, what it read between turns included: as many numbers of the random stream are
    passed over."""
    room: int
    """Most tokens of this turn. The model's positions may leave less."""
    fresh: bool = False
    """A new row begins: what was kept under its name is forgotten."""
    last: bool = False
    """Nothing of the row need be kept after this turn."""
    policy: int = 0
    """Which of the policies that are loaded completes it; one for all rows of a call."""


class CompletedTurn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A turn of a row, when it has ended; fields are those of `Completion`."""

    row: tuple[int, ...]
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    sampling_log_probs: tuple[float, ...]
    versions: tuple[int, ...]
    finish_reason: FinishReason
    experts: bytes = b""
    """Where recorded, the experts that its tokens but the last went to."""
    read_experts: bytes = b""
    """Where recorded, those of what was read before: the last token of the turn before and what came behind it, or the
    whole prompt of a new row."""
