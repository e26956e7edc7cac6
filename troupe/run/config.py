"""The whole configuration of a run: one frozen struct a section, read from TOML, checked before any work starts.

Each section's struct lives with the room that it configures; here they are joined, read, and checked.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_type_hints

import msgspec
import tomli_w

from troupe.actors.evaluator.settings import EvaluationConfig
from troupe.actors.schedule import ScheduleConfig
from troupe.actors.supervised import WarmStartConfig
from troupe.actors.teacher.settings import TeacherConfig
from troupe.checkpoint import CheckpointConfig
from troupe.cluster.settings import ClusterConfig
from troupe.dataset import CurriculumConfig, DataConfig, SftConfig
from troupe.environments.settings import EnvironmentConfig
from troupe.errors import ConfigError
from troupe.grpo import LearnerConfig
from troupe.policy import AdapterConfig, GenerationConfig, ModelConfig
from troupe.policy.decode.sampling import GREEDY_BELOW
from troupe.records.sinks.base import MetricsConfig
from troupe.rewards import RewardsConfig
from troupe.run.aliases import close_to, describe_meaning, foreign_for, ours_for
from troupe.run.anchors import anchor_paths
from troupe.run.daemon_settings import DaemonConfig
from troupe.run.tables import (
    choices_of,
    copied,
    lay_over,
    says,
    table_of,
    value_at,
    without_none,
)
from troupe.runtime.files import read_toml

Task = Literal["grpo", "sft"]
_WHOLE = {"rank", "rank_pattern", "alpha_pattern"}
"""Keys of [adapter] that stand beside each other, at their defaults, only in a config that was written out whole."""


class RunConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that determines a run. Every key has a default and a bound.

    Building one directly checks the relations between keys; types and bounds are checked by `load_config` and again
    by `Supervisor`.
    """

    task: Task = "grpo"
    """What a run does with its rows: sample completions and learn from their rewards, or learn those that the rows have
    (`troupe sft`)."""
    seed: int = 0
    """What every random number of the run is derived from; from 0 to 2⁶³ − 1."""
    output: str | None = None
    """The run folder; None takes the next free `runs/NAME-NNN` in the working directory."""
    memory_limit_gb: float | None = None
    """Most that the run's arrays may take, in 10⁹ bytes; see docs/memory.md. None: on a GPU what MLX says of the
    device, on a CPU no limit."""
    wired_limit_gb: float | None = None
    """Arrays of up to so many 10⁹ bytes stay resident for Apple's GPU, on macOS 15 or newer (MLX's `set_wired_limit`);
    elsewhere it changes nothing, and a note says so. None leaves MLX its own. See docs/memory.md."""
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    sft: SftConfig = SftConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    generation: GenerationConfig = GenerationConfig()
    rewards: RewardsConfig = RewardsConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    learner: LearnerConfig = LearnerConfig()
    teacher: TeacherConfig = TeacherConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    daemon: DaemonConfig = DaemonConfig()
    cluster: ClusterConfig = ClusterConfig()

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; give a number from 0 to 2^63 - 1")
        if self.memory_limit_gb is not None and not 0.0 < self.memory_limit_gb < math.inf:
            raise ValueError(f"memory_limit_gb is {self.memory_limit_gb}, but must be above 0; leave it out for none")
        if self.wired_limit_gb is not None and not 0.0 < self.wired_limit_gb < math.inf:
            raise ValueError(f"wired_limit_gb is {self.wired_limit_gb}, but must be above 0; leave it out for none")
        if self.task == "grpo":
            self._check_sampling()
        elif self.warm_start.path is not None:
            raise ValueError(
                'warm_start.path is given, but task is "sft", so that all steps are supervised; leave one of them out'
            )
        if self.curriculum.enabled and self.task == "sft":
            raise ValueError(
                'curriculum.enabled goes by scores, of which there are none where task is "sft"; leave it out'
            )
        rows = self.learner.batch_size * self.generation.num_generations
        if (self.learner.gradient_accumulation_steps or 1) > rows:
            raise ValueError(
                f"learner.gradient_accumulation_steps is {self.learner.gradient_accumulation_steps}, but a batch has "
                f"{rows} rows (batch_size × num_generations) to split; give at most {rows}"
            )
        wants_correction = (self.schedule.mode, self.schedule.on_stale) == ("free", "correct")
        if wants_correction and not self.learner.vllm_importance_sampling_correction:
            raise ValueError(
                "schedule.on_stale is 'correct', but learner.vllm_importance_sampling_correction is off, so that "
                "nothing would correct for tokens of older weights; turn it on, or take 'drop' or 'requeue'"
            )
        weights, functions = self.rewards.weights, self.rewards.functions
        if weights is not None and len(weights) < len(functions):  # rewards given in Python may ask for more of them
            raise ValueError(
                f"rewards.weights has {len(weights)} numbers for {len(functions)} functions; give one weight a function"
            )

    def _check_sampling(self) -> None:
        if self.generation.temperature < GREEDY_BELOW:
            raise ValueError(
                f"generation.temperature is {self.generation.temperature:g}, but greedy completions of a prompt are "
                "all alike and teach nothing; give a temperature above 0 (1.0 is usual, and below "
                f"{GREEDY_BELOW:g} the likeliest token is taken, too)"
            )
        if self.generation.num_generations < 2:
            raise ValueError(
                f"generation.num_generations is {self.generation.num_generations}, but advantages compare the "
                "completions of a prompt with each other; give at least 2"
            )
        if self.rewards.min_scored > self.generation.num_generations:
            raise ValueError(
                f"rewards.min_scored is {self.rewards.min_scored}, but a group has only "
                f"{self.generation.num_generations} completions (generation.num_generations); lower it"
            )


