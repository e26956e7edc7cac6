"""On-policy distillation: what a teacher's log-probs of the sampled tokens add to their advantages.

    A_t = ρ · A + c · (log π_T(a_t) − log π(a_t)),  log π as the policy sampled a_t

A is what the rewards give, ρ `teacher.reward_coef`, c `teacher.coef`. The second part is what a step down the reverse
KL divergence KL(π ‖ π_T) of each token's distribution asks for, by the token that was sampled and without looking at
those that follow it (Lu, "On-Policy Distillation", Thinking Machines Lab, 2025). With ρ = 0 and on-policy, its loss is
that of TRL 1.16's IWOPDTrainer with `iw_opd_gamma` 0, and its gradient in the mean that of Σ_t KL(π ‖ π_T) of the
positions visited.

Shapes: B rows, T completion tokens.
"""

import mlx.core as mx


def distilled_advantages(
    advantages: mx.array,
    teacher_log_probs: mx.array,
    sampling_log_probs: mx.array,
    *,
    coef: float,
    reward_coef: float = 1.0,
) -> mx.array:
    """(B, T) float32, a constant to the gradient. `advantages` (B,) or (B, T) of the rewards; both log-probs (B, T), in
    nats, at one temperature."""
    of_rewards = advantages if advantages.ndim == 2 else advantages[:, None]
    lead = teacher_log_probs.astype(mx.float32) - sampling_log_probs.astype(mx.float32)
    return mx.stop_gradient(reward_coef * of_rewards + coef * lead)


def sampled_divergence(teacher_log_probs: mx.array, sampling_log_probs: mx.array, mask: mx.array) -> mx.array:
    """The mean of log π − log π_T over the unmasked tokens, (): by these samples KL(π ‖ π_T) in nats a token, which for
    few of them may come out below 0."""
    return mx.sum((sampling_log_probs - teacher_log_probs) * mask) / mx.maximum(mx.sum(mask), 1.0)
