"""Rows of an embedding table, with a gradient that is the same each time.

MLX adds up the gradients of equal ids by atomic additions on a GPU, in whatever order they come. Here each id's are
added up in the order of the tokens: on a CPU by the one thread that adds there, elsewhere by segmented sums of doubling
reach (Hillis & Steele 1986, doi:10.1145/7902.7903).
"""

from __future__ import annotations

from typing import cast

import mlx.core as mx

from troupe.policy.network.elementwise import is_on_cpu


def embed(table: mx.array, ids: mx.array) -> mx.array:
    """Table (V, D), integer ids (…) → (…, D)."""
    if is_on_cpu():  # one thread adds in order
        return table[ids]
    look_up = mx.custom_function(lambda table: table[ids])

    @look_up.vjp
    def vjp(table: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        return sum_by_id(cotangent.reshape(-1, table.shape[1]), ids.reshape(-1), table.shape[0])

    return cast(mx.array, look_up(table))


def sum_by_id(x: mx.array, ids: mx.array, size: int) -> mx.array:
    """(n, D) and ids (n,) in [0, size) → (size, D), whose row i is the sum of the x of id i, summed in float32."""
    if is_on_cpu():
        return mx.zeros((size, x.shape[1])).at[ids].add(x.astype(mx.float32)).astype(x.dtype)
    n = ids.shape[0]
    order = mx.argsort(ids.astype(mx.int64) * n + mx.arange(n))
    run = ids[order]
    sums = x[order].astype(mx.float32)
    reach = 1
    while reach < n:  # row j holds the sum of its run over [j, j + reach)
        same = mx.concatenate([run[reach:] == run[:-reach], mx.zeros(reach, mx.bool_)])
        further = mx.concatenate([sums[reach:], mx.zeros((reach, x.shape[1]))])
        sums = sums + mx.where(same[:, None], further, 0.0)
        reach *= 2
    is_first = mx.concatenate([mx.ones(1, mx.bool_), run[1:] != run[:-1]])
    # the first row of each run goes to its id, all others beyond the end of the table
    place = mx.where(is_first, run, size)
    return mx.zeros((size + 1, x.shape[1]), x.dtype).at[place].add(sums.astype(x.dtype))[:size]
