"""One step of GRPO by hand: from prompts to new weights with the pure functions, without an actor.

    python examples/one_step.py

Read it from top to bottom, or run it cell by cell in an editor that knows `# %%`. It takes the demo's policy, a sloppy
adder, and prints the figures at each station: rollouts → rewards → advantages → loss → gradient → AdamW. What can be
worked out with a pencil is worked out again, and compared. Takes two seconds on a CPU.
"""

from __future__ import annotations

import statistics

import troupe  # first: on Linux it makes MLX's matrix products fast

# isort: split
import mlx.core as mx

from troupe.cli.demo import DEMO_CONFIG
from troupe.grpo import (
    LearnerConfig,
    LossConfig,
    adamw_init,
    adamw_update,
    clip_by_global_norm,
    compute_advantages,
    grpo_loss,
    make_batch,
    train_on_batch,
)
from troupe.policy import GenerationConfig, Weights, completion_statistics, generate_batch, load_policy
from troupe.rewards import exact_answer_reward

# %% 1. The policy: a config, and a flat dict of arrays under the names of Hugging Face.
policy = load_policy(troupe.load_config(DEMO_CONFIG).model.path)
numbers = sum(array.size for array in policy.weights.values())
print(f"1. the policy: {len(policy.weights)} arrays, {numbers:,} numbers")

# %% 2. Rollouts: G completions of each of P prompts, sampled at temperature 1 so that they differ.
# `log_probs` are what each sampled token was worth to the policy that sampled it; the loss will want them.
P_PROMPTS = [("27+58=", "85"), ("69+95=", "164"), ("31+46=", "77"), ("88+94=", "182")]
G = 8
rollouts = generate_batch(
    policy, [prompt for prompt, _ in P_PROMPTS], G, GenerationConfig(temperature=1.0, max_completion_length=8), seed=0
)
answers = [answer for _, answer in P_PROMPTS for _ in range(G)]
lengths = [len(ids) for ids in rollouts.completion_ids]
print(f"2. rollouts: {len(lengths)} completions of {min(lengths)} to {max(lengths)} tokens, the end of text included")
for row, (prompt, _) in enumerate(P_PROMPTS):
    print(f"     {prompt:<8}", *rollouts.texts[row * G : (row + 1) * G])

# %% 3. Rewards: one score a completion. Yours would be another function with the same signature.
rewards = [float(score or 0.0) for score in exact_answer_reward(rollouts.texts, answer=answers)]
print(f"3. rewards: {sum(rewards):.0f} of {len(rewards)} are right")

# %% 4. Advantages: how much better a completion is than the others of its prompt, in standard deviations.
# No critic: the group is its own yardstick. Where all G are right (the third sum has nothing to carry), or all are
# wrong, every advantage is 0 and there is nothing to learn.
advantages = compute_advantages(mx.array(rewards), G)
print("4. advantages, a line a prompt:")
for row in range(len(P_PROMPTS)):
    print("    ", *(f"{float(a):+.2f}" for a in advantages[row * G : (row + 1) * G]))

# By hand, for the first prompt: (r − mean) / (σ + 1e-4), σ with n − 1 in the denominator.
group = rewards[:G]
spread = statistics.stdev(group)
by_hand = [(r - statistics.mean(group)) / (spread + 1e-4) for r in group]
assert all(abs(float(a) - b) < 1e-5 for a, b in zip(advantages[:G], by_hand, strict=True))
print("     by hand, the first line is the same:", *(f"{a:+.2f}" for a in by_hand))

# %% 5. The batch: the same rows as arrays, prompts padded on the left and completions on the right, with a mask.
batch = make_batch(
    rollouts.prompt_ids,
    rollouts.completion_ids,
    rollouts.log_probs,
    advantages,
    pad_id=policy.tokenizer.pad_token_id or 0,
)
print(f"5. batch: prompts {batch.prompt_ids.shape}, completions {batch.completion_ids.shape}")

