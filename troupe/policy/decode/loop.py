"""The loop of the decoding engine: rows that grow token by token, laid out as one batch on the device, and their dice.

One token of every row is always under way on the device while the one before is read back. All it does follows from
requests and tokens: sample i of a request draws its token t by one uniform number that is a hash of (the request's key,
i, t), so it is the same whatever else is in the batch, on whichever device.

Penalties look back over the prompt too, not only over what was sampled: the window of recent ids starts filled with the
prompt's last ones, as in mlx-lm.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias, cast

import mlx.core as mx

from troupe.errors import RunError
from troupe.policy.decode import cuda_kernels
from troupe.policy.decode.cache import DecodingCache, PromptCache, join_prompts, prefill_chunks
from troupe.policy.decode.cuda_cache import CudaDecodingCache
from troupe.policy.decode.cuda_sampling import draw_filtered
from troupe.policy.decode.histories import Departure
from troupe.policy.decode.prompts import read_prompts
from troupe.policy.decode.requests import CompletedGroup, GenerationConfig, RolloutRequest
from troupe.policy.decode.rows import NOISE_BLOCK, Row, arrange, noise_from, row_key
from troupe.policy.decode.sampling import Sampler, draw_by_shares
from troupe.policy.decode.stopping import StopRules, StopWatch
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.elementwise import exp
from troupe.policy.network.forward import project
from troupe.policy.network.routes import Routes, rows_as_bytes
from troupe.policy.network.tensors import Weights, weights_dtype

COMPACT_EVERY = 8
"""Finished rows leave the batch only at token positions that this divides."""


class DecodeSetup(NamedTuple):
    """What all rows of a decode have in common."""

    config: NetworkConfig
    generation: GenerationConfig
    sampler: Sampler
    stop_rules: StopRules
    draws_by_kernel: bool
    """Whether the kernels of `cuda_kernels` draw, and whether they attend, for heads of this kind."""
    attends_by_kernel: bool
    records_experts: bool = False
    """Whether it is noted which experts tokens go to."""


CurrentWeights: TypeAlias = Callable[[Sequence[int]], tuple[Weights, Mapping[int, int]]]
"""Gives, for each token, the weights for the policies of the slots, and the versions of all."""


class Batch:
    """Rows that are decoded together, where these lie in the device's batch, and tokens not yet read back. What they
    follow is read by `_prefill`."""

    def __init__(self, setup: DecodeSetup, slots: list[list[Row]], current_weights: CurrentWeights) -> None:
        """`slots`: rows that share what they follow, all of one width."""
        self._setup = setup
        self._current_weights = current_weights
        self._slots = slots
        for row in self._rows:
            row.begun = len(row.token_ids)
        self._limit = max(row.limit - row.begun for row in self._rows)
        self.length = 0
        """Tokens of every row that were begun."""
        self._unread: deque[tuple[int, list[Row], list[mx.array], mx.array | None, Mapping[int, int]]] = deque()
        self._cache: DecodingCache | None = None
        self._ids = mx.array([])
        self._noise: list[mx.array] = []  # (B, NOISE_BLOCK) for the draw, and again for filters that want it
        self._recent: mx.array | None = None

    @property
    def _rows(self) -> list[Row]:
        return [row for slot in self._slots for row in slot]

    def advance(self) -> bool:
        """Make one more token of every row on the device and read back the one before → whether rows are left."""
        t = self.length
        if t < self._limit:
            if t and t % COMPACT_EVERY == 0:
                self._compact()
            self._dispatch(t)
        at_end = self.length >= self._limit
        while len(self._unread) > (0 if at_end else 1):
            self._read()
        return any(row.finish_reason is None for row in self._rows)

    def drain(self) -> None:
        """Read back what is on its way."""
        while self._unread:
            self._read()

    def abandon(self) -> None:
        """Read back what is on its way, and end every row that is still open."""
        self.drain()
        for row in self._rows:
            if row.finish_reason is None:
                row.finish_reason = "aborted"

    def _prefill(self) -> mx.array:
        """Read what the rows follow → the hidden state of the last token of every slot, (S, D); opens the cache. Of
        each kind of batch."""
        raise NotImplementedError

    def _open(self, prompts: PromptCache) -> None:
        kind = CudaDecodingCache if self._setup.attends_by_kernel else DecodingCache
        self._cache = kind(prompts, len(self._slots[0]), self._limit)

    def _dispatch(self, t: int) -> None:
        """Let the device make token t of every row."""
        weights, versions = self._current_weights([slot[0].policy for slot in self._slots])
        config, rows = self._setup.config, self._rows
        routes = None
        if self._cache is None:
            hidden = self._prefill()
        else:
            routes = Routes(config) if self._setup.records_experts else None
            hidden = self._cache.forward(config, weights, self._ids, routes)
        logits = project(config, weights, hidden)
        if t == 0:
            logits = mx.repeat(logits, len(self._slots[0]), axis=0)
        sampler = self._setup.sampler
        if t % NOISE_BLOCK == 0:
            purposes = [b"", b"filter"] if sampler.needs_uniforms else [b""]
            keys, starts = [row.key for row in rows], [row.start + row.begun + t for row in rows]
            self._noise = [noise_from(keys, starts, purpose) for purpose in purposes]
        draw, *of_filters = [noise[:, t % NOISE_BLOCK] for noise in self._noise]
        self._ids, *log_probs = draw_tokens(
            sampler, logits, draw, self._recent, *of_filters, by_kernel=self._setup.draws_by_kernel
        )
        if self._recent is not None:
            newest = self._ids[:, None].astype(mx.int32)
            self._recent = mx.concatenate([self._recent[:, 1:], newest], axis=1)
        own = None if routes is None else routes.chosen
        mx.async_eval(self._ids, *log_probs, *([] if own is None else [own]))  # type: ignore[no-untyped-call]
        self._unread.append((t, rows, [self._ids, *log_probs], own, versions))
        self.length += 1

    def _last_ids(self, histories: Sequence[Sequence[int]]) -> mx.array | None:
        """The last W ids of what the rows of every slot follow, −1 before its first, (B, W); None where no penalty
        wants them."""
        W = self._setup.sampler.context_size
        if W == 0:
            return None
        windows = [[*[-1] * (W - len(ids)), *ids[-W:]] for ids in histories]
        return mx.repeat(mx.array(windows, dtype=mx.int32), len(self._slots[0]), axis=0)

    def _read(self) -> None:
        """Give every row its token of the oldest unread step; see which rows end."""
        t, rows, arrays, routed, versions = self._unread.popleft()
        experts = [b""] * len(rows) if routed is None else rows_as_bytes(routed)
        ids = cast("list[int]", arrays[0].tolist())
        log_probs = [cast("list[float]", column.tolist()) for column in arrays[1:]]
        is_sound = math.isfinite(sum(log_probs[0]))
        ended: list[Row] = []
        for place, row in enumerate(rows):
            if row.finish_reason is not None or row.made > t:
                continue  # the row ended while this token was on its way, or it is a filler's copy
            if not is_sound and not math.isfinite(log_probs[0][place]):
                raise self._not_finite(t, row, versions[row.policy])
            token = ids[place], log_probs[0][place], log_probs[-1][place]
            if row.push(*token, versions[row.policy], experts[place]):
                ended.append(row)
        if ended:
            self._ended(ended)

    def _ended(self, rows: Sequence[Row]) -> None:
        """Told of rows when their last token was read back."""

    def _not_finite(self, t: int, row: Row, version: int) -> RunError:
        """What was drawn is no token of the model's: the log-probability of any is NaN where a logit is not finite."""
        weights, _ = self._current_weights([row.policy])
        dtype = str(weights_dtype(weights)).removeprefix("mlx.core.")
        return RunError(
            f"request {row.request}: the logits for token {t} of a completion are not finite (NaN or infinity), and "
            f"nothing can be drawn from them; the network overflows in {dtype} with the weights of version "
            f"{version}: hold them in a type with more room (model.dtype, --dtype), or use "
            "weights from before they grew so large"
        )

    def _compact(self) -> None:
        """Drop finished rows from the device's batch, where that saves rows."""
        old = self._rows
        slots = arrange(self._slots)
        if len(slots) * len(slots[0]) == len(old) or self._cache is None:
            return
        place = {id(row): index for index, row in reversed(list(enumerate(old)))}  # a row, not the copy that fills
        first = {slot[0].request: index for index, slot in reversed(list(enumerate(self._slots)))}
        rows = [row for slot in slots for row in slot]
        index = [place[id(row)] for row in rows]
        departure = self._departure()
        taking = None if departure is None else departure.take
        self._cache.select([first[slot[0].request] for slot in slots], index, len(slots[0]), taking)
        chosen = mx.array(index)
        self._ids = self._ids[chosen]
        self._noise = [noise[chosen] for noise in self._noise]
        self._recent = None if self._recent is None else self._recent[chosen]
        self._slots = slots

    def _departure(self) -> Departure | None:
        """What rows that have ended take along when they leave the cache."""
        return None


