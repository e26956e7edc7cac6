"""The batched decoding engine: many prompts, several samples of each, one step of the device for all their next tokens.

Deals in token ids; only `generate_batch`, the door for scripts, has text. Knows nothing of rewards, actors or clocks:
what is computed together, and when a finished row leaves the batch, follows from the requests and the tokens alone.

Noise: sample i of a request draws its token t by one uniform number that is a hash of (the request's key, i, t), so
it is the same whatever else is in the batch, on whichever device.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import mlx.core as mx
import msgspec

from troupe.errors import ModelError
from troupe.policy.cache import DecodingCache, PromptCache, join_prompts
from troupe.policy.elementwise import exp, is_on_cpu
from troupe.policy.qwen3 import Qwen3Config, Weights, fuse_projections, hidden_states, project
from troupe.policy.sampling import Sampler, SamplingConfig

if TYPE_CHECKING:
    from troupe.policy.loading import Policy

NOISE_BLOCK = 16
"""Uniform numbers that one hash of 64 bytes gives."""
PREFILL_TOKENS = 8192
"""Most prompt tokens, padding included, that are prefilled at once."""
COMPACT_EVERY = 8
"""Finished rows leave the batch only at token positions that this divides."""


class GenerationConfig(SamplingConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How completions are sampled, and how many of what length."""

    num_generations: Annotated[int, msgspec.Meta(ge=1)] = 8
    """G, completions of each prompt."""
    max_completion_length: Annotated[int, msgspec.Meta(ge=1)] = 256
    """Most tokens of a completion; the model's positions may leave less to a long prompt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_generations", "max_completion_length"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1")


class RolloutRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One prompt to be completed G times."""

    prompt_ids: tuple[int, ...]
    """Token ids, at least one."""
    key: tuple[int, ...]
    """Integers in [0, 2⁶⁴) that name the random stream of the group, such as (seed, step, place, attempt)."""