def load_config(path: str | Path | None = None, overrides: Sequence[str | Mapping[str, Any]] = ()) -> RunConfig:
    """Read a TOML file (or start from the defaults) and apply overrides in order.

    An override is a nested mapping or a text `section.key=value`, whose value is read as TOML and, where that fails,
    as plain text. Relative input paths (model, data, reward files) count from the folder of the file that names them,
    those of overrides from the working directory; `output` always counts from the working directory.
    Raises ConfigError naming the file and key.
    """
    layers = [
        Layer("the configuration", table_of(override) if isinstance(override, str) else copied(override))
        for override in overrides
    ]
    return layered(path, layers)


class Layer(NamedTuple):
    """A part of a config, and who said it."""

    source: str
    """What an error about one of its keys begins with: a file, or a flag."""
    table: dict[str, Any]


def settings_layers(settings: Sequence[str]) -> list[Layer]:
    """What several `--set section.key=value` say."""
    return [Layer(f"--set {setting}", table_of(setting)) for setting in settings]


def layered(path: str | Path | None, layers: Sequence[Layer]) -> RunConfig:
    """A TOML file, or the defaults, with layers over it; the last that says a key counts. As `load_config`, but an
    error names the layer that said the key."""
    table: dict[str, Any] = {}
    base = "the configuration"
    if path is not None:
        base = str(path)
        table = read_toml(Path(path))
        anchor_paths(table, Path(path).parent)
    for layer in layers:
        change = copied(layer.table)
        anchor_paths(change, Path.cwd())
        lay_over(table, change)
    sources = _Sources(base, tuple(layers))
    config = _convert(table, sources)
    said = without_none(table.get("adapter", {}))
    if not said.keys() >= _WHOLE:
        try:
            config.adapter.refuse_idle(said)
        except ValueError as error:
            raise ConfigError(f"{sources.of_relation(str(error), 'adapter')}: {error}") from None
    return config


def check_config(config: RunConfig) -> RunConfig:
    """Check types and bounds of a config that was built in Python; ConfigError names the key.

    Where all steps are supervised, a row has one completion, its own. Relative input paths are made absolute:
    they count from the working directory.
    """
    table = config_table(config)
    anchor_paths(table, Path.cwd())
    if config.task == "sft":
        lay_over(table, {"generation": {"num_generations": 1}})
    return _convert(table, _Sources("the configuration"))


def read_overrides(path: str | Path) -> dict[str, Any]:
    """What a TOML file says, and no more: a table to be laid over another config, as an override is.

    Relative input paths are made absolute. What it says is checked with what it is laid over, of which its keys may ask
    for others; ConfigError where it is no TOML.
    """
    table = read_toml(Path(path))
    anchor_paths(table, Path(path).parent)
    return table


def with_value(config: RunConfig, key: str, value: Any, source: str) -> RunConfig:
    """The config with another value for one key; ConfigError, which begins with `source`, where it is refused."""
    table = config_table(config)
    change: Any = value
    for part in reversed(key.split(".")):
        change = {part: change}
    lay_over(table, change)
    return _convert(table, _Sources(source))


def config_table(config: RunConfig) -> dict[str, Any]:
    """The config as nested dicts, without the keys that are None (TOML has no null)."""
    table: dict[str, Any] = without_none(msgspec.to_builtins(config, str_keys=True))
    return table


