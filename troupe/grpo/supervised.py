"""How supervised steps are learned: the first of a run, or all of them, of which completions are given, not sampled.

    L = 1/N Σ_t −log π(t)

over the N tokens of the whole batch that are to be learned (TRL's SFTTrainer, `loss_type = "nll"`): under the policy
itself, whatever temperature it is sampled with.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import msgspec

from troupe.grpo.config import LearnerConfig, Scheduler
from troupe.grpo.objectives import SUPERVISED
from troupe.grpo.optimizer import OptimizerState


class Supervision(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The supervised steps of a run: its first ones, each one pass over its batch."""

    steps: int
    max_completion_length: int
    """Most tokens that follow on a prompt."""
    lr: float | None = None
    """Peak learning rate; None: the learner's, also where that is set while the run goes on."""
    lr_scheduler: Scheduler = "linear"
    warmup_steps: int = 0

    def config(self, learner: LearnerConfig) -> LearnerConfig:
        """The learner's settings in these steps: the same optimizer, without all that is about sampled completions."""
        settings = {
            "loss_type": SUPERVISED,
            "lr": learner.lr if self.lr is None else self.lr,
            "lr_scheduler": self.lr_scheduler,
            "warmup_steps": self.warmup_steps,
            "num_iterations": 1,
            "importance_sampling_level": "token",
            "beta": 0.0,
            "sync_ref_model": False,
            "entropy_coef": 0.0,
            "use_adaptive_entropy": False,
            "top_entropy_quantile": 1.0,
            "off_policy_mask_threshold": None,
            "mask_truncated_completions": False,
            "vllm_importance_sampling_correction": False,
            "turn_advantages": "off",
            "echo_alpha": 0.0,
            "router_replay": "off",
        }
        return msgspec.structs.replace(learner, **settings)


def begun_again(state: Mapping[str, mx.array]) -> OptimizerState:
    """The optimizer's state with its moments at zero, as before a first update; what a weight of lower precision lacks
    of the float32 weight that is trained stays."""
    return {
        name: mx.zeros_like(array) if name == "step" or name.startswith(("m.", "v.")) else array
        for name, array in state.items()
    }
