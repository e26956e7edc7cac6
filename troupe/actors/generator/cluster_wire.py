"""What workers that generate and the run tell each other, as bodies of `cluster/wire.py`'s frames.

Prompts, completions and turns are the frames of the generator's own processes (`wire.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, TypeAlias

import msgspec

from troupe.actors.generator.wire import Completed, PackedPrompt
from troupe.messages import Observation, Span
from troupe.runtime.frames import decoder

MAX_SPANS = 4096
"""In one frame."""

Verdict: TypeAlias = Literal["taken", "known", "differs", "foreign"]
"""As of `Crew.completed`."""


class PartFrame(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Prompts that are decoded together, on lease."""

    name: str
    version: int | None
    """Of the policy; None: the newest that the worker has, and new ones between tokens."""
    prompts: tuple[PackedPrompt, ...]


class Probe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a worker decodes before it gets work, so that its bits can be compared."""

    part: PartFrame


class Terms(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`hello`, answered: what a worker that generates needs. In `Admitted.details`."""

    setup: str
    """Name of the blob that holds the `Setup` of its generator, whose folders, name, device and limits are its own."""
    base: str | None = None
    """Name of the blob with the model folder's weights below an adapter, for a worker that has no such folder."""
    probe: Probe | None = None
    """None: anybody may generate."""
    versions: tuple[int, ...] = ()
    """Of the policy, that can be had now."""


class KinAnswer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`kin`: what the probe came to."""

    version: int
    token_ids: str
    """sha256 of all token ids, in order."""
    log_probs: str
    """sha256 of the bits of all log-probs."""


class KinVerdict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Answer to `kin`, unless the worker is declined."""

    admitted: bool
    probe: Probe | None = None
    """Where not admitted: decode this one, since the other's version is gone; None: ask again in a second."""


class Pull(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`pull`: give me work; answered with `Pulled` within `PULL_WAIT_S`."""

    number: Annotated[int, msgspec.Meta(ge=1)]
    """Of this pull in its session, counted from 1; asked again with the same number where no answer came."""
    most: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 1
    """Parts that it has room for."""


class Pulled(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The parts that the worker has from now on."""

    parts: tuple[PartFrame, ...]


class Done(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`done`: one group of a part; a part is over after its last. Answered with `Accepted`."""

    part: str
    completed: Completed


class Accepted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    verdict: Verdict


class Observe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`observe`: what is there to be read? Answered with `Observed` within `PULL_WAIT_S`.

    A turn is told with `turn`, whose body is a `TurnEnded` and whose answer is empty; it may be told again.
    """

    after: Annotated[int, msgspec.Meta(ge=0)]
    """Number of the newest observation that the worker has; 0: none in this session."""


class Observed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Observations in order, from `first` on."""

    first: int
    observations: tuple[Observation, ...]


class Dropped(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`dropped`: the worker's generator was lost on these. A part that costs many generators ends the run."""

    parts: Annotated[tuple[str, ...], msgspec.Meta(max_length=4096)]
    reason: Annotated[str, msgspec.Meta(max_length=2000)]


class WholeVersion(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`full`: a version is wanted whole, since it could not be made of its change."""

    version: int


class Spans(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`span`: what was done there, by the worker's `time.perf_counter`; may be lost."""

    spans: Annotated[tuple[Span, ...], msgspec.Meta(max_length=MAX_SPANS)]


class GenerateState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """In `Pulse.details`: how the run stands for who generates."""

    newest: int
    """Version of the policy."""
    wanted: tuple[int, ...] = ()
    """Versions that open parts are to be decoded with."""
    open_parts: int = 0
    """That wait for somebody."""
    share: int = 1
    """Of them, one worker's share."""


decode_terms: Callable[[bytes], Terms] = decoder(Terms, "the run and a worker")
decode_kin: Callable[[bytes], KinAnswer] = decoder(KinAnswer, "a worker and the run")
decode_kin_verdict: Callable[[bytes], KinVerdict] = decoder(KinVerdict, "the run and a worker")
decode_pull: Callable[[bytes], Pull] = decoder(Pull, "a worker and the run")
decode_pulled: Callable[[bytes], Pulled] = decoder(Pulled, "the run and a worker")
decode_done: Callable[[bytes], Done] = decoder(Done, "a worker and the run")
decode_accepted: Callable[[bytes], Accepted] = decoder(Accepted, "the run and a worker")
decode_observe: Callable[[bytes], Observe] = decoder(Observe, "a worker and the run")
decode_observed: Callable[[bytes], Observed] = decoder(Observed, "the run and a worker")
decode_dropped: Callable[[bytes], Dropped] = decoder(Dropped, "a worker and the run")
decode_whole: Callable[[bytes], WholeVersion] = decoder(WholeVersion, "a worker and the run")
decode_spans: Callable[[bytes], Spans] = decoder(Spans, "a worker and the run")
decode_state: Callable[[bytes], GenerateState] = decoder(GenerateState, "the run and a worker")