class Wave(Batch):
    """Requests that are decoded together."""

    def __init__(
        self,
        setup: DecodeSetup,
        requests: Sequence[RolloutRequest],
        places: range,
        current_weights: CurrentWeights,
    ) -> None:
        """Those of `requests` at `places`."""
        self._prompts = [requests[index].prompt_ids for index in places]
        G, longest = setup.generation.num_generations, setup.generation.max_completion_length
        room, rules = setup.config.max_position_embeddings, setup.stop_rules
        self.groups = {
            index: [
                Row(
                    index,
                    row_key(request.key, i),
                    min(longest, room - len(request.prompt_ids)),
                    StopWatch(rules),
                    request.policy,
                )
                for i in range(G)
            ]
            for index, request in zip(places, requests[places.start : places.stop], strict=True)
        }
        super().__init__(setup, [list(group) for group in self.groups.values()], current_weights)
        self._prompt_experts: list[bytes] = []
        self._waiting = list(places)
        self._recent = self._last_ids(self._prompts)

    def pop_completed(self) -> Iterator[CompletedGroup]:
        """The groups that ended since the last call, in request order."""
        for index in list(self._waiting):
            group = self.groups[index]
            if all(row.finish_reason for row in group):
                self._waiting.remove(index)
                completions = tuple(row.completion() for row in group)
                recorded = dict(zip(self.groups, self._prompt_experts, strict=False))
                yield CompletedGroup(index=index, completions=completions, prompt_experts=recorded.get(index, b""))

    def _prefill(self) -> mx.array:
        """Every prompt once."""
        hidden, parts = [], []
        for portion in prefill_chunks([len(prompt) for prompt in self._prompts]):
            weights, _ = self._current_weights([self._slots[i][0].policy for i in portion])
            config, prompts = self._setup.config, [self._prompts[i] for i in portion]
            read = read_prompts(config, weights, prompts, records_experts=self._setup.records_experts)
            parts.append(read.cache)
            hidden.append(read.last)
            self._prompt_experts += read.experts
        self._open(join_prompts(parts))
        return mx.concatenate(hidden)


