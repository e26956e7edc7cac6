"""The `[evaluation]` section: which sets of rows are evaluated, when, and when a run ends that gets no better."""

from typing import Annotated

import msgspec

HELD_OUT = "held_out"
"""The set of `data.eval_path`."""


class EvaluationSet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[[evaluation.sets]]`."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """In metrics: `eval/NAME/…`."""
    path: Annotated[str, msgspec.Meta(min_length=1)]
    """Rows, as `data.path` takes them, and read as `[data]` says."""
    rewards: tuple[str, ...] = ()
    """As `rewards.functions`; empty: those of the run."""
    num_samples: Annotated[int, msgspec.Meta(ge=1)] = 1
    """Completions a row: K of `avg@K`, and the most of `pass@K`."""
    temperature: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """0 is greedy; more than one sample wants a temperature."""
    max_completion_length: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Tokens; None: `generation.max_completion_length`."""
    limit: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Only so many rows, the first ones; None: all."""
    passes_from: float = 1.0
    """A completion with at least this score passes, for `pass@K`."""


class EvaluationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[evaluation]` section."""

    every: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Evaluate after each so many steps; 0: not while training goes on."""
    at_start: bool = True
    """Evaluate the policy as it was before step 1."""
    at_end: bool = True
    """Evaluate the policy that the run ends with."""
    sets: tuple[EvaluationSet, ...] = ()
    """Besides the set `held_out`, which `data.eval_path` makes: greedy, one sample a row, with the run's rewards."""
    metric: str | None = None
    """What patience looks at, such as `eval/NAME/avg@4`; None: `checkpoint.metric_for_best` where that is one of an
    evaluation, else the first set's `avg@K`. More is better unless `checkpoint.greater_is_better` is false."""
    patience: Annotated[int, msgspec.Meta(ge=0)] = 0
    """End the run when so many evaluations in a row were no better than the best before them; 0: never."""
    min_delta: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """By how much one has to be better to count."""
