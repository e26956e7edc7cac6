"""How much memory a run takes, phase by phase, and what is chosen so that it stays below a limit.

Functions of settings and lengths alone, never of what is free at the moment: the same config makes the same choices,
and the resolved config holds them. Everything is counted for the longest prompt and for completions of full length.
In words: docs/memory.md.
"""

import io
import math
from collections.abc import Mapping
from itertools import product, starmap
from typing import NamedTuple

import mlx.core as mx
import msgspec
from rich.console import Console
from rich.table import Table

from troupe.errors import ConfigError
from troupe.grpo import optimizer_state_bytes, update_bytes
from troupe.grpo.lanes import in_lanes
from troupe.policy import Sampler, decode_memory_bytes, turn_memory_bytes
from troupe.policy.decode.memory import device_ways
from troupe.policy.network.tensors import network_bytes
from troupe.run import teaching_memory as teaching
from troupe.run.config import RunConfig
from troupe.run.learning_memory import (
    BASE,
    gathered_bytes,
    has_histories,
    held_out_phase,
    lanes_bytes,
    learning_bytes,
    with_other_ranks,
)
from troupe.run.workload import Workload
from troupe.runtime.memory import GB, RESERVE, device_limit_gb

_VERSIONS_THERE = "policy versions of the generator"
_ON_THE_WAY = "policy versions on the way"
_CHANGED = "version that changes are told against"
_LAID_OUT = "weights laid out for decoding"

Phases = Mapping[str, Mapping[str, int]]
"""Phase → what it holds → bytes."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The choices made for a run, and the memory that it takes with them."""

    config: RunConfig
    """With every choice in it."""
    limit_gb: float | None
    """For MLX in the training process; None leaves it its own."""
    generator_limit_gb: float | None = None
    """The same in each process of the generator, where it has any."""
    phases: Phases
    notices: tuple[str, ...] = ()
    """What the user should know, one line each."""


class _Choice(NamedTuple):
    """What may be chosen to save memory."""

    prompts: int
    """That are decoded together."""
    streams: int
    """Micro-batches that are differentiated at a time."""
    micro_batches: int
    checkpointing: bool
    overlap: bool
    """Whether learning goes on while a checkpoint is written."""


def plan_memory(config: RunConfig, work: Workload) -> Plan:
    """Choose what `config` leaves open so that the run fits its limit, or else that of the device.

    ConfigError where a run cannot be made to fit the limit that its config names. A limit that only the device
    recommends refuses nothing: the run is tried with the least that it can take, and a notice says so.
    """
    _check_decode_limit(config, work)
    limit_gb = config.memory_limit_gb or device_limit_gb()
    fastest, *others = _choices(config, work)
    if limit_gb is None:
        return Plan(config=_resolved(config, fastest, None), limit_gb=None, phases=_phases(config, work, fastest))
    for choice in (fastest, *others):
        phases = _phases(config, work, choice)
        if peak_bytes(phases) <= _usable_gb(limit_gb) * GB:
            told = (_notice(config, work, choice, phases, limit_gb),)
            room_gb = _decode_room_gb(phases, _usable_gb(limit_gb)) / max(_processes(config, work), 1)
            each_gb = _process_bytes(config, work, phases, room_gb) / GB / (1.0 - RESERVE)
            return Plan(
                config=_resolved(config, choice, room_gb),
                limit_gb=limit_gb - _processes(config, work) * each_gb - phases["generate"].get(_ON_THE_WAY, 0) / GB,
                generator_limit_gb=each_gb if _processes(config, work) else None,
                phases=phases,
                notices=told if config.memory_limit_gb is not None or choice != fastest else (),
            )
    least = min((fastest, *others), key=lambda choice: peak_bytes(_phases(config, work, choice)))
    phases = _phases(config, work, least)
    refusal = _refusal(config, phases, limit_gb)
    if config.memory_limit_gb is not None:
        raise ConfigError(refusal)
    tried = _resolved(config, least, phases["generate"]["decode"] / GB / max(_processes(config, work), 1))
    return Plan(config=tried, limit_gb=None, phases=phases, notices=(f"{refusal}; it is tried all the same",))