class Completion(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One completion of T tokens; the fields are those of `troupe.messages.Rollout`."""

    token_ids: tuple[int, ...]
    """(T,) sampled ids, the stop id included."""
    log_probs: tuple[float, ...]
    """(T,) nats, under softmax(logits / temperature); at temperature 0 under softmax(logits)."""
    sampling_log_probs: tuple[float, ...]
    """(T,) nats, under the filtered distribution; equal to `log_probs` where no filter is on."""
    versions: tuple[int, ...]
    """(T,) version of the weights that made each token."""
    finish_reason: Literal["stop", "length", "aborted"]


class CompletedGroup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All samples of one request, handed over when the last of them ended."""

    index: int
    """Which request, counted from 0 in the order given."""
    completions: tuple[Completion, ...]
    """(G,) in sample order."""


class RolloutEngine:
    """Decodes batches of requests with one policy, whose weights may be exchanged between two tokens.

    One thread decodes; `load` and `abort` may be called from any thread.
    """

    def __init__(self, policy_config: Qwen3Config, generation: GenerationConfig, *, stop_ids: frozenset[int]) -> None:
        """`stop_ids`: ids that end a completion; empty lets every one run to its limit."""
        self.config = policy_config
        self.generation = generation
        self.stop_ids = stop_ids
        self.sampler = Sampler(generation)
        self._loaded: tuple[Weights, int] | None = None
        self._prepared: tuple[Weights, Weights, int] | None = None
        self._aborted = threading.Event()

    def load(self, weights: Weights, version: int) -> None:
        """Use these evaluated weights, named as in Hugging Face folders, from the next token on. Caches are kept."""
        self._loaded = (weights, version)

    def decode(self, requests: Sequence[RolloutRequest]) -> Iterator[CompletedGroup]:
        """Decode all requests together; `next` returns when another group is complete.

        Raises ModelError at once for a prompt that is empty, holds an id outside the vocabulary or leaves no room
        within max_position_embeddings, and RuntimeError where no weights were loaded.
        """
        if self._loaded is None:
            raise RuntimeError("decode came before load: the engine has no weights yet")
        for index, request in enumerate(requests):
            _check_request(self.config, index, request)
        self._aborted.clear()
        return self._decode(requests)

    def abort(self) -> None:
        """End the running iterator at its next token; unfinished groups are dropped."""
        self._aborted.set()

    def current_weights(self) -> tuple[Weights, int]:
        """The newest weights, laid out for decoding, and their version. For the decoding thread."""
        assert self._loaded is not None
        weights, version = self._loaded
        if self._prepared is None or self._prepared[0] is not weights:
            self._prepared = (weights, fuse_projections(self.config, weights), version)
        return self._prepared[1], version

    def _decode(self, requests: Sequence[RolloutRequest]) -> Iterator[CompletedGroup]:
        if not requests:
            return
        batch = _Batch(self, requests)
        while not self._aborted.is_set():
            more = batch.advance()
            yield from batch.take_completed()
            if not more:
                return


class _Row:
    """One sample while it grows. `limit`: most tokens it may have."""

    def __init__(self, request: int, key: bytes, limit: int) -> None:
        self.request = request
        self.key = key
        self.limit = limit
        self.token_ids: list[int] = []
        self.log_probs: list[float] = []
        self.sampling_log_probs: list[float] = []
        self.finish_reason: Literal["stop", "length"] | None = None

    def completion(self, versions: Sequence[int]) -> Completion:
        assert self.finish_reason is not None
        return Completion(
            token_ids=tuple(self.token_ids),
            log_probs=tuple(self.log_probs),
            sampling_log_probs=tuple(self.sampling_log_probs),
            versions=tuple(versions[: len(self.token_ids)]),
            finish_reason=self.finish_reason,
        )


class _Batch:
    """The state of one `decode`: its rows, where they lie in the device's batch, and tokens not yet read back."""

    def __init__(self, engine: RolloutEngine, requests: Sequence[RolloutRequest]) -> None:
        self._engine = engine
        self._prompts = [request.prompt_ids for request in requests]
        G, longest = engine.generation.num_generations, engine.generation.max_completion_length
        room = engine.config.max_position_embeddings
        self._groups = [
            [_Row(index, row_key(request.key, i), min(longest, room - len(request.prompt_ids))) for i in range(G)]
            for index, request in enumerate(requests)
        ]
        self._slots = [list(group) for group in self._groups]  # the rows in the device's batch, slot by slot
        self._limit = max(row.limit for group in self._groups for row in group)
        self._versions: list[int] = []
        self._unread: deque[tuple[int, list[_Row], list[mx.array]]] = deque()
        self._waiting = list(range(len(requests)))
        self._cache: DecodingCache | None = None
        self._ids = mx.array([])
        self._noise = mx.array([])

    def advance(self) -> bool:
        """Make one more token of every row on the device and read back the one before → whether rows are left."""
        t = len(self._versions)
        if t < self._limit:
            if t and t % COMPACT_EVERY == 0:
                self._compact()
            self._dispatch(t)
        if len(self._unread) > 1 or t + 1 >= self._limit:
            self._read()
        return any(row.finish_reason is None for slot in self._slots for row in slot)

    def take_completed(self) -> Iterator[CompletedGroup]:
        """The groups that ended since the last call, in request order."""
        for index in list(self._waiting):
            group = self._groups[index]
            if all(row.finish_reason for row in group):
                self._waiting.remove(index)
                yield CompletedGroup(index=index, completions=tuple(row.completion(self._versions) for row in group))

    def _dispatch(self, t: int) -> None:
        """Let the device make token t of every row."""
        weights, version = self._engine.current_weights()
        config = self._engine.config
        rows = [row for slot in self._slots for row in slot]
        if self._cache is None:
            hidden = self._prefill(weights)
        else:
            hidden = hidden_states(config, weights, self._ids[:, None], cache=self._cache)[:, 0]
            self._cache.advance()
        logits = project(config, weights, hidden)
        if t == 0:
            logits = mx.repeat(logits, self._engine.generation.num_generations, axis=0)
        if t % NOISE_BLOCK == 0:
            self._noise = noise_block([row.key for row in rows], t // NOISE_BLOCK)
        self._ids, *log_probs = _sample(self._engine.sampler, logits, self._noise[:, t % NOISE_BLOCK])
        mx.async_eval(self._ids, *log_probs)  # type: ignore[no-untyped-call]
        self._unread.append((t, rows, [self._ids, *log_probs]))
        self._versions.append(version)

    def _prefill(self, weights: Weights) -> mx.array:
        """Every prompt once → the hidden state of its last token, (requests, D); opens the cache."""
        config, hidden, parts = self._engine.config, [], []
        for prompts in prefill_chunks(self._prompts):
            part = PromptCache([len(prompt) for prompt in prompts])
            width = max(part.lengths)
            ids = mx.array([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
            states = hidden_states(config, weights, ids, cache=part)
            last = mx.array(part.lengths)[:, None, None] - 1
            hidden.append(mx.take_along_axis(states, last, axis=1)[:, 0])
            mx.eval(hidden[-1], part.keys, part.values)
            parts.append(part)
        self._cache = DecodingCache(join_prompts(parts), len(self._slots[0]), self._limit)
        return mx.concatenate(hidden)

    def _read(self) -> None:
        """Give every row the tokens of the oldest unread step (of all of them, at the end); see which end."""
        at_end = len(self._versions) >= self._limit
        while self._unread and (at_end or len(self._unread) > 1):
            t, rows, arrays = self._unread.popleft()
            ids, log_probs = (
                cast("list[int]", arrays[0].tolist()),
                [cast("list[float]", column.tolist()) for column in arrays[1:]],
            )
            for place, row in enumerate(rows):
                if row.finish_reason is not None or len(row.token_ids) > t:
                    continue  # the row ended while this token was on its way, or it is a filler's copy
                row.token_ids.append(ids[place])
                row.log_probs.append(log_probs[0][place])
                row.sampling_log_probs.append(log_probs[-1][place])
                if ids[place] in self._engine.stop_ids:
                    row.finish_reason = "stop"
                elif len(row.token_ids) == row.limit:
                    row.finish_reason = "length"

    def _compact(self) -> None:
        """Drop finished rows from the device's batch, where that saves rows."""
        old = [row for slot in self._slots for row in slot]
        slots = arrange(self._slots)
        if len(slots) * len(slots[0]) == len(old) or self._cache is None:
            return
        place = {id(row): index for index, row in reversed(list(enumerate(old)))}  # a row, not the copy that fills
        first = {slot[0].request: index for index, slot in reversed(list(enumerate(self._slots)))}
        rows = [row for slot in slots for row in slot]
        index = [place[id(row)] for row in rows]
        self._cache.select([first[slot[0].request] for slot in slots], index, len(slots[0]))
        self._ids = self._ids[mx.array(index)]
        self._noise = self._noise[mx.array(index)]
        self._slots = slots


def arrange(slots: list[list[_Row]]) -> list[list[_Row]]:
    """Lay unfinished rows out anew: slots of one width, each with rows of one request, as few rows as possible.

    There are never more slots than before, so prompts never take more memory. A slot that lacks rows is filled up
    with copies of its last. Without unfinished rows, or without gain, the result is what was given.
    """
    live: dict[int, list[_Row]] = {}
    for slot in slots:
        for row in dict.fromkeys(slot):
            if row.finish_reason is None:
                live.setdefault(row.request, []).append(row)
    best, best_width = len(slots) * len(slots[0]), 0
    for width in range(max(map(len, live.values()), default=0), 0, -1):
        count = sum(-(-len(rows) // width) for rows in live.values())
        if count <= len(slots) and count * width < best:
            best, best_width = count * width, width
    if best_width == 0:
        return slots
    laid = [rows[i : i + best_width] for rows in live.values() for i in range(0, len(rows), best_width)]
    return [slot + slot[-1:] * (best_width - len(slot)) for slot in laid]


def prefill_chunks(prompts: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Split prompts, in order, into runs of at most PREFILL_TOKENS places each, padding included."""
    chunk: list[tuple[int, ...]] = []
    for prompt in prompts:
        if chunk and (len(chunk) + 1) * max(*map(len, chunk), len(prompt)) > PREFILL_TOKENS:
            yield chunk
            chunk = []
        chunk.append(prompt)
    yield chunk


def row_key(request_key: Sequence[int], sample: int) -> bytes:
    """What names the random stream of one sample: 16 bytes, distinct for distinct (request key, sample)."""
    text = ",".join(map(str, (*request_key, sample)))
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def noise_block(keys: Sequence[bytes], block: int) -> mx.array:
    """Uniform numbers k/2²⁴ in [0, 1) for token positions block·16 … block·16+15 of rows → float32 (rows, 16)."""
    place = block.to_bytes(8, "little")
    digests = b"".join(hashlib.blake2b(place, key=key).digest() for key in keys)
    numbers = mx.array(cast(Any, memoryview(array("I", digests))))  # by the buffer protocol, as uint32
    return (numbers >> 8).astype(mx.float32).reshape(len(keys), NOISE_BLOCK) * 2.0**-24


def _sample(sampler: Sampler, logits: mx.array, uniforms: mx.array) -> list[mx.array]:
    """Logits (B, V), uniforms (B,) → ids (B,), their log-probs, and, where a filter is on, those after filtering."""
    if sampler.is_filtering or sampler.is_greedy:
        log_probs = sampler.scale(logits)
        kept = sampler.filter(log_probs)
        ids = sampler.draw(kept, uniforms)[:, None]
        chosen = mx.take_along_axis(log_probs, ids, axis=-1)[:, 0]
        if not sampler.is_filtering:
            return [ids[:, 0], chosen]
        return [ids[:, 0], chosen, mx.take_along_axis(kept, ids, axis=-1)[:, 0] - mx.logsumexp(kept, axis=-1)]
    scaled = logits.astype(mx.float32)
    if sampler.config.temperature != 1.0:
        scaled = scaled / sampler.config.temperature
    scaled = scaled - mx.max(scaled, axis=-1, keepdims=True)
    powers = exp(scaled)  # serves the draw and the log-probability
    ids = draw_by_shares(powers, uniforms)
    chosen = mx.take_along_axis(scaled, ids[:, None], axis=-1)[:, 0]
    return [ids, chosen - mx.log(mx.sum(powers, axis=-1))]


def draw_by_shares(shares: mx.array, uniforms: mx.array) -> mx.array:
    """Shares (B, V) ≥ 0, in any unit, and uniforms (B,) in [0, 1) → ids (B,); an id without share is never drawn."""
    sums = mx.cumsum(shares, axis=-1)
    if not is_on_cpu():
        sums = mx.where(shares > 0, sums, -1.0)  # sums made in parallel may rise where nothing is added
    # below the largest sum even after rounding, so that some id with a share is past it
    target = mx.minimum(uniforms, 1.0 - 2.0**-24)[:, None] * mx.max(sums, axis=-1, keepdims=True)
    return mx.argmax(sums > target, axis=-1)


def _check_request(config: Qwen3Config, index: int, request: RolloutRequest) -> None:
    prompt = request.prompt_ids
    if not prompt:
        raise ModelError(f"request {index}: its prompt is empty; give at least one token")
    if bad := [token for token in prompt if not 0 <= token < config.vocab_size]:
        raise ModelError(f"request {index}: id {bad[0]} is not in the model's vocabulary [0, {config.vocab_size})")
    if len(prompt) >= config.max_position_embeddings:
        raise ModelError(
            f"request {index}: a prompt of {len(prompt)} tokens leaves no room for a completion; the model has "
            f"{config.max_position_embeddings} positions (max_position_embeddings), so shorten the prompt"
        )


class RolloutBatch(msgspec.Struct, frozen=True, kw_only=True):
    """Completions of several prompts, as lists in prompt-major order: G rows of the first prompt, then the next's."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    log_probs: list[list[float]]
    """Nats, under softmax(logits / temperature)."""
    texts: list[str]
    """Completions without special tokens."""


def generate_batch(
    policy: Policy,
    prompts: Sequence[str],
    num_generations: int,
    generation: GenerationConfig | None = None,
    seed: int = 0,
) -> RolloutBatch:
    """Complete every prompt `num_generations` times, which overrides the field of `generation`.

    Raises ModelError for a prompt without room or a policy without tokenizer.
    """
    generation = msgspec.structs.replace(generation or GenerationConfig(), num_generations=num_generations)
    engine = RolloutEngine(policy.config, generation, stop_ids=policy.eos_ids)
    engine.load(policy.weights, 0)
    prompt_ids = policy.tokenizer.batch_encode(prompts)
    requests = [RolloutRequest(prompt_ids=tuple(ids), key=(seed, i)) for i, ids in enumerate(prompt_ids)]
    groups = sorted(engine.decode(requests), key=lambda group: group.index)
    completions = [completion for group in groups for completion in group.completions]
    return RolloutBatch(
        prompt_ids=[ids for ids in prompt_ids for _ in range(num_generations)],
        completion_ids=[list(completion.token_ids) for completion in completions],
        log_probs=[list(completion.log_probs) for completion in completions],
        texts=[policy.tokenizer.decode_sampled(completion.token_ids) for completion in completions],
    )
