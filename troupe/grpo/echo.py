"""ECHO: besides the policy's own tokens it learns to foresee what it observes (Shrivastava et al. 2026, "Terminal
Agents Learn World Models for Free", arXiv:2605.24517).

    L = L_policy + α · 1/N Σᵢ 1/|Oᵢ| Σ_{t ∈ Oᵢ} −log π(oₜ)

Oᵢ are the observed tokens of completion i, in all its rows, N the completions that have any. The log-probs are those of
the same forward pass, under the distribution that completions are sampled from (`generation.temperature`).

Shapes: B rows, T completion tokens.
"""

import mlx.core as mx

from troupe.grpo.batch import Batch
from troupe.grpo.tallies import Tallies, tally


def observation_weights(batch: Batch) -> mx.array | None:
    """(B, T) float32: what −log π of each observed token counts, 1 / (N · |Oᵢ|), and 0 elsewhere; of the whole batch,
    before it is cut. None: nothing was observed."""
    if batch.observed is None:
        return None
    counts: list[float] = mx.sum(batch.observed, axis=1).tolist()  # type: ignore[assignment]
    samples = range(batch.num_rows) if batch.samples is None else batch.samples
    totals: dict[int, float] = {}
    for sample, count in zip(samples, counts, strict=True):
        totals[sample] = totals.get(sample, 0.0) + count
    N = sum(total > 0 for total in totals.values())
    if not N:
        return None
    each = mx.array([1.0 / (N * totals[sample]) if totals[sample] else 0.0 for sample in samples])
    return batch.observed * each[:, None]


def echo_loss(log_probs: mx.array, weights: mx.array, alpha: float) -> tuple[mx.array, Tallies]:
    """What is added to the loss of a micro-batch, (), and `echo/loss`: nats an observed token. `log_probs` (B, T) and
    `weights`, as `observation_weights` has them, (B, T)."""
    observed = (weights > 0).astype(mx.float32)
    nats = -mx.where(weights > 0, log_probs.astype(mx.float32), 0.0)
    return alpha * mx.sum(weights * nats), {"echo/loss": mx.stop_gradient(tally(nats, observed))}
