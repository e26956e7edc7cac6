"""What the memory of a run follows from, besides its config."""

import math
from typing import NamedTuple

import mlx.core as mx

from troupe.policy import Adapter, MicroBatch, NetworkConfig, fused_copy_bytes, parameter_count
from troupe.policy.adapter.modules import adapter_parameter_count, adapter_shapes
from troupe.policy.decode.memory import decoding_adapter_bytes


class TeacherWork(NamedTuple):
    """What the memory of a teacher follows from."""

    network: NetworkConfig
    dtype: mx.Dtype
    adapter: Adapter | None
    """Beside the network."""
    shares_base: bool
    """Whether the network is the base of the policy's own adapter, or of a teacher before it."""


class SupervisedRowSizes(NamedTuple):
    """Of the rows that are learned without being sampled, in tokens."""

    longest_prompt: int
    longest_completion: int
    longest_history: int
    """Of the prompts that rows begin with amid a completion; 0: there are none."""
    held_out: tuple[MicroBatch, ...] = ()
    """The largest pieces of rows that are measured alone; empty: there are none."""


class Workload(NamedTuple):
    """What the memory of a run follows from, besides its config."""

    policy: NetworkConfig
    dtype: mx.Dtype
    """Of the weights."""
    longest_prompt: int
    """Tokens."""
    on_cpu: bool
    """Where it is computed."""
    longest_history: int | None = None
    """Tokens of the longest history that an episode is told anew with amid it, as the prompt of a row of its own; None:
    each completion is one row."""
    sessions: int = 0
    """Where the policy acts, rounds whose rows are kept at once by a generator; 0: it answers once."""
    adapter: Adapter | None = None
    """What alone is trained; None: the whole network."""
    ranks: int = 1
    """Processes that learn a batch together."""
    beside: int | None = None
    """Processes of the generator that share the memory of rank 0, where others do not; the plan is that of its card,
    which has the most."""
    teachers: tuple[TeacherWork, ...] = ()
    longest_demonstrated: int = 0
    """Tokens of the longest prompt that the policy sees as its own teacher; 0: it is none."""
    supervised: SupervisedRowSizes | None = None
    """None: all is sampled."""
    evaluates: int = 0
    """Samples of a row that are evaluated, at the most; 0: nothing is."""
    streams: int = 1
    """Micro-batches that may well be differentiated at a time, where the config does not say how many."""

    @property
    def trained(self) -> int:
        """Numbers that are trained."""
        if self.adapter is None:
            return parameter_count(self.policy)
        return adapter_parameter_count(self.policy, self.adapter)

    @property
    def largest(self) -> int:
        """Numbers in the largest of them: embedding and head, where they are, or a stack of experts."""
        if self.adapter is not None:
            return max(map(math.prod, adapter_shapes(self.policy, self.adapter).values()))
        ends = self.policy.vocab_size * self.policy.hidden_size * (1 if self.policy.tie_word_embeddings else 2)
        return max(ends, self.policy.num_experts * self.policy.moe_intermediate_size * self.policy.hidden_size)

    @property
    def laid_out_bytes(self) -> int:
        """What of a version is laid out for decoding: the base is so already, once for all versions."""
        if self.adapter is None:
            return fused_copy_bytes(self.policy, self.dtype)
        return decoding_adapter_bytes(self.policy, self.adapter, self.dtype)
