"""How long to wait before something that failed is tried again."""

import math

_MOST_DOUBLINGS = 32


def backoff_s(nth: int, first_s: float, longest_s: float = math.inf, jitter: float = 1.0) -> float:
    """min(longest, first·2ⁿ⁻¹)·(½ + ½u) seconds before the n-th further attempt, n ≥ 1.

    `jitter`: u, uniform in [0, 1], so that what failed together does not come back together; 1: the whole pause.
    """
    return min(longest_s, first_s * 2.0 ** min(nth - 1, _MOST_DOUBLINGS)) * (0.5 + 0.5 * jitter)
