"""What a teacher takes: its weights, and a forward pass over the largest piece of a group."""

from collections.abc import Mapping

import mlx.core as mx

from troupe.actors.teacher.forward import MOST_PLACES
from troupe.policy import MicroBatch
from troupe.policy.adapter.modules import adapter_parameter_count
from troupe.policy.gradient.memory import forward_memory_bytes
from troupe.policy.network.tensors import network_bytes
from troupe.run.config import RunConfig
from troupe.run.workload import TeacherWork, Workload


def teacher_bytes(teacher: TeacherWork) -> int:
    """Its weights; of an adapter the float32 numbers, and its base unless another's is the same."""
    base = 0 if teacher.shares_base else network_bytes(teacher.network, teacher.dtype)
    return base + (0 if teacher.adapter is None else 4 * adapter_parameter_count(teacher.network, teacher.adapter))


def teaching_bytes(config: RunConfig, work: Workload) -> dict[str, int]:
    """The forward pass, by its name, of several teachers the largest; nothing where there is none. Of as many
    completions of full length as are computed at a time, behind the longest prompt, or the longest history that an
    episode is told anew with."""
    if not work.teachers:
        return {}
    longest = max(work.longest_prompt, work.longest_history or 0)
    piece = _largest_piece(config, longest, is_shared=work.longest_history is None)
    needed = (
        forward_memory_bytes(teacher.network, teacher.dtype, piece, on_cpu=work.on_cpu, adapter=teacher.adapter)
        for teacher in work.teachers
    )
    return {"teacher's forward pass": max(needed)}


def held_bytes(config: RunConfig, work: Workload, *, overlap: bool) -> dict[str, int]:
    """The weights of teachers, or of a policy that teaches itself, by their names; `overlap`: older ones are being
    written meanwhile. Those that the run began with are there as the reference already, where one stays at them; behind
    a warm start both are in checkpoints, and read from there."""
    if work.teachers:
        return {"teacher": sum(map(teacher_bytes, work.teachers))}
    kind, learner = config.teacher.model_kind, config.learner
    is_there = learner.beta != 0.0 and not learner.sync_ref_model and work.supervised is None
    if kind in (None, "live") or (kind == "base" and is_there):
        return {}
    return {"weights as a teacher": (2 if overlap and kind == "ema" else 1) * _average_bytes(config, work)}


def next_average_bytes(config: RunConfig, work: Workload) -> dict[str, int]:
    """A moving average beside the one before."""
    return {"next weights as a teacher": _average_bytes(config, work)} if config.teacher.model_kind == "ema" else {}


def own_phase(config: RunConfig, work: Workload, held: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """The phase in which a policy is asked as its own teacher, beside what is held; nothing where it is none."""
    if not work.longest_demonstrated:
        return {}
    piece = _largest_piece(config, work.longest_demonstrated, is_shared=True)
    forward = forward_memory_bytes(work.policy, work.dtype, piece, on_cpu=work.on_cpu, adapter=work.adapter)
    needed = {"teacher's forward pass": forward}
    if config.teacher.model_kind == "ema" and work.adapter is None and work.dtype != mx.float32:
        needed["average in the policy's type"] = work.dtype.size * work.trained
    return {"teach": {**held, **needed}}


def _average_bytes(config: RunConfig, work: Workload) -> int:
    is_float32 = config.teacher.model_kind == "ema" or work.adapter is not None
    return (4 if is_float32 else work.dtype.size) * work.trained


def _largest_piece(config: RunConfig, longest: int, *, is_shared: bool) -> MicroBatch:
    """Of as many completions as are computed at a time, behind one prompt or one each."""
    T, G = config.generation.max_completion_length, config.generation.num_generations
    rows = max(1, min(G, MOST_PLACES // (longest + T)))
    return MicroBatch(prompts=1 if is_shared else rows, prompt_length=longest, rows=rows, completion_length=T)
