"""The two ends of the vocabulary: rows of the embedding, and log-probabilities and entropies of chosen tokens.

An embedding's gradient is the same each time. MLX adds up those of equal ids by atomic additions on a GPU, in whatever
order they come. Here each id's are added up in the order of the tokens: on a CPU by the one thread that adds there,
elsewhere by segmented sums of doubling reach (Hillis & Steele 1986, doi:10.1145/7902.7903).

The head never holds all logits: M tokens times a vocabulary of 151,936 would fill gigabytes, several times over when
differentiated. So the vocabulary is taken in blocks, forwards and, with a gradient of its own, backwards, where each
block's logits are computed again.

Shapes: M tokens, D hidden size, V vocabulary. Logits have the type of the weights, all that follows is float32.
"""

import math
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import mlx.core as mx

from troupe.policy.network.elementwise import compiled, exponential, is_on_cpu
from troupe.policy.network.fused_kernels import has_kernels, row_sums
from troupe.policy.network.linear import Linear

Result = TypeVar("Result")

BLOCK_NUMBERS = 2**26
"""Most logits of a block: large enough to keep a GPU busy."""
BLOCK_NUMBERS_ON_CPU = 2**21
"""The same for processors, whose caches want small blocks."""


class TokenStatistics(NamedTuple):
    """Of M tokens, float32 (M,) each, in nats, under softmax(logits / temperature)."""

    log_probs: mx.array
    entropies: mx.array


def token_statistics(hidden: mx.array, head: Linear, targets: mx.array, temperature: float) -> TokenStatistics:
    """Of the tokens `targets` (M,), foretold by `hidden` (M, D) through the rows of `head` (V, D). Differentiable by
    `hidden`, and by the weight of a head that is not packed."""

    @mx.custom_function
    def statistics(hidden: mx.array, weight: mx.array) -> Any:
        return result(head_forward(hidden, head._replace(weight=weight), targets, temperature))

    @statistics.vjp
    def vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
        hidden, weight = primals
        of_head = head.scales is None
        blocks = head_backward(
            hidden, head._replace(weight=weight), targets, temperature, outputs, cotangents[:2], of_head=of_head
        )
        hidden_grad, head_grad = result(blocks)
        return hidden_grad, mx.zeros_like(weight) if head_grad is None else head_grad

    log_probs, entropies, *_ = cast("tuple[mx.array, ...]", statistics(hidden, head.weight))
    return TokenStatistics(log_probs, entropies)


def result(blocks: Generator[Any, None, Result]) -> Result:
    """What all blocks come to, nothing computed in between."""
    while True:
        try:
            next(blocks)
        except StopIteration as end:
            result: Result = end.value
            return result


def head_forward(
    hidden: mx.array, head: Linear, targets: mx.array, temperature: float
) -> Generator[tuple[mx.array, ...], None, tuple[mx.array, mx.array, mx.array, mx.array]]:
    """Returns log-probabilities, entropies, log Σ e^ℓ and margins of M tokens, (M,) each; arguments as for
    `token_statistics`. A margin is how far a token's logit lies below the largest: 0 where none is likelier, else less.

    Yields what each block of the vocabulary comes to: who waits for one before the next bounds the memory, whatever
    MLX does; not within a gradient.
    """
    scale = 1.0 / temperature
    chosen = mx.zeros(hidden.shape[0])
    best = normalizer = entropies = mx.array(
        -math.inf
    )  # log Σ e^ℓ over the blocks so far, and the entropies within them
    for block in _blocks(head.size, hidden.shape[0]):
        logits = head.rows(block)(hidden)
        peak, total, weighted = _sums(logits, scale)
        log_total = mx.log(total)
        block_entropies, block_normalizer = log_total - weighted / total, peak + log_total
        chosen = mx.where(_is_in(targets, block), _pick(logits, targets, block) * scale, chosen)
        best = mx.maximum(best, peak)
        if block.start == 0:
            normalizer, entropies = block_normalizer, block_entropies
        else:
            joint = mx.logaddexp(normalizer, block_normalizer)
            before, here = normalizer - joint, block_normalizer - joint  # log of the share of each
            entropies = mx.exp(before) * (entropies - before) + mx.exp(here) * (block_entropies - here)
            normalizer = joint
        hidden = mx.depends(hidden, [chosen, normalizer, entropies])  # one block after the other
        yield chosen, normalizer, entropies
    return chosen - normalizer, entropies, normalizer, chosen - best


