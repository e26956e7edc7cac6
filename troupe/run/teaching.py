"""The teacher of a run: whether it can teach this policy, and what it takes."""

import msgspec

from troupe.actors.teacher.forward import TeacherForward
from troupe.actors.teacher.settings import TeacherConfig
from troupe.errors import ConfigError, ModelError
from troupe.policy import DTYPES, Policy
from troupe.policy.load import load_teacher
from troupe.run.config import RunConfig
from troupe.run.workload import TeacherWork

_OF_WHOLE_COMPLETIONS = ("rloo", "gmpo")
"""Loss types with one ratio for a completion, to which advantages of tokens would say nothing of their own."""


class LoadedTeacher(msgspec.Struct, frozen=True, kw_only=True):
    """A teacher that is ready to be asked."""

    policy: Policy
    fingerprint: str
    shares_base: bool
    """Whether its network is the base of the adapter that is trained."""

    def forward(self, temperature: float) -> TeacherForward:
        """What computes its log-probs."""
        policy = self.policy
        return TeacherForward(policy.config, policy.weights, policy.base, temperature)

    @property
    def work(self) -> TeacherWork:
        """What it takes."""
        policy = self.policy
        return TeacherWork(policy.config, DTYPES[policy.dtype], policy.base.adapter, shares_base=self.shares_base)


def check_teaching(config: RunConfig) -> None:
    """ConfigError where nothing could be learned from a teacher as the config has it."""
    teacher, learner = config.teacher, config.learner
    if teacher == TeacherConfig():
        return
    if not teacher.is_on:
        raise ConfigError(
            "teacher.path is missing, and other keys of [teacher] are set; name the teacher, or none of them"
        )
    if config.task != "grpo":
        raise ConfigError(
            f'teacher.path is set, but task is "{config.task}", and a teacher is asked about what the policy samples; '
            "leave it out"
        )
    said = None
    if learner.loss_type in _OF_WHOLE_COMPLETIONS:
        said = f'learner.loss_type is "{learner.loss_type}"'
    elif learner.importance_sampling_level == "sequence":
        said = 'learner.importance_sampling_level is "sequence"'
    if said is not None:
        raise ConfigError(
            f"{said}, which weighs whole completions, but a teacher judges each token; take another, or leave "
            "teacher.path out"
        )


def teacher_of(config: TeacherConfig, student: Policy) -> LoadedTeacher | None:
    """Read the teacher; None where there is none. ModelError for one that cannot be read, ConfigError for one to which
    the policy's tokens mean something else."""
    if config.path is None:
        return None
    try:
        policy, fingerprint = load_teacher(config.path, config.dtype, student)
        difference = student.tokenizer.differs_from(policy.tokenizer)
    except ModelError as error:
        raise ModelError(f"teacher.path: {error}") from None
    if difference:
        raise ConfigError(
            f"teacher.path is {config.path!r}, whose tokenizer is not that of {student.path}: {difference}; a teacher "
            "is asked about the policy's own tokens, so take one of the same family"
        )
    shares = student.base.is_whole and policy.base.weights is student.base.weights
    return LoadedTeacher(policy=policy, fingerprint=fingerprint, shares_base=shares)
