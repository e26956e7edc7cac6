"""From a configuration to everything a run needs, checked before anything is written or sampled.

Cheap checks come first, so that a typing mistake in a column name is told before gigabytes are loaded. Whatever is
wrong is raised as an InputError; nothing on disk has been touched by then.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import msgspec

from troupe import linux_cpu
from troupe.budget import Plan, Workload, plan_memory
from troupe.checkpoint import Checkpoint, RunState, list_checkpoints, load_newest
from troupe.config import RUN_TOML, RunConfig, check_config, load_config
from troupe.dataset import PromptDataset
from troupe.errors import CheckpointError, ConfigError, DatasetError, OutputError, RewardError
from troupe.grpo import adamw_init
from troupe.policy import DTYPES, Policy, Weights, expected_shapes, is_on_cpu, load_policy, resolve_model
from troupe.rewards import Reward, RewardManager
from troupe.schedule import PromptSchedule, count_steps, tokenize_prompts

_NUMBERED = re.compile(r"(.+)-(\d{3,})")


class EvalSet(msgspec.Struct, frozen=True, kw_only=True):
    """Held-out prompts with their token ids."""

    dataset: PromptDataset
    prompt_ids: Sequence[tuple[int, ...]]


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """A run that can begin."""

    config: RunConfig
    """Resolved: absolute paths, and the sizes that the model allows."""
    folder: Path
    policy: Policy
    """The policy that the run starts from, or goes on from after a resume."""
    source: Path
    """The model folder that tokenizer files are copied from."""
    reference: Weights | None
    """Weights of the reference policy where learner.beta ≠ 0."""
    rewards: RewardManager
    schedule: PromptSchedule
    total_steps: int
    fingerprint: str
    evaluation: EvalSet | None
    checkpoint: Checkpoint | None
    """Where to go on from; None starts at the beginning."""
    optimizer_state: dict[str, mx.array]
    """Fresh, or the checkpoint's; evaluated."""
    memory: Plan
    """What the run takes, and what was chosen for it."""
    notices: tuple[str, ...]
    """What the user should know, one line each."""

    def without_arrays(self) -> Prepared:
        """What is to be known once a run goes on by itself, which keeps the arrays that it needs."""
        checkpoint = self.checkpoint
        if checkpoint is not None:
            checkpoint = msgspec.structs.replace(checkpoint, weights={}, optimizer_state={}, behind={}, reference=None)
        policy = Policy(self.policy.config, {}, self.policy.path)
        return msgspec.structs.replace(self, policy=policy, reference=None, checkpoint=checkpoint, optimizer_state={})

    @property
    def first_step(self) -> int:
        """Learner batches that are done already."""
        return 0 if self.checkpoint is None else self.checkpoint.state.version


def prepare(config: RunConfig, rewards: Sequence[Reward] = (), *, resume: bool = False) -> Prepared:
    """Load and check everything. `rewards` are used beside those that the config names. Raises InputError."""
    config = check_config(config)
    model_path, data_path = config.model.path, config.data.path
    notices = linux_cpu.advice() if mx.default_device() == mx.Device(mx.cpu) else []
    if model_path is None:
        raise ConfigError("model.path is missing: name a Hugging Face folder of a Qwen3 model (-m MODEL_DIR)")
    if data_path is None:
        raise ConfigError("data.path is missing: name a .json or .jsonl file of prompts (-d PROMPTS.json)")
    folder = run_folder(config, resume=resume)
    if resume:
        _check_resumable(config, folder)
    dataset = PromptDataset.from_json(data_path, config.data.chat)
    held_out = PromptDataset.from_json(config.data.eval_path, config.data.chat) if config.data.eval_path else None
    manager, config = _rewards(config, rewards, dataset, held_out)
    source = resolve_model(model_path)
    policy = load_policy(source, config.model.dtype)
    positions = policy.config.max_position_embeddings
    limit = min(config.data.max_prompt_tokens or positions, positions - 1)
    prompt_ids = tokenize_prompts(dataset, policy.tokenizer, config.data, max_tokens=limit)
    evaluation = None
    if held_out is not None:
        held_out_ids = tokenize_prompts(held_out, policy.tokenizer, config.data, max_tokens=limit)
        evaluation = EvalSet(dataset=held_out, prompt_ids=held_out_ids)
    config = _placed(config)
    longest = max(map(len, prompt_ids))
    config, more = _fit_completions(config, positions, longest_prompt=longest)
    memory = plan_memory(
        config,
        Workload(policy=policy.config, dtype=DTYPES[policy.dtype], longest_prompt=longest, on_cpu=is_on_cpu()),
    )
    config = memory.config
    total_steps = count_steps(
        len(dataset),
        batch_size=config.learner.batch_size,
        epochs=config.learner.epochs,
        max_steps=config.learner.max_steps,
    )
    checkpoint, resumed = _newest_checkpoint(folder, dataset, config, policy) if resume else (None, [])
    optimizer_state = adamw_init(policy.weights) if checkpoint is None else checkpoint.optimizer_state
    mx.eval(list(optimizer_state.values()))
    return Prepared(
        config=msgspec.structs.replace(config, output=str(folder)),
        folder=folder,
        policy=policy if checkpoint is None else Policy(policy.config, checkpoint.weights, policy.path),
        source=source,
        reference=_reference(config, policy, checkpoint),
        rewards=manager,
        schedule=PromptSchedule(
            dataset,
            prompt_ids,
            batch_size=config.learner.batch_size,
            seed=config.seed,
            shuffle=config.data.shuffle,
        ),
        total_steps=total_steps,
        fingerprint=dataset.fingerprint,
        evaluation=evaluation,
        checkpoint=checkpoint,
        optimizer_state=optimizer_state,
        memory=memory,
        notices=(*notices, *more, *memory.notices, *resumed),
    )


