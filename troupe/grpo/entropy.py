"""Adaptive entropy control: the coefficient of the entropy bonus follows the entropy of the policy.

After every update the coefficient rises by a fixed amount where the entropy is at or below its target, and falls by it
elsewhere; the bonus counts only while the entropy last measured is at or below the target (He et al. 2025, "Skywork
Open Reasoner 1", arXiv:2505.22312, by the rules of TRL 1.16).

State: `entropy_coef` the coefficient, and `last_entropy` the mean entropy at the last update, in nats, +inf before the
first one; each float32 (). They stand beside those of AdamW in the flat state of the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import mlx.core as mx

from troupe.grpo.config import LossConfig


class EntropyControl(NamedTuple):
    """Where the controller stands."""

    coef: float
    last_entropy: float
    """Mean token entropy of the batch of the last update, in nats."""

    def in_force(self, config: LossConfig) -> float:
        """The coefficient to weigh the bonus of the next update with."""
        if config.use_adaptive_entropy and not self.last_entropy <= config.entropy_target:
            return 0.0
        return self.coef

    def after_update(self, entropy: float, config: LossConfig) -> EntropyControl:
        """The controller after an update with a batch of this mean entropy; the same where it is switched off.

        The coefficient becomes min(c + Δ, c_max) where the entropy ≤ target, else max(c − Δ, c_min).
        """
        if not config.use_adaptive_entropy:
            return self
        if entropy <= config.entropy_target:
            return EntropyControl(min(self.coef + config.entropy_coef_delta, config.entropy_coef_max), entropy)
        return EntropyControl(max(self.coef - config.entropy_coef_delta, config.entropy_coef_min), entropy)

    def as_state(self, config: LossConfig) -> dict[str, mx.array]:
        """What the state of the optimizer keeps of it, evaluated; nothing where it is switched off."""
        if not config.use_adaptive_entropy:
            return {}
        state = {"entropy_coef": mx.array(self.coef), "last_entropy": mx.array(self.last_entropy)}
        mx.eval(state)
        return state


def entropy_control(state: Mapping[str, mx.array], config: LossConfig) -> EntropyControl:
    """The controller as the state of the optimizer has it; at its start where that says nothing of it."""
    if not config.use_adaptive_entropy or "entropy_coef" not in state:
        return EntropyControl(config.entropy_coef, math.inf)
    return EntropyControl(float(state["entropy_coef"]), float(state["last_entropy"]))
