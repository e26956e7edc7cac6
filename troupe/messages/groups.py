"""The life of a group, a type for each state: Prompt → RolloutGroup → ScoredGroup.

A *step* is one learner batch: P prompts × G completions. A group's identity is its `Slot`; its `gid` is unique
over the whole run and a function of the slot alone, so that a group issued again after a crash is the same group.
The next state is another type, which holds the one before: no field is ever filled in later.
"""

from typing import Any, Literal, TypeAlias

import msgspec

from troupe.messages.episodes import ChatMessage, Episode

PromptText: TypeAlias = str | list[ChatMessage]
"""A plain prompt, or a conversation."""

FinishReason = Literal["stop", "length", "repetition", "aborted"]
"""Why a completion ended: a stop token, the length limit, a repetition cut-off, or an abandoned decode."""


class Slot(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, order=True):
    """Where a group stands in the run. Slots order by step, then place, then attempt."""

    step: int
    """Learner batch k ≥ 0 that trains the group."""
    place: int
    """Place 0 ≤ j < P within the batch."""
    attempt: int = 0
    """0 for the first group in this place; a replacement of a filtered group counts up."""


class Prompt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Prompter → Generator: one prompt to be completed G times."""

    gid: int
    """Unique number of the group."""
    slot: Slot
    epoch: int
    """Pass over the dataset that this prompt belongs to, from 0."""
    row: int
    """Row of the dataset, from 0."""
    prompt: PromptText
    """As the dataset has it; reward functions see this."""
    prompt_ids: tuple[int, ...]
    """Token ids, special tokens and chat template included; length ≥ 1."""
    columns: dict[str, Any]
    """The other columns of the dataset row."""
    opened: str = ""
    """What the prompt has written of the completion's thoughts already, such as `<think>` and a line end."""
    round_size: int = 1
    """Prompts of this step and attempt, this one included: they are decoded together."""


class RowStart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """From here on the tokens of a rollout follow another prompt: its own, or its history as it is told from now on."""

    start: int
    """Place in `token_ids`; 0 where the first row has a prompt of its own."""
    prompt_ids: tuple[int, ...]
    prompt_experts: bytes = b""
    """Where recorded, as `RolloutGroup.prompt_experts`."""


class Rollout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One completion of T tokens."""

    token_ids: tuple[int, ...]
    """(T,) sampled ids; at `finish_reason` "stop" the last one is the stop token or completed a stop string."""
    log_probs: tuple[float, ...]
    """(T,) float32 log-probability, in nats, of each token under the temperature-scaled, unfiltered distribution:
    the one that the learner differentiates."""
    sampling_log_probs: tuple[float, ...]
    """(T,) the same under the distribution really sampled from: `log_probs` where no filter or penalty is on."""
    versions: tuple[int, ...]
    """(T,) policy version whose weights made each token."""
    finish_reason: FinishReason
    text: str
    """The completion decoded, without special tokens."""
    experts: bytes = b""
    """Where recorded, the experts that its tokens but the last went to; as `RolloutGroup.prompt_experts`. Zeros stand
    for the last token of a row behind which another row begins, since nobody has read it."""
    observed: tuple[tuple[int, int], ...] = ()
    """Of an episode, the ranges [start, stop) of `token_ids` that an environment or a tool put in: the policy read them
    and did not sample them, so they are no part of any ratio or length, nor of a loss but that of
    `learner.echo_alpha`. Their log-probs are 0 and mean nothing, their versions are those that read them."""
    rows: tuple[RowStart, ...] = ()
    """Of an episode, where new rows begin; empty: all tokens follow the group's prompt."""
    teacher_log_probs: tuple[float, ...] = ()
    """(T,) float32 log-probability, in nats, of each token for the teacher, at the temperature of `log_probs`, and
    equal to these where it has no opinion: at what was observed, and from an id on that it does not know. Empty: it was
    not asked."""


class RolloutGroup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Generator → Scorer: the G completions of one prompt, handed over when the last of them ended."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    """(G,) in sample order."""
    prompt_experts: bytes = b""
    """Where recorded, the experts that the prompt's tokens went to: (tokens, layers with experts, experts a token)
    ascending ids, one byte each, or two where there are more than 256."""
    episodes: tuple[Episode, ...] = ()
    """(G,) what became of each sample, where the policy acts in an environment or has tools."""
    supervised: bool = False
    """Whether its completion is the dataset's and was not sampled: nothing scores it, and its likelihood is what is
    learned."""


class ScoredGroup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Scorer → Learner: a group with one score per reward function and sample."""

    group: RolloutGroup
    scores: dict[str, tuple[float | None, ...]]
    """Reward name → (G,) scores. `None` is a *missing* score (an exception, a timeout, NaN), never 0."""
    logged: dict[str, float] = {}
    """Metrics that the reward functions logged themselves while scoring the group."""
    extra: dict[str, tuple[Any, ...]] = {}
    """Column → (G,) values that they logged about each completion, plain data."""
    faulted: tuple[int, ...] = ()
    """Samples of which some score is missing through a fault, and not because its reward said None: they have no
    reward, whatever scores they have."""
