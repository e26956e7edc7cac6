"""What the learner and its other ranks tell each other: msgpack frames, arrays as their bytes. Frames never leave the
machine."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import mlx.core as mx
import msgspec

from troupe.actors.generator.wire import BaseSource
from troupe.actors.learner.collective import Meeting
from troupe.grpo import Batch, LearnerConfig
from troupe.grpo.supervised import Supervision
from troupe.policy import NetworkConfig
from troupe.runtime.frames import decoder


class RankSetup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all ranks learn by."""

    learner: LearnerConfig
    policy: NetworkConfig
    base: BaseSource | None = None
    """None: what is learned is the whole network."""
    temperature: float
    max_completion_length: int
    pad_id: int
    total_steps: int
    streams: int
    seed: int
    on_cpu: bool
    blas_threads: int | None = None
    limit_gb: float | None = None
    """Of MLX's memory in a child, in 10⁹ bytes; None leaves it its own."""
    supervision: Supervision | None = None
    max_staleness: int = 0
    """Versions that are kept beside the newest, for a generator there."""


class Begin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """The first frame to a rank."""

    rank: int
    meeting: Meeting
    setup: RankSetup
    version: int
    weights: str
    """A file, as are the next ones, that stays until `Ready`."""
    optimizer_state: str | None
    """None: no update has been made yet."""
    reference: str | None


class Join(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """All ranks are ready: meet."""


class PackedBatch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A `Batch` of B rows."""

    prompts: tuple[bytes, ...]
    """int32, as are completions."""
    completions: tuple[bytes, ...]
    columns: int
    """T."""
    completion_mask: bytes
    """(B, T) float32."""
    advantages: bytes
    """(B,) or (B, T) float32."""
    sampling_log_probs: bytes
    """(B, T) float32."""
    truncated: tuple[bool, ...]
    pad_id: int
    keys: tuple[tuple[int, int], ...] | None
    experts: tuple[tuple[bytes, bytes], ...] | None
    samples: tuple[int, ...] | None
    observed: bytes | None = None
    """(B, T) float32."""


class Learn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """One step, the next after `version`, with the learning rate of each pass; a step without a batch makes no
    update."""

    version: int
    batch: PackedBatch | None
    rates: tuple[float, ...]


class ToGenerator(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """A frame for the generator beside the rank, the first one its setup."""

    session: int
    """Which generator; a number that was not there before begins a new one."""
    frame: bytes | None
    """None: nothing more will be read of it."""


class OfGenerator(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """A frame of the generator."""

    session: int
    frame: bytes | None
    """None: it has ended."""
    why: str = ""
    """Why, where that needs words."""


class Ready(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """The rank has loaded what it learns from."""

    device: str


class Beat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """The rank is alive; told every second."""

    version: int
    waits: bool
    """In a collective, since before the beat before."""


class Done(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """A step is learned; its parts with start and end by the machine's clock (`time.perf_counter`)."""

    version: int
    parts: tuple[tuple[str, float, float], ...]


class Refused(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """A TroupeError ended the rank."""

    message: str


ToRank: TypeAlias = Begin | Join | Learn | ToGenerator
FromRank: TypeAlias = Ready | Beat | Done | OfGenerator | Refused

decode_in_rank: Callable[[bytes], ToRank] = decoder(ToRank, "the learner and its ranks")
"""What the learner says; MessageError for anything else."""
decode_from_rank: Callable[[bytes], FromRank] = decoder(FromRank, "the learner and its ranks")
"""What a rank says; MessageError for anything else."""


def pack_batch(batch: Batch) -> PackedBatch:
    """All that is given of a batch; exact."""
    mx.eval(batch.completion_mask, batch.advantages, batch.sampling_log_probs)
    return PackedBatch(
        prompts=tuple(map(_ints, batch.prompts)),
        completions=tuple(map(_ints, batch.completions)),
        columns=batch.completion_mask.shape[1],
        completion_mask=_bytes(batch.completion_mask),
        advantages=_bytes(batch.advantages),
        sampling_log_probs=_bytes(batch.sampling_log_probs),
        truncated=batch.truncated,
        pad_id=batch.pad_id,
        keys=batch.keys,
        experts=batch.experts,
        samples=batch.samples,
        observed=None if batch.observed is None else _bytes(batch.observed),
    )


def unpack_batch(packed: PackedBatch) -> Batch:
    """Evaluated."""
    B, T = len(packed.prompts), packed.columns
    batch = Batch(
        prompts=tuple(map(_as_ints, packed.prompts)),
        completions=tuple(map(_as_ints, packed.completions)),
        completion_mask=_array(packed.completion_mask, (B, T)),
        advantages=_array(packed.advantages, (B,) if len(packed.advantages) == 4 * B else (B, T)),
        sampling_log_probs=_array(packed.sampling_log_probs, (B, T)),
        truncated=packed.truncated,
        pad_id=packed.pad_id,
        keys=packed.keys,
        experts=packed.experts,
        samples=packed.samples,
        observed=None if packed.observed is None else _array(packed.observed, (B, T)),
    )
    mx.eval(batch.observed, batch.completion_mask, batch.advantages, batch.sampling_log_probs)
    return batch


def _ints(values: Sequence[int]) -> bytes:
    return array("i", values).tobytes()


def _as_ints(data: bytes) -> tuple[int, ...]:
    numbers = array("i")
    numbers.frombytes(data)
    return tuple(numbers)


def _bytes(x: mx.array) -> bytes:
    view: Any = memoryview(x)  # type: ignore[arg-type]
    return bytes(view)


def _array(data: bytes, shape: tuple[int, ...]) -> mx.array:
    view: Any = memoryview(data).cast("f", shape)
    return mx.array(view)
