"""The batched decoding engine: many prompts, several samples of each, one step of the device for all their next tokens.

Token ids in, token ids out. What is computed together, and when a finished row leaves the batch, follows from the
requests and the tokens alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import chain
from typing import TypeVar

from troupe.errors import ModelError
from troupe.policy.adapter.base import Base
from troupe.policy.decode import cuda_kernels
from troupe.policy.decode.cuda_cache import serves
from troupe.policy.decode.loaded import LoadedWeights
from troupe.policy.decode.loop import DecodeSetup, Wave
from troupe.policy.decode.memory import decode_memory_bytes, device_ways
from troupe.policy.decode.open_session import OpenSession
from troupe.policy.decode.requests import CompletedGroup, GenerationConfig, RolloutRequest
from troupe.policy.decode.sampling import Sampler
from troupe.policy.decode.session import Abort, TurnSession
from troupe.policy.decode.stopping import StopRules
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.elementwise import is_on_cpu
from troupe.policy.network.tensors import Weights
from troupe.policy.text.tokenizer import Tokenizer

_Session = TypeVar("_Session", bound=TurnSession)


class RolloutEngine:
    """Decodes batches of requests with one policy, whose weights may be exchanged between two tokens.

    One thread decodes; `load` and `abort` may be called from any thread.
    """

    def __init__(
        self,
        policy_config: NetworkConfig,
        generation: GenerationConfig,
        *,
        stop_ids: frozenset[int],
        tokenizer: Tokenizer | None = None,
        base: Base | None = None,
        records_experts: bool = False,
    ) -> None:
        """`stop_ids`: ids that end a completion; empty lets every one run to its limit.

        `base`: what the weights that are loaded complete; None: they are the whole network.
        `tokenizer`: finds stop strings, without it they raise ValueError, and lets XTC spare special tokens and
        newlines; stop ids are always spared. `records_experts`: completions tell which experts their tokens went to,
        where the network has any.
        """
        self.config = policy_config
        self.generation = generation
        self._stop_rules = StopRules(
            stop_ids,
            generation.stop,
            partial(tokenizer.decode_stream, skip_special_tokens=False) if tokenizer else None,
            generation.repetition_cutoff,
            generation.repetition_pattern,
        )
        spared = stop_ids
        if tokenizer is not None and generation.xtc_probability > 0.0:
            spared = spared | tokenizer.special_ids | frozenset(tokenizer.encode("\n", add_special_tokens=False))
        self.sampler = Sampler(generation, spared)
        self._weights = LoadedWeights(policy_config, Base() if base is None else base)
        self._records_experts = records_experts and bool(policy_config.sparse_layers)
        self._aborted = Abort()
        self.tokens = 0
        """Tokens that the longest row of the running decode has; for whoever asks how far it is, from any thread."""

    def load(self, weights: Weights, version: int, policy: int = 0) -> None:
        """Use these evaluated weights, named as in Hugging Face folders, from the next token on. Caches are kept.

        Beside a base they are what is trained; without any, the base decodes alone. There may be several policies over
        one base, by number: each request says which completes it, and those of all are decoded together.
        """
        self._weights.load(weights, version, policy)

    def decode(self, requests: Sequence[RolloutRequest]) -> Iterator[CompletedGroup]:
        """Decode all requests together, or in as many waves as the memory limit asks for; `next` returns when another
        group is complete. Raises what `decode_lists` raises, at the call.
        """
        return chain.from_iterable(self.decode_lists(requests))

    def decode_lists(self, requests: Sequence[RolloutRequest]) -> Iterator[list[CompletedGroup]]:
        """The same; `next` returns all groups that are complete at the same token, or none when a wave's prompts have
        been read and before its first group is complete.

        Raises ModelError at once for a prompt that is empty, holds an id outside the vocabulary, leaves no room within
        max_position_embeddings or alone takes more than the memory limit; RuntimeError where no weights were loaded.
        """
        waves = self._admit(requests)
        return self._decode(requests, waves)

    def session(self, *, sessions: int = 1) -> TurnSession:
        """Rows that go on over several turns; for the decoding thread. `abort` ends its decodes, too.

        `sessions`: how many are open at once; each may have its share of memory_limit_gb.
        """
        return self._opened(TurnSession, sessions)

    def open_session(self, *, sessions: int = 1) -> OpenSession:
        """One whose turns join a decode that goes on."""
        return self._opened(OpenSession, sessions)

    def _opened(self, kind: type[_Session], sessions: int) -> _Session:
        limit = self.generation.memory_limit_gb
        limit_bytes = None if limit is None else limit * 1e9 / sessions
        return kind(self._setup, self._weights, self._aborted, partial(setattr, self, "tokens"), limit_bytes)

    def stream(self, request: RolloutRequest) -> Iterator[int]:
        """Decode one request once → the ids of its completion as they come, the same as `decode` gives.

        Raises what `decode` raises, at the call, and ValueError where num_generations is not 1.
        """
        if (G := self.generation.num_generations) != 1:
            raise ValueError(f"num_generations is {G}, but only one completion can be streamed; set it to 1")
        self._admit([request])
        return self._stream(request)

    def abort(self) -> None:
        """End the running iterator at its next token.

        Groups under way still come, their open rows as they are, with the reason "aborted": a caller who wants them has
        what was paid for, others leave the iterator. Waves not begun are left out.
        """
        self._aborted.set()

    def current_weights(self, slots: Sequence[int] = (0,)) -> tuple[Weights, Mapping[int, int]]:
        """The newest weights, laid out for decoding rows in equal parts of these policies, and the versions of all
        policies. For the decoding thread."""
        return self._weights.current(slots)

    def release(self) -> None:
        """Let go of the weights and of what was made of them; `load` brings others. Not while decoding."""
        self._weights.release()

    def memory_bytes(self, prompt_lengths: Sequence[int]) -> int:
        """What decoding prompts of these lengths together takes beside the weights."""
        config, dtype = self.config, self._weights.dtype
        room = config.max_position_embeddings - min(prompt_lengths)
        return decode_memory_bytes(
            config,
            prompt_lengths,
            self.generation.num_generations,
            min(self.generation.max_completion_length, room),
            dtype,
            is_filtering=self.sampler.is_filtering,
            **device_ways(config, dtype, on_cpu=is_on_cpu()),
        )

    @cached_property
    def _setup(self) -> DecodeSetup:
        """Made when the first decode begins, in its thread, whose device it asks for."""
        config = self.config
        attends = serves(config)
        return DecodeSetup(
            config,
            self.generation,
            self.sampler,
            self._stop_rules,
            cuda_kernels.are_available(),
            attends,
            self._records_experts,
        )

    def _wave(self, requests: Sequence[RolloutRequest], places: range) -> Wave:
        return Wave(self._setup, requests, places, self.current_weights)

    def _admit(self, requests: Sequence[RolloutRequest]) -> list[range]:
        """Check the requests and make ready to decode → which of them are decoded together."""
        if not self._weights.policies:
            raise RuntimeError("decode came before load: the engine has no weights yet")
        for index, request in enumerate(requests):
            _check_request(self.config, index, request)
            if request.policy not in self._weights.policies:
                raise RuntimeError(f"request {index}: policy {request.policy} was not loaded")
        limit = self.generation.memory_limit_gb
        lengths = [len(request.prompt_ids) for request in requests]
        waves = split_into_waves(lengths, self.memory_bytes, None if limit is None else limit * 1e9)
        for wave in waves:
            if limit is not None and len(wave) == 1 and (needed := self.memory_bytes([lengths[wave[0]]])) > limit * 1e9:
                raise ModelError(
                    f"request {wave[0]}: {self.generation.num_generations} completions of its prompt of "
                    f"{lengths[wave[0]]} tokens take {needed / 1e9:.3g} GB, but memory_limit_gb is {limit}; raise it, "
                    "or lower num_generations or max_completion_length"
                )
        self._aborted.clear()
        return waves

    def _decode(self, requests: Sequence[RolloutRequest], waves: Sequence[range]) -> Iterator[list[CompletedGroup]]:
        for places in waves:
            if self._aborted.is_set():
                return
            wave = self._wave(requests, places)
            self.tokens = 0
            more = wave.advance()
            yield []
            while more:
                self.tokens += 1
                if completed := list(wave.pop_completed()):
                    yield completed
                if self._aborted.is_set():
                    wave.abandon()
                    break
                more = wave.advance()
            if completed := list(wave.pop_completed()):
                yield completed

    def _stream(self, request: RolloutRequest) -> Iterator[int]:
        wave = self._wave([request], range(1))
        seen, more = 0, True
        while more and not self._aborted.is_set():
            more = wave.advance()
            ids = wave.groups[0][0].token_ids
            yield from ids[seen:]
            seen = len(ids)


def _check_request(config: NetworkConfig, index: int, request: RolloutRequest) -> None:
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


def split_into_waves(
    lengths: Sequence[int], cost: Callable[[Sequence[int]], int], limit_bytes: float | None
) -> list[range]:
    """Split prompts, in order, into as few runs as a first fit gives, none of which costs more than the limit.

    `cost`: bytes for prompts of these lengths. A prompt that alone costs more has a run of its own; None is no limit.
    """
    if limit_bytes is None:
        return [range(len(lengths))] if lengths else []
    waves: list[range] = []
    start = 0
    for index in range(1, len(lengths) + 1):
        if index == len(lengths) or cost(lengths[start : index + 1]) > limit_bytes:
            waves.append(range(start, index))
            start = index
    return waves