def least_bytes(config: RunConfig, work: Workload) -> int:
    """The largest phase of a run with all chosen that saves memory, of what `config` leaves open."""
    return min(peak_bytes(_phases(config, work, choice)) for choice in _choices(config, work))


def peak_bytes(phases: Phases) -> int:
    """The largest phase."""
    return max(sum(items.values()) for items in phases.values())


def describe(phases: Phases) -> str:
    """The phases side by side as lines for a person; small runs in MB."""
    unit, size = ("GB", GB) if peak_bytes(phases) >= GB / 10 else ("MB", 1e6)
    table = Table(box=None, pad_edge=False)
    table.add_column(f"memory at the most, {unit}")
    for phase in phases:
        table.add_column(phase, justify="right")
    for name in dict.fromkeys(name for items in phases.values() for name in items):
        cells = [f"{items[name] / size:.2f}" if name in items else "" for items in phases.values()]
        table.add_row(name, *cells)
    table.add_row("together", *(f"{sum(items.values()) / size:.2f}" for items in phases.values()))
    console = Console(file=io.StringIO(), width=100, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _usable_gb(limit_gb: float) -> float:
    return (1.0 - RESERVE) * limit_gb


def _choices(config: RunConfig, work: Workload) -> list[_Choice]:
    """All that the config leaves open, the fastest first.

    To decode in several waves costs most time, as much as it spares; then to differentiate one micro-batch at a time,
    with all threads of OpenBLAS; then micro-batches, whose gradients are added up in float32; then to compute layers
    twice, a third more work for the learner; then to wait for checkpoints.
    """
    learner, generation = config.learner, config.generation
    rows = learner.batch_size * generation.num_generations
    most = _most_prompts(config, work)
    prompts = _portions(most) if generation.memory_limit_gb is None else [most]
    counts, twice = [math.ceil(rows / portion) for portion in _portions(rows)], [False, True]
    if learner.gradient_accumulation_steps is not None:
        counts = [learner.gradient_accumulation_steps]
    if learner.gradient_checkpointing is not None:
        twice = [learner.gradient_checkpointing]
    overlaps = [True, False] if config.checkpoint.overlap is None else [config.checkpoint.overlap]
    streams = [config.schedule.learner_streams or work.streams]
    if config.schedule.learner_streams is None and work.streams > 1:
        streams.append(1)
    choices = starmap(_Choice, product(prompts, streams, counts, twice, overlaps))
    return [choice for choice in choices if choice.micro_batches >= choice.streams]


def _processes(config: RunConfig, work: Workload) -> int:
    """Processes beside the training process; 0 where the generator is a thread of it."""
    if work.beside is not None:
        return work.beside
    return config.schedule.generator_processes or 1 if config.schedule.generator == "process" else 0


def _most_prompts(config: RunConfig, work: Workload) -> int:
    """Prompts of a step that are there to be decoded together."""
    schedule = config.schedule
    parts = schedule.parts if schedule.mode == "pinned" else None
    return math.ceil(config.learner.batch_size / (parts or max(_processes(config, work), 1)))


def _process_bytes(config: RunConfig, work: Workload, phases: Phases, decode_gb: float) -> float:
    """What one process of the generator may take: its policy versions, and a decode."""
    items = phases["generate"]
    held = items.get(_VERSIONS_THERE, 0) + items[_LAID_OUT]
    return held / max(_processes(config, work), 1) + decode_gb * GB


def _portions(count: int) -> list[int]:
    """The sizes of the largest portion when `count` things are cut into 1, 2, 3, … about equal ones; falling."""
    return sorted({math.ceil(count / n) for n in range(1, count + 1)}, reverse=True)


def _phases(config: RunConfig, work: Workload, choice: _Choice) -> dict[str, dict[str, int]]:
    """With max_staleness 0 the generator is idle while the learner works, with more both work at once.

    A pinned run keeps all versions that the steps begun are pinned to; a free one the newest, and for a token the one
    before. A process of the generator keeps what it has once taken, and its policy versions are there three times: its
    own, the learner's, and the files that they go by, which lie in memory where there is room.
    """
    learner, staleness = config.learner, config.schedule.max_staleness
    numbers, kind = work.trained, work.dtype if work.adapter is None else mx.float32
    weights = numbers * kind.size
    is_free = config.schedule.mode == "free"
    held = {
        "policy versions": (1 + (min(staleness, 1) if is_free else staleness)) * weights,
        "optimizer state": optimizer_state_bytes(numbers, kind),
    }
    if work.adapter is not None:
        held = {BASE: network_bytes(work.policy, work.dtype), **held}
    if learner.beta and config.task == "grpo":
        held["reference policy"] = weights
    evaluates = bool(config.evaluation.sets or config.data.eval_path)
    if evaluates and (config.evaluation.every or config.evaluation.at_start):
        held["version being evaluated"] = weights
    if config.cluster.serve is not None and config.cluster.full_every > 1:
        held[_CHANGED] = weights
    if choice.overlap:
        written = weights if is_free else held["policy versions"]
        held["checkpoint being written"] = written + held["optimizer state"]
    held |= teaching.held_bytes(config, work, overlap=choice.overlap)
    processes = _processes(config, work)
    if processes:
        versions = held["policy versions"] + (weights if evaluates and not work.sessions else 0)
        held[_VERSIONS_THERE] = processes * (held.get(BASE, 0) + versions)
        held[_ON_THE_WAY] = versions
    layouts = 2 if is_free and staleness else 1  # amid a completion, the token under way still has the one before
    is_idle = config.task == "sft" and not work.evaluates
    decoders = 0 if config.schedule.engines_alone or is_idle else max(processes, 1)
    generating = {
        _LAID_OUT: decoders * layouts * work.laid_out_bytes,
        "decode": decoders * _decode_bytes(config, work, choice.prompts),
    } | teaching.teaching_bytes(config, work)
    if evaluates and processes and work.sessions:  # its episodes are decoded beside them
        generating["evaluation"] = work.laid_out_bytes + _decode_bytes(config, work, choice.prompts)
    meanwhile = held | (generating if staleness or processes else {})
    adds_up = choice.micro_batches > 1 or learner.lanes > 1 or has_histories(work)
    learning = learning_bytes(config, work, choice.micro_batches, recompute=choice.checkpointing)
    gradients = 4 * numbers if adds_up else weights
    learn = {"gradients": gradients, "forward and backward": choice.streams * (learning - gradients)}
    if lanes := lanes_bytes(config, work):
        learn["sums of lanes"] = lanes
    if learner.num_iterations > 1:
        learn["next policy"] = weights
    update = {"gradients": gradients, "moving weights": update_bytes(numbers, work.largest, kind)}
    if learner.num_iterations > 1:  # else the next policy takes the place of the gradients bit by bit
        update["next policy"] = weights
    if gathered := gathered_bytes(work):
        update["gradients of other ranks"] = gathered
    update |= teaching.next_average_bytes(config, work)
    phases = {"generate": held | generating} | teaching.own_phase(config, work, meanwhile)
    phases |= {"learn": meanwhile | learn} | held_out_phase(work, meanwhile | {"next policy": weights})
    return with_other_ranks(phases | {"update": meanwhile | update}, held, learn, work)


def _decode_bytes(config: RunConfig, work: Workload, prompts: int) -> int:
    """What decoding this many of the longest prompts takes; no more than the config allows a decode. Of rows that act
    all rounds count that are under way."""
    generation, policy = config.generation, work.policy
    samples = generation.num_generations if config.task == "grpo" else max(1, work.evaluates)
    ways = device_ways(policy, work.dtype, on_cpu=work.on_cpu)
    is_filtering = Sampler(generation).is_filtering
    if work.sessions:
        rows, longest = prompts * generation.num_generations, max(work.longest_prompt, work.longest_history or 0)
        needed = work.sessions * turn_memory_bytes(
            policy,
            [0] * rows,
            [longest] * rows,
            generation.max_completion_length,
            work.dtype,
            is_filtering=is_filtering,
            **ways,
        )
    else:
        needed = decode_memory_bytes(
            policy,
            [work.longest_prompt] * prompts,
            samples,
            generation.max_completion_length,
            work.dtype,
            is_filtering=is_filtering,
            **ways,
        )
    return needed if generation.memory_limit_gb is None else min(needed, round(generation.memory_limit_gb * GB))


def _decode_room_gb(phases: Phases, limit_gb: float) -> float:
    """What a decode may take beside all else, in whole MB."""
    needed = phases["generate"]["decode"] / GB
    largest = max(sum(items.values()) for items in phases.values() if "decode" in items) / GB
    return max(needed, math.floor(1e3 * (limit_gb - largest + needed)) / 1e3)


def _resolved(config: RunConfig, choice: _Choice, decode_gb: float | None) -> RunConfig:
    """The config with the choice in it; what it named itself stays."""
    replace = msgspec.structs.replace
    generation, checkpoint = config.generation, config.checkpoint
    schedule = replace(config.schedule, learner_streams=choice.streams)
    learner = replace(
        config.learner,
        gradient_accumulation_steps=choice.micro_batches,
        gradient_checkpointing=choice.checkpointing,
    )
    if generation.memory_limit_gb is None:
        generation = replace(generation, memory_limit_gb=decode_gb)
    checkpoint = replace(checkpoint, overlap=choice.overlap)
    return replace(config, learner=learner, generation=generation, checkpoint=checkpoint, schedule=schedule)


def _check_decode_limit(config: RunConfig, work: Workload) -> None:
    limit_gb = config.generation.memory_limit_gb
    unlimited = msgspec.structs.replace(
        config, generation=msgspec.structs.replace(config.generation, memory_limit_gb=None)
    )
    if limit_gb is not None and (needed := _decode_bytes(unlimited, work, 1)) > limit_gb * GB:
        raise ConfigError(
            f"generation.memory_limit_gb is {limit_gb}, but the {config.generation.num_generations} completions of the "
            f"longest prompt ({work.longest_prompt} tokens) take {needed / GB:.3g} GB to decode; raise it, or lower "
            "generation.num_generations or generation.max_completion_length"
        )


def _notice(config: RunConfig, work: Workload, choice: _Choice, phases: Phases, limit_gb: float) -> str:
    P, rows = _most_prompts(config, work), config.learner.batch_size * config.generation.num_generations
    micro = in_lanes(choice.micro_batches, config.learner.lanes)
    measures = [
        f"decoding {choice.prompts} of {P} prompts at a time" if choice.prompts < P else "decoding a step at once",
        f"learning in {micro} micro-batches of {math.ceil(rows / micro)} rows" if micro > 1 else "learning at once",
        "computing layers twice" if choice.checkpointing else "keeping what layers compute",
        "learning while checkpoints are written" if choice.overlap else "waiting for checkpoints",
    ]
    return f"memory: at most {peak_bytes(phases) / GB:.1f} of {limit_gb:.4g} GB, {', '.join(measures)}"


def _refusal(config: RunConfig, phases: Phases, limit_gb: float) -> str:
    largest = max(phases, key=lambda name: sum(phases[name].values()))
    parts = ", ".join(f"{name} {size / GB:.2g}" for name, size in phases[largest].items())
    limit = f"memory_limit_gb is {limit_gb:.4g}"
    if config.memory_limit_gb is None:
        limit = f"the device recommends {limit_gb:.4g} GB"
    lower = ["generation.max_completion_length", "generation.num_generations"]
    if config.schedule.max_staleness:
        lower.append("schedule.max_staleness")
    return (
        f"{limit}, of which {RESERVE:.0%} is kept in reserve, but the run takes {peak_bytes(phases) / GB:.3g} GB "
        f"at the least ({largest}: {parts}); raise "
        f"memory_limit_gb, lower {', '.join(lower)}, or take a smaller model"
    )
