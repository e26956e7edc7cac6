"""The settings of the algorithm, without MLX: what the loss is made of, and how a batch becomes updates."""

from typing import Annotated, Literal

import msgspec

LossType = Literal[
    "grpo",
    "bnpo",
    "dr_grpo",
    "dapo",
    "luspo",
    "cispo",
    "sapo",
    "vespo",
    "gmpo",
    "rloo",
    "dppo",
    "m2po",
    "clip_cov",
    "kl_cov",
]
Level = Literal["token", "sequence"]
CorrectionMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
Advantage = Literal["grpo", "rloo", "maxrl", "grpo_passk"]
ScaleRewards = Literal["group", "batch", "none"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]
Scheduler = Literal["linear", "constant", "cosine"]
Replay = Literal["off", "measure", "on"]
TurnAdvantages = Literal["off", "gigpo"]

NonNegative = Annotated[float, msgspec.Meta(ge=0.0)]
Positive = Annotated[float, msgspec.Meta(gt=0.0)]
Fraction = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Part = Annotated[float, msgspec.Meta(gt=0.0, le=1.0)]
Beta = Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)]
AtLeastOne = Annotated[int, msgspec.Meta(ge=1)]
Count = Annotated[int, msgspec.Meta(ge=0)]

BY_TOKENS: tuple[LossType, ...] = ("rloo", "dppo", "m2po", "clip_cov", "kl_cov")
"""Loss types that have no form with `importance_sampling_level = "sequence"`."""
SCALES: dict[Advantage, tuple[ScaleRewards, ...]] = {
    "grpo": ("group", "batch", "none"),
    "rloo": ("none", "batch"),
    "maxrl": ("none",),
    "grpo_passk": ("group", "none"),
}
"""What each advantage may be divided by; where `scale_rewards` does not say, by the first."""


def checked_scale(advantage: Advantage, scale_rewards: ScaleRewards | None) -> ScaleRewards:
    """What an advantage is divided by; ValueError where it may not be divided by that."""
    scale = SCALES[advantage][0] if scale_rewards is None else scale_rewards
    if scale not in SCALES[advantage]:
        choices = " or ".join(f'"{choice}"' for choice in SCALES[advantage])
        raise ValueError(
            f'scale_rewards is "{scale}", but advantage = "{advantage}" goes with {choices}; name one of them, or '
            "leave scale_rewards out"
        )
    return scale


def checked_aggregation(advantage: Advantage, aggregation: Aggregation) -> None:
    """ValueError where rewards that are normalized one by one would be compared in another way too."""
    if advantage != "grpo" and aggregation != "sum_then_normalize":
        raise ValueError(
            f'multi_objective_aggregation is "{aggregation}", which is an advantage by itself (GDPO), and advantage is '
            f'"{advantage}"; leave one of the two out'
        )


class LossConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the loss is made of. `troupe.grpo.policy_terms` has the formula of each loss type."""

    loss_type: LossType = "dapo"
    """The policy term, and what a completion weighs; see `troupe.grpo.policy_terms`."""
    importance_sampling_level: Level = "token"
    """Whether ratios are taken per token (GRPO) or as a geometric mean over the completion (GSPO)."""
    epsilon: NonNegative = 0.2
    """Lower clip range: ratios below 1 − ε are clipped."""
    epsilon_high: NonNegative | None = None
    """Upper clip range, 1 + ε_high; None is `epsilon`. For "cispo" the largest weight itself (the paper: 5)."""
    delta: Positive | None = None
    """Upper bound of the unclipped ratio, above 1 + ε_high; None is no bound."""
    beta: NonNegative = 0.0
    """Weight of the KL divergence from the reference policy; 0 needs no reference policy."""
    use_bias_correction_kl: bool = True
    """Multiply the KL estimate by the importance ratio (DeepSeek-V3.2, arXiv:2512.02556)."""
    sapo_temperature_pos: Positive = 1.0
    """In "sapo": how sharp the gate is where the advantage is above 0."""
    sapo_temperature_neg: Positive = 1.05
    """In "sapo": how sharp the gate is elsewhere."""
    vespo_k_pos: NonNegative = 2.0
    """In "vespo": exponent of the sequence's ratio where the advantage is 0 or above."""
    vespo_lambda_pos: NonNegative = 3.0
    """In "vespo": how fast the weight decays above a ratio of 1 where the advantage is 0 or above."""
    vespo_k_neg: NonNegative = 3.0
    """In "vespo": the exponent where the advantage is below 0."""
    vespo_lambda_neg: NonNegative = 2.0
    """In "vespo": the decay where the advantage is below 0."""
    dppo_mask_high: NonNegative = 0.2
    """In "dppo": a token of positive advantage is left out where its probability has risen by more than this."""
    dppo_mask_low: NonNegative = 0.2
    """In "dppo": one of negative advantage, where it has fallen by more than this."""
    dppo_kl_tau: NonNegative = 1e-3
    """In "dppo": weight of the squared log-ratio."""
    m2_threshold: NonNegative = 0.04
    """In "m2po": the largest mean of squared log-ratios; tokens with the largest are left out until it is reached."""
    clip_cov_ratio: Part = 0.0002
    """In "clip_cov": part of the tokens that lose their gradient."""
    clip_cov_lb: float = 1.0
    """In "clip_cov": they are drawn from those whose covariance is above this,"""
    clip_cov_ub: float = 5.0
    """and below this."""
    kl_cov_ratio: Part = 0.0002
    """In "kl_cov": part of the tokens, those of highest covariance, that pay for leaving the old policy."""
    ppo_kl_coef: NonNegative = 0.1
    """In "kl_cov": what they pay, times the size of the log-ratio."""
    off_policy_mask_threshold: NonNegative | None = None
    """Rows of negative advantage whose mean log-prob fell by more than this are left out; None leaves none out."""
    top_entropy_quantile: Fraction = 1.0
    """Part of the tokens, those of highest entropy, whose policy term counts; 1 is all."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus: the mean token entropy, times this, is subtracted from the loss."""
    use_adaptive_entropy: bool = False
    """Let `entropy_coef`, then only the first weight, follow the entropy; see `troupe.grpo.loss.EntropyControl`."""
    entropy_coef_delta: NonNegative = 0.005
    """By how much the weight rises or falls at each update."""
    entropy_target: NonNegative = 0.2
    """Mean token entropy, in nats, at and below which the weight rises and the bonus counts."""
    entropy_coef_min: float = 0.0
    """The weight falls to this and no further."""
    entropy_coef_max: float = 1.0
    """The weight rises to this and no further."""

    def __post_init__(self) -> None:
        if self.importance_sampling_level == "sequence" and self.loss_type in BY_TOKENS:
            raise ValueError(
                f'importance_sampling_level is "sequence", but loss_type "{self.loss_type}" has ratios of its own; '
                "leave importance_sampling_level out"
            )
        if self.clip_cov_lb > self.clip_cov_ub:
            raise ValueError(
                f"clip_cov_lb is {self.clip_cov_lb}, above clip_cov_ub = {self.clip_cov_ub}; lower the one or raise "
                "the other"
            )
        if self.entropy_coef_min > self.entropy_coef_max:
            raise ValueError(
                f"entropy_coef_min is {self.entropy_coef_min}, above entropy_coef_max = {self.entropy_coef_max}; "
                "lower the one or raise the other"
            )


