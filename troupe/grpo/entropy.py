"""Adaptive entropy control: the coefficient of the entropy bonus follows the entropy of the policy.

Knows nothing of losses, weights or batches: a mean entropy comes in, numbers come out. After every update the
coefficient rises by a fixed amount where the entropy is at or below its target, and falls by it elsewhere; the bonus
counts only while the entropy last measured is at or below the target (He et al. 2025, "Skywork Open Reasoner 1",
arXiv:2505.22312, by the rules of TRL 1.16).

State: `entropy_coef` the coefficient, and `last_entropy` the mean entropy at the last update, in nats, +inf before the
first one; each float32 (). They stand beside those of AdamW in the flat state of the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import mlx.core as mx


class EntropySettings(Protocol):
    """The settings that the controller reads; `LossConfig` has them."""

    @property
    def entropy_coef(self) -> float: ...
    @property
    def use_adaptive_entropy(self) -> bool: ...
    @property
    def entropy_coef_delta(self) -> float: ...
    @property
    def entropy_target(self) -> float: ...
    @property
    def entropy_coef_min(self) -> float: ...
    @property
    def entropy_coef_max(self) -> float: ...


def adapted_entropy_coef(coef: float, entropy: float, config: EntropySettings) -> float:
    """The coefficient after an update: min(c + Δ, c_max) where the mean entropy ≤ target, else max(c − Δ, c_min)."""
    if entropy <= config.entropy_target:
        return min(coef + config.entropy_coef_delta, config.entropy_coef_max)
    return max(coef - config.entropy_coef_delta, config.entropy_coef_min)


class EntropyControl(NamedTuple):
    """Where the controller stands."""

    coef: float
    last_entropy: float
    """Mean token entropy of the batch of the last update, in nats."""

    def in_force(self, config: EntropySettings) -> float:
        """The coefficient to weigh the bonus of the next update with."""
        if config.use_adaptive_entropy and not self.last_entropy <= config.entropy_target:
            return 0.0
        return self.coef

    def after_update(self, entropy: float, config: EntropySettings) -> EntropyControl:
        """The controller after an update with a batch of this mean entropy; the same where it is switched off."""
        if not config.use_adaptive_entropy:
            return self
        return EntropyControl(adapted_entropy_coef(self.coef, entropy, config), entropy)

    def as_state(self, config: EntropySettings) -> dict[str, mx.array]:
        """What the state of the optimizer keeps of it, evaluated; nothing where it is switched off."""
        if not config.use_adaptive_entropy:
            return {}
        state = {"entropy_coef": mx.array(self.coef), "last_entropy": mx.array(self.last_entropy)}
        mx.eval(state)
        return state


def entropy_control(state: Mapping[str, mx.array], config: EntropySettings) -> EntropyControl:
    """The controller as the state of the optimizer has it; at its start where that says nothing of it."""
    if not config.use_adaptive_entropy or "entropy_coef" not in state:
        return EntropyControl(config.entropy_coef, math.inf)
    return EntropyControl(float(state["entropy_coef"]), float(state["last_entropy"]))
