"""The language model: arrays and text. Imports nothing else of ours."""

from troupe.policy.loading import (
    ModelConfig,
    Policy,
    load_policy,
    random_policy,
    read_model_folder,
    save_model_folder,
)
from troupe.policy.qwen3 import (
    Attention,
    Qwen3Config,
    Weights,
    expected_shapes,
    fuse_projections,
    hidden_states,
    init_weights,
    parameter_count,
    project,
)
from troupe.policy.rollout import (
    CompletedGroup,
    Completion,
    GenerationConfig,
    RolloutBatch,
    RolloutEngine,
    RolloutRequest,
    generate_batch,
)
from troupe.policy.sampling import Sampler, SamplingConfig
from troupe.policy.tokenizer import Tokenizer

__all__ = [
    "Attention",
    "CompletedGroup",
    "Completion",
    "GenerationConfig",
    "ModelConfig",
    "Policy",
    "Qwen3Config",
    "RolloutBatch",
    "RolloutEngine",
    "RolloutRequest",
    "Sampler",
    "SamplingConfig",
    "Tokenizer",
    "Weights",
    "expected_shapes",
    "fuse_projections",
    "generate_batch",
    "hidden_states",
    "init_weights",
    "load_policy",
    "parameter_count",
    "project",
    "random_policy",
    "read_model_folder",
    "save_model_folder",
]
