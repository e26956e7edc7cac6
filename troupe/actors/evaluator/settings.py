"""The `[evaluation]` section: which sets of rows are evaluated, when, and when a run ends that gets no better."""

from collections.abc import Sequence
from typing import Annotated

import msgspec

from troupe.messages.evaluations import HELD_OUT
from troupe.policy import GenerationConfig
from troupe.policy.decode.sampling import GREEDY_BELOW
from troupe.rewards.estimates import powers_up_to, reward_figure


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

    def __post_init__(self) -> None:
        if self.num_samples > 1 and self.temperature < GREEDY_BELOW:
            raise ValueError(
                f"evaluation.sets: {self.name} has num_samples {self.num_samples}, but greedy completions of a row are "
                "all alike; give it a temperature (1.0 is usual), or one sample"
            )

    def generation(self, config: GenerationConfig) -> GenerationConfig:
        """What its rows are completed with, where the run has `config`."""
        return msgspec.structs.replace(
            config,
            num_generations=self.num_samples,
            temperature=self.temperature,
            max_completion_length=self.max_completion_length or config.max_completion_length,
        )

    def metrics(self, rewards: Sequence[str], *, answers: bool) -> list[str]:
        """Names of the figures that it may have, with rewards of these names. `answers`: whether rows have any."""
        K = self.num_samples
        figures = [f"avg@{K}", *(f"pass@{k}" for k in powers_up_to(K))]
        figures += ["accuracy", *[f"maj@{K}"] * (K > 1)] if answers else []
        return [
            f"eval/{self.name}/{figure}"
            for figure in (*figures, *map(reward_figure, rewards), "length", "clipped", "missing")
        ]


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

    def __post_init__(self) -> None:
        names = [each.name for each in self.sets]
        if twice := [name for name in names if names.count(name) > 1 or name == HELD_OUT]:
            of = f"; {HELD_OUT} is that of data.eval_path" if twice[0] == HELD_OUT else ""
            raise ValueError(f"evaluation.sets: the name {twice[0]} is taken{of}; give each set one of its own")
        if self.patience and not self.every:
            raise ValueError(
                f"evaluation.patience is {self.patience}, but evaluation.every is 0, so nothing would be looked at "
                "while training goes on; give evaluation.every"
            )

    def is_due(self, version: int) -> bool:
        """Whether a version is to be evaluated, the last one of a run apart."""
        return self.at_start if version == 0 else self.every > 0 and version % self.every == 0
