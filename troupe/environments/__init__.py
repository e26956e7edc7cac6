"""The world that a policy talks to: tools, environments, and the episodes in them."""

from troupe.environments.convention import StepResult

__all__ = ["StepResult"]