def _placed(config: RunConfig) -> RunConfig:
    """Decide where the generator runs and how many threads OpenBLAS has, so that the resolved config says it."""
    schedule, most = config.schedule, config.learner.batch_size
    if schedule.generator_processes > most:
        raise ConfigError(
            f"schedule.generator_processes is {schedule.generator_processes}, but a step has only {most} prompts "
            f"(learner.batch_size) to deal to them; give at most {most}"
        )
    where = schedule.generator
    if where == "auto":
        beside = is_on_cpu() and schedule.max_staleness > 0
        where = "process" if beside or schedule.generator_processes > 1 else "thread"
    threads = schedule.blas_threads
    if threads is None and is_on_cpu() and (all_threads := linux_cpu.blas_threads()):
        processes = schedule.generator_processes if where == "process" else 0
        threads = max(1, all_threads // (1 + processes))
    placed = msgspec.structs.replace(schedule, generator=where, blas_threads=threads)
    return msgspec.structs.replace(config, schedule=placed)


def _reference(config: RunConfig, policy: Policy, checkpoint: Checkpoint | None) -> Weights | None:
    """The model that the run begins with; the checkpoint's where the reference follows the policy."""
    if not config.learner.beta:
        return None
    if config.learner.sync_ref_model and checkpoint is not None and checkpoint.reference is not None:
        return checkpoint.reference
    return policy.weights


def run_folder(config: RunConfig, *, resume: bool) -> Path:
    """The folder a run writes to; OutputError where it may not be used. Creates nothing.

    Without `output`: `runs/NAME-NNN`, NAME from the dataset's file, NNN the first number that is free.
    """
    if config.output is None:
        if resume:
            raise OutputError("nothing to resume: name the run folder to go on with (-o OUT_DIR)")
        name = Path(config.data.path or "run").stem
        runs = Path.cwd() / "runs"
        taken = [_NUMBERED.fullmatch(path.name) for path in runs.glob(f"{name}-*")]
        numbers = [int(match[2]) for match in taken if match and match[1] == name]
        return runs / f"{name}-{max(numbers, default=0) + 1:03d}"
    folder = Path(config.output).expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: this is a file; give a folder that does not exist yet, or an empty one")
    if not folder.is_dir() or not any(folder.iterdir()):
        return folder
    if resume and not (folder / RUN_TOML).is_file():
        raise OutputError(f"{folder}: there is no {RUN_TOML} among these files, so this is no run to go on with")
    if not resume:
        raise OutputError(
            f"{folder}: the output folder is not empty; add --resume to go on with the run in it, or give "
            "another folder"
        )
    return folder


def _check_resumable(config: RunConfig, folder: Path) -> None:
    """CheckpointError for the schedule of which a checkpoint does not hold where the run stood."""
    modes = {"schedule.mode": config.schedule.mode}
    if (folder / RUN_TOML).is_file():
        modes[str(folder / RUN_TOML)] = load_config(folder / RUN_TOML).schedule.mode
    where = next((where for where, mode in modes.items() if mode == "free"), None)
    if where is not None and (found := list_checkpoints(folder)):
        raise CheckpointError(
            f"{folder}: the run cannot be resumed, because its schedule is 'free' ({where}), and its checkpoints do "
            "not hold which groups were trained out of order; start a new run from the policy in "
            f"{found[0]} (model.path), in another folder"
        )


def _rewards(
    config: RunConfig, given: Sequence[Reward], dataset: PromptDataset, held_out: PromptDataset | None
) -> tuple[RewardManager, RunConfig]:
    functions = config.rewards.functions
    if not functions and not given:
        if "answer" not in dataset.columns:
            raise RewardError(
                f"{dataset.source}: the rows have no `answer` column and no reward is named; "
                "name one with --reward (length, diversity, exact_answer, think_format, repetition_penalty, "
                "soft_overlong:LONGEST:CACHE, format:REGEX or FILE.py:FUNC)"
            )
        functions = ("exact_answer",)
        config = msgspec.structs.replace(config, rewards=msgspec.structs.replace(config.rewards, functions=functions))
    manager = RewardManager([*functions, *given], config=config.rewards)
    manager.check_columns(dataset.columns)
    if held_out is not None and (missing := dataset.columns - held_out.columns):
        raise DatasetError(
            f"{held_out.source}: the held-out rows lack the column {', '.join(sorted(missing))} of the training rows"
        )
    return manager, config


def _fit_completions(config: RunConfig, positions: int, *, longest_prompt: int) -> tuple[RunConfig, list[str]]:
    asked = config.generation.max_completion_length
    room = positions - longest_prompt
    if asked <= room:
        return config, []
    generation = msgspec.structs.replace(config.generation, max_completion_length=room)
    notice = (
        f"generation.max_completion_length lowered from {asked} to {room}: the model has {positions} positions and the "
        f"longest prompt takes {longest_prompt}"
    )
    return msgspec.structs.replace(config, generation=generation), [notice]


def _newest_checkpoint(
    folder: Path, dataset: PromptDataset, config: RunConfig, policy: Policy
) -> tuple[Checkpoint | None, list[str]]:
    notices = []
    for found in load_newest(folder):
        if isinstance(found, CheckpointError):
            notices.append(f"{found}; trying the one before")
            continue
        _check_same_run(found.state, dataset, config, folder)
        _check_same_policy(found, policy, config, folder)
        held = msgspec.structs.replace(
            found,
            weights=_held_like(policy.weights, found.weights),
            behind={version: _held_like(policy.weights, weights) for version, weights in found.behind.items()},
            reference=None if found.reference is None else _held_like(policy.weights, found.reference),
        )
        return held, [*notices, f"going on after step {found.state.version}"]
    return None, [*notices, f"{folder}: no whole checkpoint yet, so the run starts from the beginning"]


def _check_same_run(state: RunState, dataset: PromptDataset, config: RunConfig, folder: Path) -> None:
    if state.dataset != dataset.fingerprint:
        raise CheckpointError(
            f"{folder}: the run was made with other prompts than those now in {dataset.source}; "
            "restore the dataset, or start a new run in another folder"
        )
    if state.seed != config.seed:
        raise CheckpointError(f"{folder}: the run has seed {state.seed}, not {config.seed}; leave --seed out to resume")


def _check_same_policy(found: Checkpoint, policy: Policy, config: RunConfig, folder: Path) -> None:
    if expected_shapes(found.config) != expected_shapes(policy.config):
        raise CheckpointError(
            f"{folder}: the run trains a model of other shapes than the one in {policy.path}; "
            "resume with the model it began with (model.path), or start a new run in another folder"
        )
    step, staleness = found.state.version, config.schedule.max_staleness
    if missing := set(range(max(0, step - staleness), step)) - found.behind.keys():
        raise CheckpointError(
            f"{folder}: schedule.max_staleness is {staleness}, so step {step} needs policy version "
            f"{', '.join(map(str, sorted(missing)))}, which the checkpoint does not hold; resume with the "
            "max_staleness that the run began with"
        )


def _held_like(held: Weights, stored: Weights) -> Weights:
    """Weights in the types that the run holds its policy in, which a checkpoint file need not give back."""
    weights = {name: array.astype(held[name].dtype) for name, array in stored.items()}
    mx.eval(list(weights.values()))
    return weights