# %% 6. The loss: how likely is each token now, against when it was sampled, times the advantage of its row.
# Before the first update "now" is "then": every ratio is 1, nothing is clipped.
loss_config = LossConfig(loss_type="dapo", epsilon=0.2, epsilon_high=0.28)


def loss_of(weights: Weights) -> tuple[mx.array, dict[str, mx.array]]:
    """The loss as a function of the weights, which is what one differentiates."""
    log_probs, entropies = completion_statistics(policy.config, weights, batch.prompts, batch.completions)
    return grpo_loss(
        log_probs, None, batch.advantages, batch.completion_mask, loss_config, entropies=mx.stop_gradient(entropies)
    )


(loss, metrics), gradient = mx.value_and_grad(loss_of)(policy.weights)
again, _ = completion_statistics(policy.config, policy.weights, batch.prompts, batch.completions)
apart = float(mx.max(mx.abs((again - batch.sampling_log_probs) * batch.completion_mask)))
print(f"6. loss {float(loss):+.5f}, entropy {float(metrics['entropy']):.3f} nats a token")
print(f"     the learner and the sampler agree on every log-probability within {apart:.0e}")

# By hand: with ratios of 1 the loss is −Σ A·T / ΣT over the rows, T their tokens. Its value says little, and is about
# 0 whatever happens; its gradient is what counts.
pencil = -sum(float(a) * t for a, t in zip(advantages, lengths, strict=True)) / sum(lengths)
assert abs(float(loss) - pencil) < 1e-5
print(f"     by hand, −Σ A·T / ΣT = {pencil:+.5f}")

# %% 7. The gradient: one array for each of the weights, held to a norm of at most 1.
clipped, norm = clip_by_global_norm(gradient, 1.0)
print(f"7. gradient: norm {float(norm):.4f}, clipped to {min(1.0, float(norm)):.4f}")

# %% 8. AdamW: new weights and a new state; the old ones stay as they are.
LR = 2e-4
new_weights, state = adamw_update(policy.weights, clipped, adamw_init(policy.weights), lr=LR)
furthest = max(float(mx.max(mx.abs(new_weights[name] - policy.weights[name]))) for name in new_weights)
print(f"8. AdamW: update {float(state['step']):.0f}; no weight moved by more than {furthest:.1e}")
# By hand: in the first update m/√v is the sign of the gradient, so a weight moves by the learning rate, no more.
assert furthest < LR * 1.001

# %% 9. What came of it: right answers are likelier than before, wrong ones less likely.
new, _ = completion_statistics(policy.config, new_weights, batch.prompts, batch.completions)
before = mx.sum(again * batch.completion_mask, axis=1)
after = mx.sum(new * batch.completion_mask, axis=1)
print("9. the likelihood of the same completions, before and after:")
for text in dict.fromkeys(rollouts.texts[:G]):
    row = rollouts.texts.index(text)
    print(
        f"     {P_PROMPTS[0][0]}{text:<4} reward {rewards[row]:.0f}"
        f"   {float(mx.exp(before[row])):6.1%} → {float(mx.exp(after[row])):6.1%}"
    )
gain = float(mx.sum((after - before) * batch.advantages))
assert gain > 0.0
print(f"     Σ A·Δlog p over all rows: {gain:+.3f}, which is above 0: the step went the right way")

# %% 10. The same in one call, as the Learner does it: in micro-batches, whose gradients are added up.
learner = LearnerConfig(loss_type="dapo", epsilon=0.2, epsilon_high=0.28, gradient_accumulation_steps=2)
told = train_on_batch(
    policy.weights,
    adamw_init(policy.weights),
    batch,
    lambda weights, batch: completion_statistics(policy.config, weights, batch.prompts, batch.completions),
    learner,
    lr=LR,
).metrics
assert abs(told["grad_norm"] - float(norm)) < 1e-3 * float(norm)
print(f"10. train_on_batch says: loss {told['loss']:+.5f}, gradient norm {told['grad_norm']:.4f}")
