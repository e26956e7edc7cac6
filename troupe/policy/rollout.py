"""The decoding engine's public door: many prompts, several samples of each. `decode/engine.py` has the work."""

from troupe.policy.decode.engine import RolloutEngine, generate_batch

__all__ = ["RolloutEngine", "generate_batch"]
