"""The decoding engine's public door: many prompts, several samples of each."""

from troupe.policy.decode.engine import RolloutEngine
from troupe.policy.decode.requests import CompletedGroup, Completion, GenerationConfig, RolloutRequest
from troupe.policy.text.complete import RolloutBatch, generate_batch

__all__ = [
    "CompletedGroup",
    "Completion",
    "GenerationConfig",
    "RolloutBatch",
    "RolloutEngine",
    "RolloutRequest",
    "generate_batch",
]
