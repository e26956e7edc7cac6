"""Which tokens of a whole batch a loss type treats otherwise: chosen by their rank among all of its tokens, so that it
does not matter how the batch is cut.

Clip-Cov and KL-Cov choose by covariance, M2PO by the second moment of the ratios. Equal values are ranked by their
place in the batch, and what is drawn is a hash of (seed, pass over the batch, the row's slot, the token's place).

Shapes: N places, those of all rows of the batch one behind the other, padding included; B rows, T completion tokens.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import mlx.core as mx

from troupe.grpo.comparisons import masked_difference, upper_epsilon
from troupe.grpo.config import LossConfig
from troupe.policy.network.dropout import mixed_bits

_LAST = 2**32 - 1


class Places(NamedTuple):
    """What is chosen by, (N,) or (B, T) each, without gradient."""

    log_probs: mx.array
    """ℓ."""
    log_ratio: mx.array
    """ℓ − ℓo."""
    sampler_log_ratio: mx.array
    """ℓ − ℓs."""
    advantages: mx.array
    mask: mx.array
    draws: mx.array
    """uint32, see `draws`."""

    @classmethod
    def of(
        cls,
        log_probs: mx.array,
        old: mx.array,
        sampling: mx.array,
        advantages: mx.array,
        mask: mx.array,
        drawn: mx.array | None = None,
    ) -> "Places":
        """Those of B rows, (B, T) each, the advantages (B,) or (B, T). Where nothing is `drawn` rows are told apart by
        their number."""
        B, T = mask.shape
        spread = mx.broadcast_to(advantages if advantages.ndim == 2 else advantages[:, None], (B, T))
        log_probs = log_probs.astype(mx.float32)
        places = cls(
            log_probs=log_probs,
            log_ratio=masked_difference(log_probs, old, mask),
            sampler_log_ratio=masked_difference(log_probs, sampling, mask),
            advantages=spread,
            mask=mask,
            draws=draws(range(B), T) if drawn is None else drawn,
        )
        return cls(*map(mx.stop_gradient, places))

    @classmethod
    def joined(cls, parts: "Sequence[Places]") -> "Places":
        """Those of several parts of a batch, in a line."""
        columns = zip(*parts, strict=True)
        return cls(*(mx.concatenate([column.reshape(-1) for column in several]) for several in columns))


def known_log_probs(sampling: mx.array, old: mx.array) -> mx.array:
    """ℓs (B, T), and ℓo where it is NaN, which is not known."""
    return mx.where(mx.isnan(sampling), old, sampling)


Choice = Callable[[Places, LossConfig], mx.array]
"""Places (N,) → (N,) float32, 1 where the token is chosen, 0 elsewhere and on padding."""


def chosen_tokens(choice: Choice, parts: Sequence[Places], config: LossConfig) -> list[mx.array]:
    """What a choice takes of a batch in several parts: of each part (B, T), as `Choice` has it."""
    flat = choice(Places.joined(parts), config)
    edges = list(accumulate(part.mask.size for part in parts))[:-1]
    return [taken.reshape(part.mask.shape) for taken, part in zip(mx.split(flat, edges), parts, strict=True)]


def draws(rows: Sequence[int], T: int, *, seed: int = 0, pass_number: int = 0) -> mx.array:
    """(B, T) uint32, one a token; `rows` (B,) are numbers below 2³² by which rows are told apart wherever they are."""
    salt = int.from_bytes(hashlib.sha256(f"choice:{seed}:{pass_number}".encode()).digest()[:4], "little")
    starts = mx.array([row ^ salt for row in rows], mx.uint32)[:, None]
    columns = mx.arange(T).astype(mx.uint32) * mx.array(0x9E3779B9, mx.uint32)
    return mixed_bits(mixed_bits(starts) + columns)


def by_clip_cov(x: Places, config: LossConfig) -> mx.array:
    """Clip-Cov's tokens, which have no gradient (Cui et al. 2025, arXiv:2505.22617, as in verl).

    Of the tokens that PPO's clip leaves alone and whose covariance lies strictly between `clip_cov_lb` and
    `clip_cov_ub`, max(⌊clip_cov_ratio · tokens⌋, 1) drawn at random.
    """
    ratio = mx.exp(x.log_ratio)
    held = mx.clip(ratio, 1.0 - config.epsilon, 1.0 + upper_epsilon(config))
    is_clipped = ratio * x.advantages > held * x.advantages
    cov = _covariances(x)
    among = (x.mask > 0) & mx.logical_not(is_clipped) & (cov > config.clip_cov_lb) & (cov < config.clip_cov_ub)
    return _first(x.draws, among, _part(x, config.clip_cov_ratio))


def by_kl_cov(x: Places, config: LossConfig) -> mx.array:
    """KL-Cov's tokens, which pay for leaving the old policy (Cui et al. 2025, arXiv:2505.22617, as in verl).

    The max(⌊kl_cov_ratio · tokens⌋, 1) tokens of highest covariance.
    """
    return _first(-_covariances(x), x.mask > 0, _part(x, config.kl_cov_ratio))


def by_second_moment(x: Places, config: LossConfig) -> mx.array:
    """The tokens that M2PO leaves out (Zheng et al. 2025, arXiv:2510.01161).

    Compared are the tokens that an update has moved where their advantage points: A > 0 and π > μ, or A < 0 and π < μ,
    as in the authors' code. Those with the largest log²(π/μ) are left out until the mean of log²(π/μ) over the others
    is at most `m2_threshold`, as in the paper and in AReaL, which compares all tokens. The authors' code differs in
    what it counts: a token that is left out still counts, with the limit's square, and none within 0.7 to 1.5 is.
    """
    moved = x.sampler_log_ratio
    among = (x.mask > 0) & (moved * x.advantages > 0)
    squares = mx.square(moved)
    rising = mx.sort(mx.where(among, squares, math.inf))
    means = mx.cumsum(rising) / (mx.arange(rising.size) + 1)
    dropped = mx.sum(among) - mx.sum(means <= config.m2_threshold)
    return _first(-squares, among, dropped)


def _covariances(x: Places) -> mx.array:
    """(A − mean A)·(ℓ − mean ℓ), means over the tokens."""
    count = mx.maximum(mx.sum(x.mask), 1.0)
    kept = x.mask > 0
    mean_advantage = mx.sum(mx.where(kept, x.advantages, 0.0)) / count
    mean_log_prob = mx.sum(mx.where(kept, x.log_probs, 0.0)) / count
    return (x.advantages - mean_advantage) * (x.log_probs - mean_log_prob)


def _part(x: Places, ratio: float) -> mx.array:
    """max(⌊ratio · tokens⌋, 1), as float64 has it."""
    tokens: Any = mx.sum(x.mask).item()
    return mx.array(max(int(ratio * tokens), 1))


def _first(values: mx.array, among: mx.array, count: mx.array) -> mx.array:
    """1 for the `count` smallest values of the places `among`, or for all of them where there are fewer."""
    count = mx.minimum(count, mx.sum(among))
    last = mx.array(_LAST, values.dtype) if values.dtype == mx.uint32 else mx.array(math.inf, values.dtype)
    limit = mx.sort(mx.where(among, values, last))[mx.maximum(count - 1, 0)]
    below = among & (values < limit)
    equal = among & (values == limit)
    place = mx.cumsum(equal.astype(mx.int32))
    return ((count > 0) & (below | (equal & (place <= count - mx.sum(below))))).astype(mx.float32)
