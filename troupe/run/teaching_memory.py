"""What a teacher takes: its weights, and a forward pass over the largest piece of a group."""

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
    T, G = config.generation.max_completion_length, config.generation.num_generations
    longest = max(work.longest_prompt, work.longest_history or 0)
    rows = max(1, min(G, MOST_PLACES // (longest + T)))
    prompts = 1 if work.longest_history is None else rows
    piece = MicroBatch(prompts=prompts, prompt_length=longest, rows=rows, completion_length=T)
    needed = (
        forward_memory_bytes(teacher.network, teacher.dtype, piece, on_cpu=work.on_cpu, adapter=teacher.adapter)
        for teacher in work.teachers
    )
    return {"teacher's forward pass": max(needed)}
