"""The section `[teacher]`: who teaches, and what its word counts."""

from typing import Annotated, Literal

import msgspec

from troupe.grpo.config import NonNegative


class TeacherModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[[teacher.models]]`."""

    name: Annotated[str, msgspec.Meta(min_length=1)]
    """By which rows name it."""
    path: Annotated[str, msgspec.Meta(min_length=1)]
    """As `teacher.path`."""


class TeacherConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """On-policy distillation: besides by its reward a completion is judged token by token, by how likely a teacher
    finds it; see `troupe.grpo.distillation`."""

    path: str | None = None
    """A model folder or hub id whose tokenizer is the policy's, or the folder of an adapter. None: there is no
    teacher."""
    models: tuple[TeacherModel, ...] = ()
    """Several teachers, each for the rows that name it. Rows that name none are for `path`."""
    column: str = "teacher"
    """Column in which rows name one of `models`."""
    coef: NonNegative = 1.0
    """What a token's log π_teacher − log π counts in its advantage."""
    reward_coef: NonNegative = 1.0
    """What the advantage of the rewards counts beside it. 0: the teacher alone is learned from; rewards are measured,
    and none need be named."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type to hold the teacher's weights in; None: as stored, but float32 on a CPU."""

    @property
    def is_on(self) -> bool:
        """Whether there is a teacher."""
        return self.path is not None or bool(self.models)

    @property
    def is_alone(self) -> bool:
        """Whether nothing else is learned from."""
        return self.is_on and self.reward_coef == 0.0

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"teacher.models has the name {twice[0]!r} twice; give each another")
        if self.is_on and self.coef == 0.0 and self.reward_coef == 0.0:
            raise ValueError(
                "coef and reward_coef are both 0, so that nothing is learned from; give one of them, or leave "
                "the teacher out"
            )