class LearnerConfig(LossConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The section `[learner]`: the loss, and how a batch becomes updates."""

    lr: Fraction | None = None
    """Peak learning rate. None: 1e-6; of an adapter 1e-5, ten times as much, since it begins at nothing and has few
    numbers to move."""
    lr_scheduler: Scheduler = "linear"
    """How it falls after the warm-up; see `optimizer.learning_rate`."""
    warmup_steps: Count = 0
    """Updates over which it rises from 0."""
    batch_size: AtLeastOne = 4
    """P: prompts a learner batch."""
    epochs: AtLeastOne = 3
    """Passes over the dataset."""
    max_steps: AtLeastOne | None = None
    """Learner batches of the run, whatever `epochs` says; None: as many as `epochs` need."""
    num_iterations: AtLeastOne = 1
    """Updates a batch, each from all of its rows."""
    gradient_accumulation_steps: AtLeastOne | None = None
    """Micro-batches that a batch is *split* into (TRL multiplies); lower peak memory, the same gradient. None: one,
    or as many as a run's memory limit asks for."""
    lanes: AtLeastOne = 1
    """Shares of a batch whose gradients are summed apart and then added as a binary tree, a power of two: as many
    ranks may learn together, and their number changes no bit (see `troupe.grpo.lanes`)."""
    gradient_checkpointing: bool | None = None
    """Compute the inside of layers again for the gradient instead of keeping it: less memory, more work, the same
    gradient. None: no, unless a run's memory limit asks for it."""
    deterministic: bool = True
    """Gradients have the same bits each time on every device. false: on NVIDIA cards attention's gradient is cuDNN's
    where there is no kernel of ours (there is for 16-bit types and heads of 64, 128 and 256), which adds in another
    order each time; elsewhere nothing changes."""
    echo_alpha: NonNegative = 0.0
    """Where the policy acts: weight of the cross-entropy of what it observes (ECHO, arXiv:2605.24517: 0.05; 0.01 to 0.1
    are usual), from which it learns of its world also where every episode fails; see `troupe.grpo.echo`."""
    router_aux_loss_coef: NonNegative = 0.0
    """Weight of the load-balancing loss of a network with experts, of each micro-batch: what keeps its routers from
    sending most tokens to a few experts. Zero computes none."""
    router_replay: Replay = "off"
    """In a network with experts: "on" has the learner send each token to the experts that the generator sent it to
    (arXiv:2510.11370), "measure" only counts where its own routers choose others (`router/flips`)."""
    advantage: Advantage = "grpo"
    """How a completion's reward is compared with those of its group; see `advantages.compute_advantages`."""
    scale_rewards: ScaleRewards | None = None
    """What advantages are divided by: the standard deviation of the group, of the batch, or nothing. None: "group" for
    "grpo" and "grpo_passk", "none" for the others."""
    multi_objective_aggregation: Aggregation = "sum_then_normalize"
    """How several reward functions become one advantage; see `advantages.compute_advantages`."""
    turn_advantages: TurnAdvantages = "off"
    """Whether turns of episodes have advantages of their own, added to the episode's: "gigpo" compares those that begin
    in the same state (arXiv 2505.10978), which an environment names by `state_id`; see `troupe.grpo.turns`."""
    turn_advantage_weight: NonNegative = 1.0
    """ω, what a turn's advantage counts beside its episode's."""
    mask_truncated_completions: bool = False
    """Leave completions that the length limit cut out of the loss."""
    dynamic_sampling: bool = False
    """Leave groups whose advantages are all 0 out of the batch and sample others in their place (DAPO,
    arXiv:2503.14476)."""
    max_resampling_attempts: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 3
    """How often a place of the batch is sampled anew before the step goes on without it."""
    sync_ref_model: bool = False
    """Let the reference policy follow the policy; see `troupe.grpo.sync_reference`."""
    ref_model_mixup_alpha: Fraction = 0.6
    """The policy's share in the reference at each synchronization."""
    ref_model_sync_steps: AtLeastOne = 512
    """Updates between two synchronizations."""
    adam_beta1: Beta = 0.9
    """Decay of AdamW's mean of the gradients."""
    adam_beta2: Beta = 0.999
    """Decay of AdamW's mean of their squares."""
    adam_epsilon: Positive = 1e-8
    """Added to the square root of the latter."""
    weight_decay: NonNegative = 0.0
    """Decoupled decay of matrices."""
    max_grad_norm: NonNegative = 1.0
    """Largest norm of the whole gradient; 0 never clips."""
    max_nonfinite_steps: AtLeastOne = 5
    """So many batches in a row with a loss or gradient that is not finite end the run."""
    vllm_importance_sampling_correction: bool = True
    """Weigh by ρ, how much likelier the learner finds a token than the sampler did (TRL's name; the sampler here is
    Troupe's own generator, with its older weights and other kernels)."""
    vllm_importance_sampling_mode: CorrectionMode = "sequence_mask"
    """See `comparisons.sampler_correction`."""
    vllm_importance_sampling_clip_min: NonNegative | None = None
    """Lower bound of ρ; None is no bound."""
    vllm_importance_sampling_clip_max: NonNegative | None = 3.0
    """Upper bound of ρ."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lanes & (self.lanes - 1):
            raise ValueError(f"lanes is {self.lanes}, but lanes are added as a binary tree; give a power of two")
        checked_scale(self.advantage, self.scale_rewards)
        checked_aggregation(self.advantage, self.multi_objective_aggregation)
        if self.loss_type == "rloo" and self.turn_advantages != "off":
            raise ValueError(
                f'turn_advantages is "{self.turn_advantages}", but loss_type "rloo" weighs whole completions; leave '
                "turn_advantages out or take another loss_type"
            )
        if self.sync_ref_model and self.beta == 0.0:
            raise ValueError(
                "sync_ref_model is on and beta is 0, so that there is no reference policy to synchronize; "
                "set beta above 0 or leave sync_ref_model off"
            )

    @property
    def scale(self) -> ScaleRewards:
        """What advantages are divided by, `scale_rewards` or what goes with the advantage."""
        return checked_scale(self.advantage, self.scale_rewards)
