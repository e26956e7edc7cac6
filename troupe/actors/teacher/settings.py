"""The section `[teacher]`: who teaches, and what its word counts."""

from typing import Annotated, Literal

import msgspec

from troupe.grpo.config import Fraction, NonNegative

PROMPT, PRIVILEGED_CONTEXT = "{prompt}", "{privileged_context}"
"""What `TeacherConfig.prompt_template` has in it."""


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
    teacher, unless another key names one."""
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
    model_kind: Literal["base", "ema", "live"] | None = None
    """Let the policy teach itself, by what it would say if it saw more than the prompt (SDFT, Shenfeld et al. 2026,
    arXiv 2601.19897): with the weights that the run begins with, a moving average of its own, or those of now. None: it
    does not."""
    update_rate: Fraction = 0.05
    """What the newest weights count in the moving average of "ema"."""
    sync_steps: Annotated[int, msgspec.Meta(ge=1)] = 1
    """Updates of the policy from one of that average to the next."""
    privileged_context_column: Annotated[str, msgspec.Meta(min_length=1)] = "privileged_context"
    """Column of what the policy sees as its own teacher alone, such as a demonstration."""
    prompt_template: str = f"{PROMPT}\n\n{PRIVILEGED_CONTEXT}"
    """The prompt of a policy that teaches itself; of a conversation its last message."""

    @property
    def is_on(self) -> bool:
        """Whether there is a teacher."""
        return self.has_actor or self.model_kind is not None

    @property
    def has_actor(self) -> bool:
        """Whether other models teach, who are asked as groups come; a policy that teaches itself is asked by the
        learner."""
        return self.path is not None or bool(self.models)

    @property
    def is_alone(self) -> bool:
        """Whether nothing else is learned from."""
        return self.is_on and self.reward_coef == 0.0

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"teacher.models has the name {twice[0]!r} twice; give each another")
        if self.has_actor and self.model_kind is not None:
            raise ValueError(
                f"model_kind is {self.model_kind!r}, so that the policy teaches itself, and another teacher is named; "
                "leave one of them out"
            )
        if self.dtype is not None and self.model_kind is not None:
            raise ValueError(
                f"dtype is {self.dtype!r}, but the policy teaches itself (model_kind is {self.model_kind!r}), in its "
                "own type; leave dtype out, or give model.dtype"
            )
        for lacking in (one for one in (PROMPT, PRIVILEGED_CONTEXT) if one not in self.prompt_template):
            raise ValueError(f"prompt_template is {self.prompt_template!r}, which lacks {lacking}; put it in")
        if self.is_on and self.coef == 0.0 and self.reward_coef == 0.0:
            raise ValueError(
                "coef and reward_coef are both 0, so that nothing is learned from; give one of them, or leave "
                "the teacher out"
            )
