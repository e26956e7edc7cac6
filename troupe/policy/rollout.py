"""The decoding engine's public door: many prompts, several samples of each."""

from troupe.policy.decode.engine import RolloutEngine
from troupe.policy.text.complete import generate_batch

__all__ = ["RolloutEngine", "generate_batch"]
