"""How likely completions are to a policy, and the gradient of a loss of that, backwards through the network by hand.

Not by `mx.grad`, for three reasons. Layer after layer is evaluated and given away, so that what is in memory is known
and not left to the order in which MLX takes one large graph. Of a layer only its input is kept, or only the results
of its matrix products, never the many things in between. And kernels are fused, which MLX does not do inside of a
gradient. Who goes through the chunks says when each is computed.

Computing activations again: Chen et al. 2016, arXiv:1604.06174; some of them: Korthikanti et al., arXiv:2205.05198.
Shapes: N packed tokens, D hidden size, F intermediate size, H query heads, d head size.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeAlias, TypeVar

import mlx.core as mx

from troupe.policy.gradient.mixing import Mixed, back_through, through
from troupe.policy.gradient.mlp import KeptMlp, back_through_mlp, through_mlp
from troupe.policy.gradient.parts import Back, Gradients
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.dropout import Dropout
from troupe.policy.network.forward import (
    Layer,
    embedded,
    embedding_scale,
    head_of,
    hidden_states,
    normalized,
)
from troupe.policy.network.head import TokenStatistics, head_backward, head_forward, result, sum_by_id, token_statistics
from troupe.policy.network.packing import Packing
from troupe.policy.network.rotation import Rotations
from troupe.policy.network.routes import Routes
from troupe.policy.network.tensors import EMBEDDING, FINAL_NORM, HEAD, Weights, norm_scale

Extra = TypeVar("Extra")
Value = TypeVar("Value")

Chunk: TypeAlias = tuple[Any, Gradients]
"""Arrays to begin with, and gradients that are complete. What was begun is awaited before more than one chunk is on its
way; None: nothing to begin with, empty: await it at once."""


class _Kept(NamedTuple):
    """What the gradient of a layer needs besides its input: the results of its products; where there is no norm behind
    them, not those that are added to the input."""

    inside: Mixed
    o: mx.array | None
    middle: mx.array
    mlp: KeptMlp


def completion_statistics(
    config: NetworkConfig,
    weights: Weights,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    temperature: float = 1.0,
    *,
    routes: Routes | None = None,
) -> TokenStatistics:
    """Log-probabilities and entropies of R completions after their prompts, float32 (R, T), 0 after a row's own end.

    In nats, under softmax(logits / temperature); T is the longest completion. `prompts` are R rows of at least one id.
    Neighbours with the same prompt share its computation. `routes`: of the packed tokens. Differentiable by the
    weights; `completion_gradients` does that with less memory.
    """
    packing = Packing(prompts, completions)
    hidden = hidden_states(config, weights, packing.ids[None], attention=packing, routes=routes).squeeze(0)
    head = head_of(config, weights)
    log_probs, entropies = token_statistics(packing.sources(hidden), head, packing.targets, temperature)
    return TokenStatistics(packing.in_rows(log_probs), packing.in_rows(entropies))


def completion_margins(
    config: NetworkConfig, weights: Weights, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> tuple[mx.array, mx.array]:
    """Log-probabilities and margins (`head_forward`) of R completions, float32 (R, T), at temperature 1 and else as
    `completion_statistics` has them; not differentiable."""
    packing = Packing(prompts, completions)
    hidden = packing.sources(hidden_states(config, weights, packing.ids[None], attention=packing).squeeze(0))
    log_probs, _, _, margins = result(head_forward(hidden, head_of(config, weights), packing.targets, 1.0))
    return packing.in_rows(log_probs), packing.in_rows(margins)


def completion_gradients(
    config: NetworkConfig,
    weights: Weights,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    loss: Callable[..., tuple[mx.array, Extra]],
    temperature: float = 1.0,
    *,
    recompute: bool = False,
    entropy_gradient: bool = True,
    margins: bool = False,
    of_base: bool = True,
    dropout: Dropout | None = None,
    routes: Routes | None = None,
    deterministic: bool = True,
) -> Generator[Chunk, None, tuple[mx.array, Extra]]:
    """Chunks of the work, with the gradients by the weights, each once; returns the loss and whatever it gives besides.

    The arrays of a chunk are to be begun when it comes, and to be there before the chunk after the next is asked for.
    `loss` maps what `completion_statistics` gives of the same arguments, and with `margins` those of `head_forward`,
    (R, T), in a second argument, to a scalar and arrays besides. With
    `recompute` only the input of each layer is kept. Without `entropy_gradient` entropies are constants; without
    `of_base` only adapters beside matrices are trained. `dropout`, `routes`: of the packed tokens; a loss that balances
    experts counts in the gradients alone. Not `deterministic`: sums may have another order each time.
    """
    packing = Packing(prompts, completions, deterministic=deterministic)
    rotations = Rotations(config, packing.ids.shape[0], packing.offset)
    x = embedded(config, weights, packing.ids[None])
    layers = [Layer(config, weights, index, dropout, routes) for index in range(config.num_hidden_layers)]
    trained = [layer for layer in layers if of_base or layer.has_adapters]
    lowest = trained[0].index if trained else len(layers)
    kept: list[tuple[mx.array, _Kept | None]] = []
    for layer in layers:
        inside, y = _through(layer, x, packing, rotations)
        if layer.index >= lowest:
            kept.append((x, None if recompute else inside))
        yield (y, [] if recompute or layer.index < lowest else inside, routes and routes.noted_of(layer.index)), {}
        del inside
        x = y

    of_rows = _of_rows(loss, entropy_gradient=entropy_gradient, margins=margins)
    value, x_grad, norm_grad, head_grad = yield from _through_head(
        config, weights, packing, x, of_rows, temperature, entropy_gradient=entropy_gradient, of_base=of_base
    )
    done: Gradients = {}
    if head_grad is not None:
        done = {FINAL_NORM: norm_grad} | ({} if config.tie_word_embeddings else {HEAD: head_grad})
    yield (x_grad, done), {}
    del x
    for layer in reversed(layers[lowest:]):
        x_grad, grads = yield from _backwards(layer, packing, rotations, *kept.pop(), x_grad, of_base=of_base)
        yield None, done
        done = {f"model.layers.{layer.index}.{name}": grad for name, grad in grads.items()}
    if head_grad is not None:
        scale = embedding_scale(config, x_grad.dtype)
        x_grad = (x_grad if scale is None else x_grad * scale).squeeze(0)
        embedding_grad = sum_by_id(x_grad, packing.ids, config.vocab_size)
        done |= {EMBEDDING: embedding_grad + head_grad if config.tie_word_embeddings else embedding_grad}
    yield None, done
    return value


def _of_rows(
    loss: Callable[..., tuple[mx.array, Extra]], *, entropy_gradient: bool, margins: bool
) -> Callable[[mx.array, mx.array, mx.array], tuple[mx.array, Extra]]:
    """The loss of log-probs, entropies and margins, as `completion_gradients` is told to give it these."""

    def of_rows(log_probs: mx.array, entropies: mx.array, far: mx.array) -> tuple[mx.array, Extra]:
        statistics = TokenStatistics(log_probs, entropies if entropy_gradient else mx.stop_gradient(entropies))
        return loss(statistics, far) if margins else loss(statistics)

    return of_rows


def _through_head(
    config: NetworkConfig,
    weights: Weights,
    packing: Packing,
    x: mx.array,
    loss: Callable[[mx.array, mx.array, mx.array], tuple[mx.array, Extra]],
    temperature: float,
    *,
    entropy_gradient: bool,
    of_base: bool,
) -> Generator[Chunk, None, tuple[tuple[mx.array, Extra], mx.array, mx.array, mx.array | None]]:
    """From the last layer's result x (1, N, D) to the loss and back: what the loss gives, and the cotangents of x and
    of the weights of norm and head, the last None without `of_base`."""

    def sources(x: mx.array, norm: mx.array) -> mx.array:
        return packing.sources(normalized(config, x.squeeze(0), norm_scale(config, norm)))

    norm, head = weights[FINAL_NORM], head_of(config, weights)
    hidden = sources(x, norm)
    outputs = yield from _one_by_one(head_forward(hidden, head, packing.targets, temperature))
    rows = [packing.in_rows(outputs[i]) for i in (0, 1, 3)]
    value, cotangents = mx.value_and_grad(loss, argnums=(0, 1))(*rows)
    of_targets = [mx.vjp(packing.in_rows, [outputs[0]], [grad])[1][0] for grad in cotangents]
    of_outputs = of_targets[0], of_targets[1] if entropy_gradient else None
    hidden_grad, head_grad = yield from _one_by_one(
        head_backward(hidden, head, packing.targets, temperature, outputs, of_outputs, of_head=of_base)
    )
    x_grad, norm_grad = mx.vjp(sources, [x, norm], [hidden_grad])[1]
    return value, x_grad, norm_grad, head_grad


def _one_by_one(blocks: Generator[tuple[mx.array, ...], None, Extra]) -> Generator[Chunk, None, Extra]:
    """A chunk a block, each computed alone: a block takes all the memory there is."""
    while True:
        try:
            block = next(blocks)
        except StopIteration as end:
            value: Extra = end.value
            return value
        yield block, {}
        del block
        yield (), {}


def _through(layer: Layer, x: mx.array, packing: Packing, rotations: Rotations) -> tuple[_Kept, mx.array]:
    """A layer from its input (1, N, D) to its result."""
    config = layer.config
    inside, o = through(layer, x, packing, rotations)
    middle = layer.behind_attention(x, o)
    mlp, y = through_mlp(layer, middle)
    kept = _Kept(inside, o if config.family.norms_behind else None, middle, mlp)
    return kept, layer.behind_mlp(middle, y)


def _backwards(
    layer: Layer,
    packing: Packing,
    rotations: Rotations,
    x: mx.array,
    kept: _Kept | None,
    y_grad: mx.array,
    *,
    of_base: bool,
) -> Generator[Chunk, None, tuple[mx.array, Gradients]]:
    """Through one layer: the cotangent of its result → that of its input x, (1, N, D), and those of its weights."""
    if kept is None:
        kept, _ = _through(layer, x, packing, rotations)
        yield (kept,), {}
    family = layer.config.family
    back = Back(layer, of_base=of_base)
    h_grad = back_through_mlp(back, layer, kept.middle, kept.mlp, y_grad)
    middle_grad = y_grad + back.norm(family.norm_before_mlp, kept.middle, h_grad)
    yield (middle_grad, dict(back.grads)), {}
    del h_grad

    o_grad = back.norm(family.norm_behind_attention, kept.o, middle_grad)
    x_grad = middle_grad + back_through(back, packing, rotations, x, kept.inside, o_grad)
    yield (x_grad, back.grads), {}
    return x_grad, back.grads


def side_by_side(
    works: Sequence[Generator[Chunk, None, Value]], streams: Sequence[mx.Stream], values: list[Value]
) -> Iterator[Gradients]:
    """Goes through all works chunk by chunk, each on its stream where there are streams: the gradients as they are
    complete, and in `values`, in the order of the works, what each returns.

    While the device is at one chunk of each the next is prepared, no more: it is kept busy and the memory low. All
    works have the same portions, and of each that of an earlier work comes first, or sums would depend on the streams.
    """
    found: dict[int, Value] = {}
    early: dict[int, Gradients] = {}
    given = [0] * len(works)
    begun: Any = ()
    while len(found) < len(works):
        beginning = []
        for place, work in enumerate(works):
            if place in found:
                continue
            arrays, portion = None, early.pop(place, {})
            if not portion:
                try:
                    with mx.stream(streams[place]) if streams else nullcontext():
                        arrays, portion = next(work)
                except StopIteration as end:
                    found[place] = end.value
                    continue
            if arrays is not None:
                beginning.append(arrays)
            if portion and place and given[place] == given[place - 1]:
                early[place] = portion
            elif portion:
                given[place] += 1
                yield portion
            del arrays, portion
        if beginning:
            mx.async_eval(beginning)  # type: ignore[no-untyped-call]
            mx.eval(begun)
            begun = beginning
    values.extend(found[place] for place in range(len(works)))
