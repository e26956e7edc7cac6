"""`Policy`, a language model in memory, and the ways to get one: the other files of this room tied together."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any, Literal, cast

import mlx.core as mx
import msgspec

from troupe.errors import InputError, ModelError
from troupe.policy.adapter.base import Base
from troupe.policy.adapter.files import save_adapter
from troupe.policy.decode.engine import RolloutEngine
from troupe.policy.decode.requests import GenerationConfig
from troupe.policy.folders import MAX_SHARD_BYTES, save_model_folder
from troupe.policy.gradient.backward import completion_statistics
from troupe.policy.model_files import (
    CONFIG_FILE,
    DTYPES,
    GENERATION_CONFIG_FILE,
    Companions,
    dtype_name,
    parse_json,
)
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.config_keys import text_settings
from troupe.policy.network.forward import hidden_states, project
from troupe.policy.network.quantization import read_quantization
from troupe.policy.network.rope_settings import names_theta
from troupe.policy.network.tensors import Weights, init_weights, weights_dtype
from troupe.policy.text.complete import complete_texts, stream_text
from troupe.policy.text.tokenizer import TextPrompt, Tokenizer

ROWS_AT_ONCE = 32
"""Completions that `Policy.compute_log_probs` lays out at a time."""


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which policy a run starts from."""

    path: str | None = None
    """A Hugging Face model folder, or a hub id such as "Qwen/Qwen3-0.6B". None: `troupe train` takes the demo's."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type to hold the weights in; None: as stored, but float32 on a CPU."""


