"""Metrics that add up over micro-batches.

A *tally* is a mean in two parts, an array (2,) of total and count; under a name that ends in "min" or "max" it is the
extreme itself, an array (), NaN where there was nothing to look at. Tallies of micro-batches merge into exactly those
of the whole batch.

Shapes: B rows, T completion tokens; x (B, T) or (B, 1), the mask (B, T).
"""

import math
from collections.abc import Mapping, Sequence

import mlx.core as mx

Tallies = dict[str, mx.array]


def tally(x: mx.array, mask: mx.array) -> mx.array:
    """Total and count of x over the unmasked tokens, or over the rows where x has one column. float32 (2,).

    As in TRL, a quantity of one value a row counts every row, the fully masked ones too.
    """
    if x.shape[1] == 1:
        return mx.stack([mx.sum(x), mx.array(float(x.shape[0]))])
    return mx.stack([mx.sum(mx.where(mask > 0, x, 0.0)), mx.sum(mask)])


def row_fractions(x: mx.array, mask: mx.array) -> mx.array:
    """The mean of x over the unmasked tokens of each row, (B,); NaN in a row without tokens."""
    return x[:, 0] if x.shape[1] == 1 else mx.sum(x * mask, axis=1) / mx.sum(mask, axis=1)


def nan_min(x: mx.array) -> mx.array:
    """The smallest number in x, NaN if there is none. ()."""
    smallest = mx.min(mx.where(mx.isnan(x), math.inf, x))
    return mx.where(mx.all(mx.isnan(x)), math.nan, smallest)


def nan_max(x: mx.array) -> mx.array:
    """The largest number in x, NaN if there is none. ()."""
    return -nan_min(-x)


def merge(parts: Sequence[Mapping[str, mx.array]]) -> Tallies:
    """The tallies of all parts together; the parts have the same names."""
    if len(parts) == 1:
        return dict(parts[0])
    merged: Tallies = {}
    for name in parts[0]:
        values = mx.stack([part[name] for part in parts])
        if name.endswith("min"):
            merged[name] = nan_min(values)
        elif name.endswith("max"):
            merged[name] = nan_max(values)
        else:
            merged[name] = mx.sum(values, axis=0)
    return merged


def averages(tallies: Mapping[str, mx.array]) -> Tallies:
    """Name → float32 () mean or extreme; the mean of nothing is 0."""
    return {name: value if value.ndim == 0 else value[0] / mx.maximum(value[1], 1.0) for name, value in tallies.items()}
