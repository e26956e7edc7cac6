"""The teachers of a run: whether they can teach this policy, and what they take."""

import hashlib
from collections.abc import Collection, Sequence

import msgspec

from troupe.actors.teacher.forward import TeacherForward, Teachers, named_in
from troupe.actors.teacher.settings import TeacherConfig
from troupe.dataset import PromptDataset
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
    """Whether its network is the base of the adapter that is trained, or of a teacher before it."""

    def forward(self, temperature: float) -> TeacherForward:
        """What computes its log-probs."""
        policy = self.policy
        return TeacherForward(policy.config, policy.weights, policy.base, temperature)

    @property
    def work(self) -> TeacherWork:
        """What it takes."""
        policy = self.policy
        return TeacherWork(policy.config, DTYPES[policy.dtype], policy.base.adapter, shares_base=self.shares_base)


class LoadedTeachers(msgspec.Struct, frozen=True, kw_only=True):
    """All of a run."""

    by_name: dict[str, LoadedTeacher]
    """"": of rows that name none."""
    column: str

    @property
    def fingerprint(self) -> str:
        """Of one alone its own."""
        if self.by_name.keys() == {""}:
            return self.by_name[""].fingerprint
        told = "".join(f"{name}\0{each.fingerprint}\0" for name, each in sorted(self.by_name.items()))
        return hashlib.sha256(told.encode()).hexdigest()

    def forward(self, temperature: float) -> Teachers:
        """What computes their log-probs."""
        return Teachers({name: each.forward(temperature) for name, each in self.by_name.items()}, self.column)

    @property
    def works(self) -> tuple[TeacherWork, ...]:
        """What they take."""
        return tuple(each.work for each in self.by_name.values())


def check_teaching(config: RunConfig) -> None:
    """ConfigError where nothing could be learned from a teacher as the config has it."""
    teacher, learner = config.teacher, config.learner
    if teacher == TeacherConfig():
        return
    if not teacher.is_on:
        raise ConfigError(
            "teacher.path is missing, and other keys of [teacher] are set; name the teacher, or let the policy teach "
            "itself by teacher.model_kind, or set none of them"
        )
    if config.task != "grpo":
        raise ConfigError(
            f'a teacher is named, but task is "{config.task}", and a teacher is asked about what the policy samples; '
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
            "the teacher out"
        )


def teachers_of(config: TeacherConfig, student: Policy, rows: PromptDataset) -> LoadedTeachers | None:
    """Read the teachers; None where there is none. ModelError for one that cannot be read, ConfigError for one to which
    the policy's tokens mean something else, and for rows that name nobody who is there."""
    if not config.has_actor:
        return None
    paths = {"": config.path} if config.path is not None else {}
    paths |= {model.name: model.path for model in config.models}
    if config.models:
        _check_rows(config, paths, rows)
    loaded: dict[str, LoadedTeacher] = {}
    for name, path in paths.items():
        loaded[name] = _load(name, path, config, student, [each.policy for each in loaded.values()])
    return LoadedTeachers(by_name=loaded, column=config.column)


def _check_rows(config: TeacherConfig, there: Collection[str], rows: PromptDataset) -> None:
    if config.column not in rows.columns:
        raise ConfigError(
            f"{rows.source}: has no column {config.column!r} in which rows would name one of teacher.models; add it, "
            "or give another teacher.column"
        )
    for number in range(len(rows)):
        name = named_in(rows[number].columns, config.column)
        if name not in there:
            says = f"names the teacher {name!r}" if name else "names no teacher, and there is no teacher.path for it"
            names = ", ".join(repr(model.name) for model in config.models)
            raise ConfigError(
                f"{rows.source}: row {number} {says} (column {config.column!r}); teacher.models has {names}"
            )


def _load(name: str, path: str, config: TeacherConfig, student: Policy, others: Sequence[Policy]) -> LoadedTeacher:
    key = f"teacher.models: {name}" if name else "teacher.path"
    try:
        policy, fingerprint = load_teacher(path, config.dtype, student, others)
        difference = student.tokenizer.differs_from(policy.tokenizer)
    except ModelError as error:
        raise ModelError(f"{key}: {error}") from None
    if difference:
        raise ConfigError(
            f"{key} is {path!r}, whose tokenizer is not that of {student.path}: {difference}; a teacher is asked about "
            "the policy's own tokens, so take one of the same family"
        )
    shares = any(known.base.is_whole and policy.base.weights is known.base.weights for known in (student, *others))
    return LoadedTeacher(policy=policy, fingerprint=fingerprint, shares_base=shares)
