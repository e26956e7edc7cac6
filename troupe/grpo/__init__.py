"""Arrays in; loss and new weights out."""

from troupe.grpo.advantages import compute_advantages, reward_statistics, spread_within_groups
from troupe.grpo.batch import Batch, make_batch, split
from troupe.grpo.config import LearnerConfig, LossConfig, ScaleRewards
from troupe.grpo.distillation import distilled_advantages, sampled_divergence
from troupe.grpo.loss import (
    EntropyControl,
    Normalizer,
    batch_normalizer,
    entropy_control,
    entropy_from_logits,
    grpo_loss,
    selective_log_softmax,
)
from troupe.grpo.optimizer import (
    adamw_init,
    adamw_update,
    clip_by_global_norm,
    learning_rate,
    optimizer_state_bytes,
    update_bytes,
)
from troupe.grpo.step import StepResult, sync_reference, train_on_batch
from troupe.grpo.turns import compared_part, discounted_returns, turn_advantages

__all__ = [
    "Batch",
    "EntropyControl",
    "LearnerConfig",
    "LossConfig",
    "Normalizer",
    "ScaleRewards",
    "StepResult",
    "adamw_init",
    "adamw_update",
    "batch_normalizer",
    "clip_by_global_norm",
    "compared_part",
    "compute_advantages",
    "discounted_returns",
    "distilled_advantages",
    "entropy_control",
    "entropy_from_logits",
    "grpo_loss",
    "learning_rate",
    "make_batch",
    "optimizer_state_bytes",
    "reward_statistics",
    "sampled_divergence",
    "selective_log_softmax",
    "split",
    "spread_within_groups",
    "sync_reference",
    "train_on_batch",
    "turn_advantages",
    "update_bytes",
]