def draw_tokens(
    sampler: Sampler,
    logits: mx.array,
    uniforms: mx.array,
    recent: mx.array | None = None,
    filter_uniforms: mx.array | None = None,
    *,
    by_kernel: bool = False,
) -> list[mx.array]:
    """Logits (B, V), uniforms (B,) → ids (B,), their log-probs under softmax(logits / temperature), and, where anything
    is on that changes this distribution, those under the one drawn from.

    `recent` (B, W) ids, −1 pads, for the penalties; `filter_uniforms` (B,) for XTC. `by_kernel`: kernels of
    our own draw, on an NVIDIA card, at any temperature but 0.
    """
    if by_kernel and sampler.is_filtering and not sampler.is_greedy:
        return list(draw_filtered(sampler, logits, uniforms, recent, filter_uniforms))
    if sampler.is_filtering or sampler.is_greedy:
        log_probs = sampler.scale(logits)
        adjusted = log_probs
        if sampler.is_adjusting:
            adjusted = sampler.scale(sampler.adjust(logits, () if recent is None else recent))
        ids, sampled = sampler.choose(adjusted, uniforms, filter_uniforms)
        chosen = mx.take_along_axis(log_probs, ids[:, None], axis=-1)[:, 0]
        return [ids, chosen, sampled] if sampler.is_filtering else [ids, chosen]
    if by_kernel:
        return list(cuda_kernels.draw(logits, uniforms, sampler.config.temperature))
    scaled = logits.astype(mx.float32)
    if sampler.config.temperature != 1.0:
        scaled = scaled / sampler.config.temperature
    scaled = scaled - mx.max(scaled, axis=-1, keepdims=True)
    powers = exp(scaled)  # serves the draw and the log-probability
    ids = draw_by_shares(powers, uniforms)
    chosen = mx.take_along_axis(scaled, ids[:, None], axis=-1)[:, 0]
    return [ids, chosen - mx.log(mx.sum(powers, axis=-1))]