def write_config(config: RunConfig, path: Path) -> None:
    """Write the whole config as TOML; `load_config` reads it back to an equal config, if its paths are absolute."""
    path.write_text(tomli_w.dumps(config_table(config)), encoding="utf-8")


class _Sources(NamedTuple):
    """Who said what of a config."""

    base: str
    layers: Sequence[Layer] = ()

    def of(self, *keys: str) -> str:
        """Who said the first of these keys that a layer says."""
        for key in keys:
            for layer in self.layers[::-1]:
                if says(layer.table, key):
                    return layer.source
        return self.base

    def of_relation(self, message: str, section: str) -> str:
        """Who said a key that a message about several of them is about, the first of them that is not in the file."""
        known = known_keys()
        named = [word for word in re.findall(r"[\w.]*\w", message) if word in known or f"{section}.{word}" in known]
        whole = [word if word in known else f"{section}.{word}" for word in named]
        sections = {key.rpartition(".")[0] for key in whole}
        words = re.findall(r"\w+", message)
        leaves = [key for word in words for key in known if key.rpartition(".")[2] == word]
        return self.of(*whole, *(key for key in leaves if key.rpartition(".")[0] in sections))


def known_keys() -> list[str]:
    """Every key of a run's config, as `section.key`."""
    return list(_keys(RunConfig, ""))


def _keys(struct: type[msgspec.Struct], prefix: str) -> Iterator[str]:
    for name, kind in get_type_hints(struct).items():
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            yield from _keys(kind, f"{prefix}{name}.")
        elif name in struct.__struct_fields__:
            yield f"{prefix}{name}"


def _convert(table: dict[str, Any], sources: _Sources) -> RunConfig:
    _refuse_unknown_keys(table, RunConfig, sources, "")
    _refuse_nonfinite(table, sources, "")
    try:
        return msgspec.convert(table, RunConfig, str_keys=True)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$")
        key = where.rstrip("`").lstrip(".")
        if not key:
            raise ConfigError(f"{sources.of_relation(message, '')}: {message}") from None
        value, message = value_at(table, key), message.replace(" | null", "")
        message = message[:1].lower() + message[1:].replace("`", "").replace("object", "a table")
        if isinstance(value, dict):  # too long to show
            is_section = key in RunConfig.__struct_fields__
            source = sources.of_relation(message, key) if is_section else sources.of(key)
            raise ConfigError(f"{source}: {key}: {message}") from None
        if choices := choices_of(RunConfig, key):
            message = f"give one of {', '.join(map(repr, choices))}"
        elif message.startswith("expected a table") and (meaning := ours_for(key, known_keys())) is not None:
            message += f"; {describe_meaning(meaning)}"
        raise ConfigError(f"{sources.of(key)}: {key} is {value!r}: {message}") from None


def _refuse_nonfinite(value: Any, sources: _Sources, path: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_nonfinite(item, sources, f"{path}.{key}" if path else key)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _refuse_nonfinite(item, sources, f"{path}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{sources.of(path)}: {path} is {value}; give a finite number")


def _refuse_unknown_keys(table: dict[str, Any], struct: type[msgspec.Struct], sources: _Sources, path: str) -> None:
    known = get_type_hints(struct)
    for key, value in table.items():
        if key not in known:
            source, hint = sources.of(f"{path}{key}"), _hint(path, key, value, known)
            raise ConfigError(f"{source}: unknown key {path}{key}; {hint}")
        section = known[key]
        if isinstance(value, dict) and isinstance(section, type) and issubclass(section, msgspec.Struct):
            _refuse_unknown_keys(value, section, sources, f"{path}{key}.")


def _hint(path: str, key: str, value: Any, known: Mapping[str, Any]) -> str:
    """What may have been meant by a key that does not exist."""
    if isinstance(value, dict):  # a section
        if (close := close_to(key, known)) is not None:
            return f"did you mean {path}{close}?"
        for name in value:
            if (meaning := ours_for(str(name), known_keys())) is not None:
                return f"of what stands there, {name}: {describe_meaning(meaning)}"
    elif (meaning := ours_for(key, known_keys())) is not None:
        return describe_meaning(meaning)
    elif (close := close_to(key, known)) is not None:
        return f"did you mean {path}{close}?"
    elif (foreign := foreign_for(key)) is not None:
        return f"did you mean {foreign[0]}? {describe_meaning(foreign[1])}"
    return f"known keys here: {', '.join(sorted(known))}"
