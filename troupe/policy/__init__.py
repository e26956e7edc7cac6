"""Tokens in; tokens, log-probs and gradients out."""

from troupe.policy.adapter.base import Base
from troupe.policy.adapter.modules import Adapter
from troupe.policy.adapter.settings import AdapterConfig
from troupe.policy.decode.engine import RolloutEngine
from troupe.policy.decode.memory import decode_memory_bytes, fused_copy_bytes, turn_memory_bytes
from troupe.policy.decode.open_session import OpenSession
from troupe.policy.decode.requests import (
    CompletedGroup,
    CompletedTurn,
    Completion,
    GenerationConfig,
    RolloutRequest,
    TurnRequest,
)
from troupe.policy.decode.sampling import Sampler, SamplingConfig
from troupe.policy.decode.session import TurnSession
from troupe.policy.folders import MAX_SHARD_BYTES, read_model_folder, save_model_folder
from troupe.policy.gradient.backward import completion_gradients, completion_statistics
from troupe.policy.gradient.memory import MicroBatch, gradient_memory_bytes
from troupe.policy.hub import is_hub_id, resolve_model
from troupe.policy.load import load_policy
from troupe.policy.model import ModelConfig, Policy, random_policy
from troupe.policy.model_files import DTYPES, Companions, model_fingerprint, network_fingerprint
from troupe.policy.network.architecture import PRESETS, NetworkConfig, Qwen3Config
from troupe.policy.network.elementwise import is_on_cpu
from troupe.policy.network.forward import Attention, hidden_states, project
from troupe.policy.network.fusing import fuse_projections
from troupe.policy.network.head import TokenStatistics
from troupe.policy.network.rotary import LinearScaling, Llama3Scaling, YarnScaling
from troupe.policy.network.tensors import Weights, expected_shapes, init_weights, parameter_count
from troupe.policy.text.complete import (
    RolloutBatch,
    TextCompletion,
    complete_texts,
    encode_prompt,
    generate_batch,
    stream_text,
)
from troupe.policy.text.continuing import Continuer, Following
from troupe.policy.text.tokenizer import TextPrompt, Tokenizer, opened_thought

__all__ = [
    "DTYPES",
    "MAX_SHARD_BYTES",
    "PRESETS",
    "Adapter",
    "AdapterConfig",
    "Attention",
    "Base",
    "Companions",
    "CompletedGroup",
    "CompletedTurn",
    "Completion",
    "Continuer",
    "Following",
    "GenerationConfig",
    "LinearScaling",
    "Llama3Scaling",
    "MicroBatch",
    "ModelConfig",
    "NetworkConfig",
    "OpenSession",
    "Policy",
    "Qwen3Config",
    "RolloutBatch",
    "RolloutEngine",
    "RolloutRequest",
    "Sampler",
    "SamplingConfig",
    "TextCompletion",
    "TextPrompt",
    "TokenStatistics",
    "Tokenizer",
    "TurnRequest",
    "TurnSession",
    "Weights",
    "YarnScaling",
    "complete_texts",
    "completion_gradients",
    "completion_statistics",
    "decode_memory_bytes",
    "encode_prompt",
    "expected_shapes",
    "fuse_projections",
    "fused_copy_bytes",
    "generate_batch",
    "gradient_memory_bytes",
    "hidden_states",
    "init_weights",
    "is_hub_id",
    "is_on_cpu",
    "load_policy",
    "model_fingerprint",
    "network_fingerprint",
    "opened_thought",
    "parameter_count",
    "project",
    "random_policy",
    "read_model_folder",
    "resolve_model",
    "save_model_folder",
    "stream_text",
    "turn_memory_bytes",
]
