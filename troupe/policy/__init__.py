"""The language model: arrays and text. Imports nothing else of ours."""

from troupe.policy.architecture import PRESETS, Qwen3Config
from troupe.policy.folders import MAX_SHARD_BYTES, read_model_folder, save_model_folder
from troupe.policy.hub import is_hub_id, resolve_model
from troupe.policy.loading import ModelConfig, Policy, load_policy, random_policy
from troupe.policy.qwen3 import (
    Attention,
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
from troupe.policy.rotary import YarnScaling
from troupe.policy.sampling import Sampler, SamplingConfig
from troupe.policy.text import TextCompletion, TextPrompt, complete_texts, encode_prompt, stream_text
from troupe.policy.tokenizer import Tokenizer

__all__ = [
    "MAX_SHARD_BYTES",
    "PRESETS",
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
    "TextCompletion",
    "TextPrompt",
    "Tokenizer",
    "Weights",
    "YarnScaling",
    "complete_texts",
    "encode_prompt",
    "expected_shapes",
    "fuse_projections",
    "generate_batch",
    "hidden_states",
    "init_weights",
    "is_hub_id",
    "load_policy",
    "parameter_count",
    "project",
    "random_policy",
    "read_model_folder",
    "resolve_model",
    "save_model_folder",
    "stream_text",
]
