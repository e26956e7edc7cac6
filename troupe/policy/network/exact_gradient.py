"""The gradient of attention on NVIDIA cards, written out so that every sum has one order.

MLX 0.32 asks cuDNN for the gradient of its fused attention without the option for sums in a fixed order: parts of a
query's gradient are added as they come, and from three blocks of keys on (about 256 tokens) the same numbers give other
bits each time. What stands here gives the same bits, from matrix products and reductions that do. Scores are float32,
as within the fused kernel; the powers that are multiplied have the type of the queries.
"""

import mlx.core as mx

from troupe.policy.network.elementwise import compiled

_BLOCK = 320
"""About so many queries are taken together: each block meets only the keys that it may see."""


def exact_gradient(
    q: mx.array, k: mx.array, v: mx.array, o_grad: mx.array, o: mx.array, *, scale: float, window: int | None = None
) -> list[mx.array]:
    """The cotangents of queries (B, H, S, d), keys and values (B, K, S, d), from `o_grad`, that of the result `o`, both
    (B, H, S, d). A place sees itself and those before it, with a `window` so many in all."""
    B, H, S, d = q.shape
    K = k.shape[1]
    scaled, of_outputs = (x.reshape(B, K, H // K, S, d) for x in (q * scale, o_grad))
    mean = mx.sum(o_grad.astype(mx.float32) * o.astype(mx.float32), axis=-1, keepdims=True)
    mean = mean.reshape(B, K, H // K, S, 1)
    wide = k.astype(mx.float32)
    q_grads: list[mx.array] = []
    k_grad: mx.array | None = None
    v_grad: mx.array | None = None
    size = -(-S // max(1, S // _BLOCK))
    for start in reversed(range(0, S, size)):
        stop = min(start + size, S)
        queries, o_grads, means = (
            x[:, :, :, start:stop].reshape(B, K, -1, x.shape[-1]) for x in (scaled, of_outputs, mean)
        )
        scores = queries.astype(mx.float32) @ wide[:, :, :stop].swapaxes(-1, -2)
        powers = mx.softmax(scores + _bias(start, stop, window, H // K), axis=-1).astype(q.dtype)
        grad = compiled(_through_softmax, powers.shape)(powers, o_grads @ v[:, :, :stop].swapaxes(-1, -2), means)
        k_grad = _added(k_grad, grad.swapaxes(-1, -2) @ queries)
        v_grad = _added(v_grad, powers.swapaxes(-1, -2) @ o_grads)
        q_grads.append((grad @ k[:, :, :stop]).reshape(B, K, H // K, stop - start, d))
    assert k_grad is not None
    assert v_grad is not None
    return [mx.concatenate(q_grads[::-1], axis=3).reshape(q.shape) * scale, k_grad, v_grad]


def _through_softmax(powers: mx.array, grad: mx.array, mean: mx.array) -> mx.array:
    """The cotangent of scores from that of their powers. `mean`: Σ of powers times cotangent, which is that of result
    times its own."""
    return (powers.astype(mx.float32) * (grad.astype(mx.float32) - mean)).astype(powers.dtype)


def _bias(start: int, stop: int, window: int | None, heads_per_key: int) -> mx.array:
    """Added to the scores of queries [start, stop), float32 (H/K·b, stop): −∞ where a key is out of sight."""
    queries, keys = mx.arange(start, stop)[:, None], mx.arange(stop)
    sees = keys <= queries
    if window is not None:
        sees = mx.logical_and(sees, keys > queries - window)
    return mx.tile(mx.where(sees, 0.0, -mx.inf), (heads_per_key, 1))


def _added(total: mx.array | None, x: mx.array) -> mx.array:
    """Sums over blocks of queries, (B, K, s, d): those that come later have fewer keys."""
    if total is None:
        return x
    keys = x.shape[2]
    return mx.concatenate([total[:, :, :keys] + x, total[:, :, keys:]], axis=2)
