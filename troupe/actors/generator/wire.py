"""What the generator and its processes tell each other: msgpack frames, token ids and log-probs as packed arrays.

The process gets of a prompt what it needs to complete it, and of a completion everything comes back. Numbers are int32
and float32, little-endian: what is packed here goes to other machines, too.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias, TypeVar

import msgspec

from troupe.actors.generator.acting import ActingConfig
from troupe.messages import (
    FinishReason,
    Incident,
    Observation,
    Prompt,
    Rollout,
    RolloutGroup,
    RowStart,
    Slot,
    Span,
    TurnTaken,
)
from troupe.policy import Adapter, GenerationConfig, NetworkConfig
from troupe.runtime.frames import MessageError, decoder

Number = TypeVar("Number", int, float)


class BaseSource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the base is that weights complete, and what lies beside it."""

    folder: str
    fingerprint: str
    """Of the folder, when the run began."""
    dtype: str
    """That it is held in."""
    adapter: Adapter


class Setup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """The first frame to a process: all that its generator is made of."""

    name: str
    """For its track on the timeline."""
    policy: NetworkConfig
    base: BaseSource | None = None
    """None: what is published is the whole network."""
    generation: GenerationConfig
    sets: tuple[GenerationConfig, ...] = ()
    """What rows of each set are completed with that is evaluated."""
    stop_ids: tuple[int, ...]
    tokenizer: str
    """The model folder that holds it."""
    tokenizer_files: Mapping[str, bytes] = {}
    """Its files as they were when the run began, which count where there are any: what has become of the folder since
    does not matter."""
    seed: int
    max_staleness: int
    parts: int = 1
    """`schedule.parts`; what comes together is one of them."""
    most_at_once: int | None
    """Prompts that are decoded together in the free schedule; None: the schedule is pinned."""
    live: int
    """Most groups that may be alive at once."""
    on_cpu: bool
    blas_threads: int | None = None
    records_experts: bool = False
    """As for `RolloutEngine`."""
    acts: ActingConfig | None = None
    """Where the policy acts."""
    limit_gb: float | None = None
    """Of MLX's memory in the process, in 10⁹ bytes; None leaves it its own."""