def head_backward(
    hidden: mx.array,
    head: Linear,
    targets: mx.array,
    temperature: float,
    outputs: Sequence[mx.array],
    cotangents: Sequence[mx.array | None],
    *,
    of_head: bool = True,
) -> Generator[tuple[mx.array, ...], None, tuple[mx.array, mx.array | None]]:
    """Returns the cotangents of `hidden` and, with `of_head`, of the head, from those (M,) of log-probabilities and
    entropies.

    `outputs` are what `head_forward` returns; yields as it does. None for the entropies, which then count as
    constants, spares a third of the work; a head that is not trained another.
    """
    scale = 1.0 / temperature
    log_probs, entropies, normalizer = (x[:, None] for x in outputs[:3])
    of_log_probs, of_entropies = (None if x is None else x[:, None] * scale for x in cotangents)
    assert of_log_probs is not None
    rest = -mx.expm1(log_probs)  # 1 − p of the target, precisely
    weighted = (hidden.astype(mx.float32) * of_log_probs).astype(hidden.dtype)
    hidden_grad = mx.zeros(hidden.shape)
    head_grads: list[mx.array] = []
    for block in _blocks(head.size, hidden.shape[0]):
        part = head.rows(block)
        logits = part(hidden)
        columns = mx.arange(block.start, block.stop)
        # without the cotangent of each row, which enters through `weighted` and at the end
        grad = compiled(_log_prob_grad, logits.shape)(logits, scale, normalizer, columns, targets[:, None], rest)
        here, of_part = part.gradients(weighted, grad, trained=of_head)
        hidden_grad = hidden_grad + here.astype(mx.float32) * of_log_probs
        head_grad = of_part.get("")
        if of_entropies is not None:
            grad = compiled(_entropy_grad, logits.shape)(logits, scale, normalizer, entropies, of_entropies)
            here, of_part = part.gradients(hidden, grad, trained=of_head)
            head_grad = None if head_grad is None else head_grad + of_part[""]
            hidden_grad = hidden_grad + here.astype(mx.float32)
        if head_grad is None:
            hidden, weighted = mx.depends([hidden, weighted], [hidden_grad])
            yield (hidden_grad,)
            continue
        head_grads.append(head_grad)
        hidden, weighted = mx.depends([hidden, weighted], [hidden_grad, head_grad])
        yield hidden_grad, head_grad
    return hidden_grad.astype(hidden.dtype), mx.concatenate(head_grads) if of_head else None


def _sums(logits: mx.array, scale: float) -> tuple[mx.array, mx.array, mx.array]:
    """Of each row (M, V) times `scale`: its peak, and Σ e^z and Σ e^z·z of what is below it."""
    if has_kernels() and logits.size:  # a launch without blocks is refused
        return row_sums(logits, scale)
    peak = mx.max(logits, axis=-1).astype(mx.float32) * scale
    powers, weighted = _powers(logits, scale, peak[:, None])
    return peak, mx.sum(powers, axis=-1), mx.sum(weighted, axis=-1)


def _powers(logits: mx.array, scale: float, peak: mx.array) -> tuple[mx.array, mx.array]:
    """e^(ℓ − peak), and that times ℓ − peak."""
    if is_on_cpu():  # where a loop with two results is five times as long as one with one
        powers = compiled(_below_powers, logits.shape)(logits, scale, peak)
        return powers, compiled(_times_below, logits.shape)(powers, logits, scale, peak)
    return cast("tuple[mx.array, mx.array]", compiled(_both_powers, logits.shape)(logits, scale, peak))


def _both_powers(logits: mx.array, scale: float, peak: mx.array) -> tuple[mx.array, mx.array]:
    powers = _below_powers(logits, scale, peak)
    return powers, _times_below(powers, logits, scale, peak)


def _below_powers(logits: mx.array, scale: float, peak: mx.array) -> mx.array:
    return exponential(logits.astype(mx.float32) * scale - peak)


def _times_below(powers: mx.array, logits: mx.array, scale: float, peak: mx.array) -> mx.array:
    return powers * (logits.astype(mx.float32) * scale - peak)


def _log_prob_grad(
    logits: mx.array, scale: float, normalizer: mx.array, columns: mx.array, targets: mx.array, rest: mx.array
) -> mx.array:
    """∂ log p_a / ∂ℓ_v: −p_v, but `rest` for the target a; in the type of the logits."""
    shares = exponential(logits.astype(mx.float32) * scale - normalizer)
    return mx.where(columns == targets, rest, -shares).astype(logits.dtype)


def _entropy_grad(
    logits: mx.array, scale: float, normalizer: mx.array, entropies: mx.array, of_entropies: mx.array
) -> mx.array:
    """∂H / ∂ℓ_v = −p_v·(log p_v + H) times the cotangent (M, 1) of H, in the type of the logits."""
    log_shares = logits.astype(mx.float32) * scale - normalizer
    return (-of_entropies * exponential(log_shares) * (log_shares + entropies)).astype(logits.dtype)


def block_rows(M: int, *, on_cpu: bool) -> int:
    """Rows of the head that are taken together for M tokens: a multiple of 256."""
    if on_cpu:  # where a sum goes from one end to the other, and few terms keep it precise
        return min(8192, max(256, BLOCK_NUMBERS_ON_CPU // max(1, M) // 256 * 256))
    return max(256, BLOCK_NUMBERS // max(1, M) // 256 * 256)


def _blocks(V: int, M: int) -> Iterator[slice]:
    """The vocabulary in blocks, of which the last may be smaller."""
    size = block_rows(M, on_cpu=is_on_cpu())
    return (slice(start, min(start + size, V)) for start in range(0, V, size))


def _is_in(targets: mx.array, block: slice) -> mx.array:
    return mx.logical_and(targets >= block.start, targets < block.stop)


def _pick(logits: mx.array, targets: mx.array, block: slice) -> mx.array:
    """The logit of each target, float32 (M,); that of any other token where the target is not in the block."""
    index = mx.clip(targets - block.start, 0, block.stop - block.start - 1)
    return mx.take_along_axis(logits, index[:, None], axis=-1)[:, 0].astype(mx.float32)


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
