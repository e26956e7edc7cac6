"""The reference policy that the KL term compares with, where it follows the policy."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx


def sync_reference(
    reference: Mapping[str, mx.array], policy: Mapping[str, mx.array], alpha: float
) -> dict[str, mx.array]:
    """π_ref ← α·π + (1 − α)·π_ref for every weight (TR-DPO, Gorbatovski et al. 2024, arXiv:2404.09656, "soft update").

    `reference` and `policy` have the same names and shapes; the result has the dtypes of the reference and is computed
    in float32, lazily. α = 1 makes it the policy, α = 0 leaves it. Raises `ValueError` where the names differ.
    """
    if reference.keys() != policy.keys():
        odd = sorted(reference.keys() ^ policy.keys())
        raise ValueError(
            f"reference and policy do not have the same weights ({odd[0]} is in one alone); give one model twice"
        )
    return {
        name: (alpha * policy[name].astype(mx.float32) + (1.0 - alpha) * old.astype(mx.float32)).astype(old.dtype)
        for name, old in reference.items()
    }
