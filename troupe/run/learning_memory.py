"""What the learner's largest micro-batch takes, and what the other ranks do."""

import math
from collections.abc import Mapping

from troupe.grpo.lanes import GATHERED_AT_ONCE, in_lanes
from troupe.grpo.loss import has_entropy_bonus
from troupe.policy import MicroBatch, gradient_memory_bytes
from troupe.policy.gradient.memory import forward_memory_bytes
from troupe.policy.network.attention import attention_is_fused
from troupe.run.config import RunConfig
from troupe.run.workload import SupervisedRowSizes, Workload

BASE = "base"
"""Name of what an adapter completes, in a plan."""


def learning_bytes(config: RunConfig, work: Workload, micro_batches: int, *, recompute: bool) -> int:
    """What the gradient of the largest micro-batch takes, the gradients included; of one alone, or added up.

    `recompute`: layers are computed twice. `micro_batches` of a step of which each completion is one row.
    """
    is_cut = in_lanes(micro_batches, config.learner.lanes) > 1
    return max(
        gradient_memory_bytes(
            work.policy,
            work.dtype,
            micro_batch,
            recompute=recompute,
            entropy_gradient=has_entropy_bonus(config.learner),
            adds_up=adds_up,
            on_cpu=work.on_cpu,
            writes_scores=not attention_is_fused(
                work.policy.head_dim,
                work.dtype,
                gradient=True,
                on_cpu=work.on_cpu,
                windowed=work.policy.has_windows,
            ),
            deterministic=config.learner.deterministic,
            adapter=work.adapter,
        )
        for micro_batch in _largest_micro_batches(config, work, micro_batches)
        for adds_up in {is_cut, is_cut or has_histories(work)}
    )


def has_histories(work: Workload) -> bool:
    """Whether a completion may be several rows, so that there may be more micro-batches than were asked for."""
    return work.longest_history is not None or bool(work.supervised and work.supervised.longest_history)


def held_out_phase(work: Workload, held: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """The forward pass over held-out rows between supervised steps, beside what is held then; nothing where there are
    none."""
    pieces = () if work.supervised is None else work.supervised.held_out
    if not pieces:
        return {}
    needed = (
        forward_memory_bytes(work.policy, work.dtype, piece, on_cpu=work.on_cpu, adapter=work.adapter)
        for piece in pieces
    )
    return {"held-out rows": {**held, "forward pass": max(needed)}}


def lanes_bytes(config: RunConfig, work: Workload) -> int:
    """What sums of gradients take beside the one that grows, while lanes wait for each other to be added."""
    return 4 * work.trained * (config.learner.lanes // work.ranks).bit_length() - 4 * work.trained


def gathered_bytes(work: Workload) -> int:
    """What ranks give each other of their gradients at a time."""
    return 0 if work.ranks == 1 else 4 * min(work.trained, GATHERED_AT_ONCE) * (2 + work.ranks)


def _largest_micro_batches(config: RunConfig, work: Workload, micro_batches: int) -> list[MicroBatch]:
    """What rows that completions begin with make, and what those do that follow a history told anew, of which there are
    as many as take the same places (`grpo.batch.micro_batches`)."""
    P, G = config.learner.batch_size, config.generation.num_generations
    micro_batches = in_lanes(micro_batches, config.learner.lanes)
    given = _supervised_micro_batches(P, work.supervised, micro_batches) if work.supervised is not None else []
    if config.task == "sft":
        return given
    rows = math.ceil(P * G / micro_batches)
    is_whole_groups = rows % G == 0 and P * G % micro_batches == 0
    T = config.generation.max_completion_length
    prompts = rows // G if is_whole_groups else min(P, 1 + math.ceil((rows - 1) / G))
    first = MicroBatch(prompts=prompts, prompt_length=work.longest_prompt, rows=rows, completion_length=T)
    if work.longest_history is None:
        return [first, *given]
    return [first, _of_histories(first, work.longest_history), *given]


def _of_histories(first: MicroBatch, longest: int) -> MicroBatch:
    """As many rows with a history for their prompt as take the places of a first micro-batch."""
    T = first.completion_length
    later = min(first.rows, max(1, (first.rows * T + first.prompts * first.prompt_length) // (longest + T)))
    return MicroBatch(prompts=later, prompt_length=longest, rows=later, completion_length=T)


def _supervised_micro_batches(P: int, sizes: SupervisedRowSizes, micro_batches: int) -> list[MicroBatch]:
    """What the P rows of a supervised step make, each with a prompt of its own."""
    rows = math.ceil(P / micro_batches)
    first = MicroBatch(
        prompts=rows, prompt_length=sizes.longest_prompt, rows=rows, completion_length=sizes.longest_completion
    )
    return [first, *([_of_histories(first, sizes.longest_history)] if sizes.longest_history else [])]


def with_other_ranks(
    phases: dict[str, dict[str, int]], held: Mapping[str, int], learn: Mapping[str, int], work: Workload
) -> dict[str, dict[str, int]]:
    """On a processor all ranks share its memory; elsewhere each has a card, and that of rank 0 holds the most."""
    if not work.on_cpu or work.ranks == 1:
        return phases
    own = ("optimizer state", "reference policy", BASE)
    each = sum(held.get(name, 0) for name in own) + (4 if work.adapter else work.dtype.size) * work.trained
    each += sum(learn.values())  # MLX keeps what it has once taken
    return {name: {**items, "other ranks": (work.ranks - 1) * each} for name, items in phases.items()}