class Policy:
    """A language model in memory: `config`, `weights`, and the folder `path` it came from (None: made at random).

    `weights` are what is trained: the whole network, or an adapter, and then `base` is the network that it completes.
    `companions`: what lay beside the weights when they were read. What the folder holds later does not count, but for
    the tokenizer, which is read when it is first asked for.
    """

    def __init__(
        self,
        config: NetworkConfig,
        weights: Weights,
        path: Path | None = None,
        companions: Companions | None = None,
        base: Base | None = None,
    ) -> None:
        """`companions`: None reads them from the folder now, where there is one. Raises ModelError as
        `Companions.of`."""
        self.config = config
        self.weights = weights
        self.base = Base() if base is None else base
        self.path = path
        self.companions = Companions() if path is None else Companions.of(path) if companions is None else companions
        self._tokenizer: Tokenizer | None = None
        self._eos_ids: frozenset[int] | None = None

    def having(
        self,
        weights: Weights,
        *,
        config: NetworkConfig | None = None,
        eos_ids: frozenset[int] | None = None,
        base: Base | None = None,
    ) -> Policy:
        """The same policy with other weights, which reads nothing again; where given, with another `config` of the same
        vocabulary, other ids that end a text, or another base."""
        other = Policy(
            self.config if config is None else config, weights, self.path, self.companions, base or self.base
        )
        other._tokenizer = self._tokenizer
        other._eos_ids = self._eos_ids if eos_ids is None else eos_ids
        return other

    def without_arrays(self) -> Policy:
        """All of it but the numbers."""
        return self.having({}, base=Base())

    @property
    def network(self) -> Weights:
        """The weights of the whole network, an adapter beside the base's."""
        return self.base.completed(self.config, self.weights)

    @property
    def is_packed(self) -> bool:
        """Whether the folder holds packed matrices, whatever has become of them."""
        return read_quantization(text_settings(self._settings)) is not None

    @property
    def _settings(self) -> dict[str, Any]:
        return parse_json(Path(CONFIG_FILE), self.companions.files.get(CONFIG_FILE, b"{}"))

    @property
    def dtype(self) -> str:
        """The name, as in `DTYPES`, of the type that the network computes in."""
        return dtype_name(weights_dtype(self.base.weights or self.weights))

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the folder, loaded at the first call. Raises ModelError where there is none."""
        if self._tokenizer is None:
            if self.path is None:
                raise ModelError("tokenizer: this policy was made at random and has no folder to read a tokenizer from")
            self._tokenizer = Tokenizer.from_pretrained(self.path)
        return self._tokenizer

    def date_templates(self, day: date) -> None:
        """Have the tokenizer's chat templates take `day` for today."""
        self._tokenizer = self.tokenizer.dated(day)

    @property
    def notices(self) -> list[str]:
        """What a user should know of how the folder was read, one line each."""
        settings = text_settings(whole := self._settings)
        found = []
        others = ["what sees images"] if settings is not whole else []
        others += ["what foretells several tokens"] if settings.get("mtp_num_hidden_layers") else []
        if others and self.config.family.other_parts:
            found.append(
                f"{self.path}: only the part for text is used and saved; {' and '.join(others)} is passed over"
            )
        if settings and not names_theta(settings):
            found.append(
                f"{self.path}: config.json names no rope_theta, so it is {self.config.rope_theta:g}, as in transformers"
            )
        if settings.get("tie_word_embeddings") and not self.config.tie_word_embeddings:
            found.append(
                f"{self.path}: config.json says tie_word_embeddings: true, but the lm_head.weight beside it is not the "
                "embedding: it is kept, as a matrix of its own, and what is saved says so"
            )
        return found

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a text: those of generation_config.json and of config.json (eos_token_id, one or a list) and the
        tokenizer's eos_token, all of them, as in TRL and mlx-lm; a folder need not have a tokenizer that can be loaded.
        Raises ModelError where one of them is no id."""
        if self._eos_ids is None:
            ids = {*(self._generation_eos_ids() or ()), *(i for i in self.config.eos_token_id if i >= 0)}  # −1: none
            if self.companions.have_tokenizer:
                with suppress(ModelError):  # of a kind that is not known: who wants text of it is told
                    ids |= {self.tokenizer.eos_token_id} - {None}
            self._eos_ids = frozenset(ids)
        return self._eos_ids

    @property
    def eos_ids_by_one_file(self) -> frozenset[int]:
        """Those of generation_config.json, else of config.json: what ended a text in runs whose checkpoints do not say
        which ids did."""
        generation = self._generation_eos_ids()
        return frozenset(self.config.eos_token_id) if generation is None else generation

    def _generation_eos_ids(self) -> frozenset[int] | None:
        """None where generation_config.json names none."""
        content = self.companions.files.get(GENERATION_CONFIG_FILE)
        if content is None or self.path is None:
            return None
        file = self.path / GENERATION_CONFIG_FILE
        eos = parse_json(file, content).get("eos_token_id")
        if eos is None:
            return None
        ids = eos if isinstance(eos, list) else [eos]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise ModelError(f"{file}: eos_token_id: {eos!r} is refused; it must be an id or a list of ids")
        return frozenset(ids)

    def check_stop_ids(self) -> None:
        """Raises ModelError where an id that is to end a text lies beyond the embedding, so that it never comes."""
        if beyond := sorted(id_ for id_ in self.eos_ids if id_ >= self.config.vocab_size):
            raise ModelError(
                f"{self.path}: eos_token_id names {beyond[0]}, but the model's embedding ends at "
                f"{self.config.vocab_size - 1} (vocab_size is {self.config.vocab_size}); correct it in "
                f"{GENERATION_CONFIG_FILE}, or in config.json where that does not say"
            )

    @property
    def pad_id(self) -> int:
        """The id that fills rows up: the tokenizer's, or 0 where it has none that the embedding holds."""
        id_ = self.tokenizer.pad_token_id
        return id_ if id_ is not None and id_ < self.config.vocab_size else 0

    def model(self, ids: mx.array) -> mx.array:
        """Integer ids (B, T), no padding → logits (B, T, V)."""
        network = self.network
        return project(self.config, network, hidden_states(self.config, network, ids))

    def compute_log_probs(
        self, prompt_ids: mx.array | Sequence[Sequence[int]], completion_ids: mx.array | Sequence[Sequence[int]]
    ) -> mx.array:
        """Log-probabilities, in nats, of completions after their prompts, at temperature 1 → float32 (B, T).

        Both arguments are (B, ·) arrays without padding, or lists of rows of any lengths; T is the longest
        completion, and places after a row's own end are 0. Raises InputError.
        """
        prompts, completions = _id_rows(prompt_ids), _id_rows(completion_ids)
        if len(prompts) != len(completions):
            raise InputError(f"{len(prompts)} prompts cannot go with {len(completions)} completions; give one for each")
        for kind, rows in (("prompt_ids", prompts), ("completion_ids", completions)):
            for place, row in enumerate(rows):
                if bad := [i for i in row if not 0 <= i < self.config.vocab_size]:
                    raise InputError(f"{kind}[{place}]: id {bad[0]} is not in [0, {self.config.vocab_size})")
        if empty := [place for place, row in enumerate(prompts) if not row]:
            raise InputError(f"prompt_ids[{empty[0]}]: is empty; a prompt has at least one token")
        T = max(map(len, completions), default=0)
        if T == 0:
            return mx.zeros((len(prompts), 0))
        parts, network = [], self.network
        for start in range(0, len(prompts), ROWS_AT_ONCE):
            some = slice(start, start + ROWS_AT_ONCE)
            part, _ = completion_statistics(self.config, network, prompts[some], completions[some])
            parts.append(mx.pad(part, [(0, 0), (0, T - part.shape[1])]))
            mx.eval(parts[-1])
        return mx.concatenate(parts)

    def engine(self, generation: GenerationConfig) -> RolloutEngine:
        """What decodes with this policy."""
        engine = RolloutEngine(self.config, generation, stop_ids=self.eos_ids, tokenizer=self.tokenizer, base=self.base)
        engine.load(self.weights, 0)
        return engine

    def generate_text(
        self,
        prompt: TextPrompt,
        max_new_tokens: int = 100,
        temperature: float = 0.8,
        top_p: float = 0.95,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> str:
        """Continue `prompt`, or answer the chat that it holds, until a stop token or `max_new_tokens`.

        The text comes without prompt and special tokens. `seed` None draws a fresh one, so that each call differs.
        Raises ValueError for a knob out of its bounds, and InputError for a prompt that cannot be used.
        """
        return self.generate_texts([prompt], max_new_tokens, temperature, top_p, top_k, seed)[0]

    def generate_texts(
        self,
        prompts: Sequence[TextPrompt],
        max_new_tokens: int = 100,
        temperature: float = 0.8,
        top_p: float = 0.95,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> list[str]:
        """`generate_text` of many prompts, decoded together → one text each, in order."""
        generation = _one_completion(max_new_tokens, temperature, top_p, top_k)
        return [samples[0].text for samples in complete_texts(self, prompts, generation, _seed(seed))]

    def stream_text(
        self,
        prompt: TextPrompt,
        max_new_tokens: int = 100,
        temperature: float = 0.8,
        top_p: float = 0.95,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> Iterator[str]:
        """`generate_text` in pieces as they come, never half a character; the same seed gives the same text."""
        generation = _one_completion(max_new_tokens, temperature, top_p, top_k)
        return stream_text(self, prompt, generation, _seed(seed))

    def save(self, path: str | Path, max_shard_bytes: int | None = MAX_SHARD_BYTES) -> None:
        """Write the policy as a model folder, as `save_model_folder` does; an adapter as an adapter folder."""
        if (files := self.base.files_of(self.config, self.weights)) is not None:
            save_adapter(Path(path), files)
        else:
            save_model_folder(path, self.config, self.weights, self.companions, max_shard_bytes)


def _one_completion(max_new_tokens: int, temperature: float, top_p: float, top_k: int | None) -> GenerationConfig:
    return GenerationConfig(
        num_generations=1,
        max_completion_length=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k or 0,
    )


def _seed(seed: int | None) -> int:
    return secrets.randbits(32) if seed is None else seed


def _id_rows(ids: mx.array | Sequence[Sequence[int]]) -> list[list[int]]:
    if isinstance(ids, mx.array):
        return cast("list[list[int]]", ids.tolist())
    return [list(row) for row in ids]


def random_policy(config: NetworkConfig, seed: int = 0, dtype: str = "float32") -> Policy:
    """A policy with random weights and no folder, for tests and benchmarks."""
    weights = init_weights(config, mx.random.key(seed), DTYPES[dtype])
    mx.eval(weights)
    return Policy(config, weights)
