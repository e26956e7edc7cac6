"""What a completion from elsewhere must be before anybody looks at it: of the size, range and form of its prompt's."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import msgspec

from troupe.actors.generator.parts import Part
from troupe.actors.generator.wire import Completed, pack_rollout, unpack_rollout
from troupe.messages import Prompt, Rollout, RolloutGroup
from troupe.runtime.frames import MessageError

_ABOVE_0 = 1e-3
"""A log-prob may round to a little more than 0."""


class ResultLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What completions of a run are."""

    vocab_size: int
    num_generations: int
    max_completion_length: int
    """Tokens of a completion; where the policy acts, of all of an episode's."""
    context: int
    """Tokens of a prompt and its completion."""
    stop_ids: frozenset[int]
    has_stop_strings: bool
    acts: bool
    """Whether completions are episodes of turns."""
    experts: int = 0
    """Of a layer, where it is recorded which of them tokens go to; 0: it is not."""
    sets: tuple[tuple[int, int], ...] = ()
    """Of each set of rows that is evaluated: completions a row, and their most tokens."""

    def of(self, part: Part) -> ResultLimits:
        """What completions of a part are."""
        if part.set is None:
            return self
        num_generations, longest = self.sets[part.set]
        return msgspec.structs.replace(self, num_generations=num_generations, max_completion_length=longest, experts=0)


def checked_group(
    completed: Completed,
    prompt: Prompt,
    limits: ResultLimits,
    *,
    version: int | None,
    newest: int,
    decode_text: Callable[[Sequence[int]], str],
) -> RolloutGroup:
    """The group. MessageError, which says why, where this cannot be its completions.

    `version`: that it was to be decoded with; None: any up to `newest`.
    """
    if len(completed.rollouts) != limits.num_generations:
        raise MessageError(f"{len(completed.rollouts)} completions came where {limits.num_generations} were asked for")
    _check_experts(completed.prompt_experts, limits)
    rollouts = []
    for number, packed in enumerate(completed.rollouts):
        try:
            rollout = unpack_rollout(packed)
            _check(rollout, limits, version=version, newest=newest)
            if not limits.acts:
                _check_end(rollout, limits, min(limits.max_completion_length, limits.context - len(prompt.prompt_ids)))
                if decode_text(rollout.token_ids) != rollout.text:
                    raise MessageError("its text is not that of its tokens")
        except ValueError as error:
            raise MessageError(f"completion {number} of group {prompt.gid}: {error}") from None
        rollouts.append(rollout)
    return RolloutGroup(prompt=prompt, rollouts=tuple(rollouts), prompt_experts=completed.prompt_experts)


def _check(rollout: Rollout, limits: ResultLimits, *, version: int | None, newest: int) -> None:
    ids, versions = rollout.token_ids, rollout.versions
    if len(ids) > limits.max_completion_length or not (ids or limits.acts):
        raise MessageError(f"it has {len(ids)} tokens, of which there may be 1 to {limits.max_completion_length}")
    if ids and not 0 <= min(ids) <= max(ids) < limits.vocab_size:
        raise MessageError(f"it has token {min(ids)} or {max(ids)}, which is none of {limits.vocab_size}")
    for each in (rollout.log_probs, rollout.sampling_log_probs):
        if (
            not math.isfinite(sum(each)) or max(each, default=0.0) > _ABOVE_0
        ):  # a sum of float32 is finite where all are
            worst = next((value for value in each if not math.isfinite(value) or value > _ABOVE_0), math.inf)
            raise MessageError(f"it has {worst} for a log-probability")
    if version is not None and any(each != version for each in versions):
        raise MessageError(f"its weights are not those of version {version}")
    if any(a > b for a, b in pairwise(versions)) or (versions and not 0 <= versions[0] <= versions[-1] <= newest):
        raise MessageError(f"its versions do not rise from 0 to {newest} at most")
    _check_ranges(rollout, limits)


def _check_ranges(rollout: Rollout, limits: ResultLimits) -> None:
    length = len(rollout.token_ids)
    if (rollout.observed or rollout.rows) and not limits.acts:
        raise MessageError("it has turns, and nothing acts in this run")
    last = 0
    for start, stop in rollout.observed:
        if not last <= start <= stop <= length:
            raise MessageError("what it has read lies outside of it")
        last = stop
    _check_experts(rollout.experts, limits)
    for row in rollout.rows:
        _check_experts(row.prompt_experts, limits)
        if not 0 <= row.start <= length or not all(0 <= each < limits.vocab_size for each in row.prompt_ids):
            raise MessageError("a row of it cannot be")


def _check_experts(data: bytes, limits: ResultLimits) -> None:
    """The learner looks experts up by these ids."""
    if not data:
        return
    ids: Iterable[int] = data
    if limits.experts > 256:
        ids = (data[i] | data[i + 1] << 8 for i in range(0, len(data) - 1, 2))
    if not limits.experts or max(ids, default=0) >= limits.experts:
        raise MessageError(f"it names experts that are none of {limits.experts}")


def _check_end(rollout: Rollout, limits: ResultLimits, most: int) -> None:
    ids = rollout.token_ids
    stops = ids[-1] in limits.stop_ids
    match rollout.finish_reason:
        case "stop":
            holds = stops or limits.has_stop_strings
        case "length":
            holds = len(ids) == most and not stops
        case "repetition":
            holds = not stops
        case _:
            holds = False
    if not holds or any(each in limits.stop_ids for each in ids[:-1]):
        raise MessageError(f"it has not ended as it says ({rollout.finish_reason})")


def bits_of(groups: Iterable[RolloutGroup]) -> tuple[str, str]:
    """sha256 of all token ids and of all log-probs' bits, by gid and sample."""
    ids, log_probs = hashlib.sha256(), hashlib.sha256()
    for group in sorted(groups, key=lambda group: group.prompt.gid):
        for rollout in group.rollouts:
            packed = pack_rollout(rollout)
            ids.update(len(packed.token_ids).to_bytes(8, "little") + packed.token_ids)
            log_probs.update(packed.log_probs + (packed.sampling_log_probs or b""))
    return ids.hexdigest(), log_probs.hexdigest()