class Ping(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """What time is it there?"""


class PackedPrompt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of a prompt what is needed to complete it."""

    gid: int
    slot: Slot
    round_size: int
    """Prompts of the round that this process has."""
    prompt_ids: bytes
    """int32."""


class Prompts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Prompts that are there at the same time."""

    prompts: tuple[PackedPrompt, ...]


class Rows(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """A part of an evaluation; the file of its version stays until the last of it is `Completed`."""

    set: int
    version: int
    path: str
    prompts: tuple[PackedPrompt, ...]


class NewWeights(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """A policy version was published; its file stays until `Loaded`."""

    version: int
    path: str


class End(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """No more prompts will come."""


class Ready(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """The process has made its generator."""


class Pong(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """The process's `time.perf_counter`."""

    now_s: float


class Loaded(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """The process has read the file of a version."""

    version: int


class PackedRollout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One completion of T tokens."""

    token_ids: bytes
    """(T,) int32."""
    log_probs: bytes
    """(T,) float32."""
    sampling_log_probs: bytes | None
    """(T,) float32; None: equal to `log_probs`."""
    versions: bytes
    """(T,) int32."""
    finish_reason: FinishReason
    text: str
    experts: bytes = b""
    """As in `Rollout`, as are the next ones."""
    observed: tuple[tuple[int, int], ...] = ()
    rows: tuple[RowStart, ...] = ()


class Completed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """The completions of one prompt, in sample order."""

    gid: int
    rollouts: tuple[PackedRollout, ...]
    prompt_experts: bytes = b""
    """As in `RolloutGroup`."""


class TurnEnded(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """A sample has ended its turn and waits; as in `TurnTaken`."""

    gid: int
    sample: int
    turn: int
    token_ids: bytes
    """int32."""
    finish_reason: FinishReason
    start: int
    room: int
    asker: int


class Made(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """How far the decode in hand has come; told once a second."""

    tokens: int
    """That its longest completion has."""


class Refused(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """A TroupeError ended the generator: nothing that a new process could mend."""

    kind: str
    """Name of its class."""
    message: str


class Ended(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """All that was to be told has been told."""


ToProcess: TypeAlias = Setup | Ping | Prompts | Rows | NewWeights | Observation | End
FromProcess: TypeAlias = Ready | Pong | Loaded | TurnEnded | Completed | Made | Span | Incident | Refused | Ended

decode_in_process: Callable[[bytes], ToProcess] = decoder(ToProcess, "the generator and its process")
"""What the run says; MessageError for anything else."""
decode_from_process: Callable[[bytes], FromProcess] = decoder(FromProcess, "the generator and its process")
"""What the process says; MessageError for anything else."""


def pack_prompt(prompt: Prompt, round_size: int) -> PackedPrompt:
    """Texts and columns stay behind."""
    return PackedPrompt(gid=prompt.gid, slot=prompt.slot, round_size=round_size, prompt_ids=_ints(prompt.prompt_ids))


def unpack_prompt(packed: PackedPrompt) -> Prompt:
    """A prompt as the generator takes it, without texts and columns."""
    return Prompt(
        gid=packed.gid,
        slot=packed.slot,
        epoch=0,
        row=0,
        prompt="",
        prompt_ids=_as_ints(packed.prompt_ids),
        columns={},
        round_size=packed.round_size,
    )


def pack_rollout(rollout: Rollout) -> PackedRollout:
    """Exact: log-probs are float32 numbers."""
    same = rollout.sampling_log_probs == rollout.log_probs
    return PackedRollout(
        token_ids=_ints(rollout.token_ids),
        log_probs=_floats(rollout.log_probs),
        sampling_log_probs=None if same else _floats(rollout.sampling_log_probs),
        versions=_ints(rollout.versions),
        finish_reason=rollout.finish_reason,
        text=rollout.text,
        experts=rollout.experts,
        observed=rollout.observed,
        rows=rollout.rows,
    )


def pack_group(group: RolloutGroup) -> Completed:
    """Exact; the prompt stays behind."""
    rollouts = tuple(map(pack_rollout, group.rollouts))
    return Completed(gid=group.prompt.gid, rollouts=rollouts, prompt_experts=group.prompt_experts)


def unpack_rollout(packed: PackedRollout) -> Rollout:
    """ValueError where the arrays are not of one length."""
    token_ids, versions = _as_ints(packed.token_ids), _as_ints(packed.versions)
    log_probs = _as_floats(packed.log_probs)
    sampling = log_probs if packed.sampling_log_probs is None else _as_floats(packed.sampling_log_probs)
    if not len(token_ids) == len(versions) == len(log_probs) == len(sampling):
        raise MessageError(f"a completion of {len(token_ids)} tokens came with {len(log_probs)} log-probs")
    return Rollout(
        token_ids=token_ids,
        log_probs=log_probs,
        sampling_log_probs=sampling,
        versions=versions,
        finish_reason=packed.finish_reason,
        text=packed.text,
        experts=packed.experts,
        observed=packed.observed,
        rows=packed.rows,
    )


def pack_turn(taken: TurnTaken) -> TurnEnded:
    """The prompt stays behind."""
    return TurnEnded(
        gid=taken.prompt.gid,
        sample=taken.sample,
        turn=taken.turn,
        token_ids=_ints(taken.token_ids),
        finish_reason=taken.finish_reason,
        start=taken.start,
        room=taken.room,
        asker=taken.asker,
    )


def unpack_turn(ended: TurnEnded, prompt: Prompt) -> TurnTaken:
    """A turn as the environment is told of it."""
    return TurnTaken(
        prompt=prompt,
        sample=ended.sample,
        turn=ended.turn,
        token_ids=_as_ints(ended.token_ids),
        finish_reason=ended.finish_reason,
        start=ended.start,
        room=ended.room,
        asker=ended.asker,
    )


def _ints(values: Iterable[int]) -> bytes:
    return _little(array("i", values)).tobytes()


def _floats(values: Sequence[float]) -> bytes:
    return _little(array("f", values)).tobytes()


def _as_ints(data: bytes) -> tuple[int, ...]:
    return tuple(_filled(array("i"), data))


def _as_floats(data: bytes) -> tuple[float, ...]:
    return tuple(_filled(array("f"), data))


def _filled(values: array[Number], data: bytes) -> array[Number]:
    try:
        values.frombytes(data)
    except ValueError:
        raise MessageError(f"an array of {len(data)} bytes is not made of numbers of {values.itemsize}") from None
    return _little(values)


def _little(values: array[Number], byteorder: str = sys.byteorder) -> array[Number]:
    """From this machine's byte order to little-endian, or back."""
    if byteorder == "big":
        values.byteswap()
    return values
