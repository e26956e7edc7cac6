"""Model folders: reading and writing them, and the `Policy` that stands for one.

Knows the layout of a Hugging Face folder (config.json, safetensors whole or in shards, tokenizer files). Knows nothing
of training, nor of how text becomes ids: the tokenizer is loaded when it is first asked for.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, cast

import mlx.core as mx
import msgspec
from safetensors import SafetensorError, safe_open

from troupe.errors import InputError, ModelError
from troupe.policy.elementwise import is_on_cpu
from troupe.policy.qwen3 import (
    EMBEDDING,
    HEAD,
    Qwen3Config,
    Weights,
    expected_shapes,
    hidden_states,
    init_weights,
    project,
)
from troupe.policy.rollout import GenerationConfig, generate_batch

if TYPE_CHECKING:
    from troupe.policy.tokenizer import Tokenizer

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    GENERATION_CONFIG_FILE,
)
"""What travels with the weights, byte for byte, from a model folder into every folder made from it."""

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
LOGITS_BYTES = 64 * 2**20
"""Most memory that the logits of `Policy.compute_log_probs` take at a time."""


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which policy a run starts from."""

    path: str | None = None
    """A Hugging Face model folder; None is the demo's policy."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type to hold the weights in; None: as stored, but float32 on a CPU."""


def read_model_folder(path: str | Path, dtype: str | None = None) -> tuple[Qwen3Config, Weights]:
    """Read config.json and the safetensors of a folder → (config, evaluated weights).

    `dtype`: a name of `DTYPES`; None keeps what is stored, except that on a CPU everything becomes float32, the only
    type with fast matrix products there. Raises ModelError, which names the folder, the file and every bad tensor.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"dtype: {dtype!r} is refused; it must be one of {', '.join(DTYPES)}")
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder; give one that holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    if not (folder / CONFIG_FILE).is_file():
        raise ModelError(f"{folder}: holds no {CONFIG_FILE}, so it is no model folder")
    try:
        config = Qwen3Config.from_dict(_read_json(folder / CONFIG_FILE))
    except ModelError as error:
        message = str(error)
        raise ModelError(message if message.startswith(str(folder)) else f"{folder / CONFIG_FILE}: {message}") from None
    files = _weight_files(folder)
    _check_tensors(folder, config, files)
    target = DTYPES[dtype] if dtype else mx.float32 if is_on_cpu() else None
    wanted = expected_shapes(config)
    weights: dict[str, mx.array] = {}
    for file in files:
        tensors = mx.load(str(file))
        assert isinstance(tensors, dict)
        for name in wanted.keys() & tensors.keys():
            weights[name] = tensors[name] if target is None else tensors[name].astype(target)
    mx.eval(weights)
    return config, {name: weights[name] for name in wanted}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise ModelError(f"{file}: not a JSON object: {error}") from None


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: the whole one, else the shards that the index names."""
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        raise ModelError(f"{folder}: holds neither {WEIGHTS_FILE} nor {INDEX_FILE}; convert the weights to safetensors")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{index}: weight_map: missing, or not an object of tensor name → file name")
    shards = []
    for name in sorted(set(weight_map.values())):
        if PurePosixPath(name).name != name or "\\" in name or name in ("", ".", ".."):
            raise ModelError(f"{index}: weight_map: {name!r} leads out of the folder; shards must lie beside the index")
        if not (folder / name).is_file():
            raise ModelError(f"{index}: weight_map: the shard {name} is missing from {folder}")
        shards.append(folder / name)
    return shards


def _stored_tensors(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → (dtype, shape) of what a safetensors file holds; the data are not read."""
    tensors = {}
    try:
        with safe_open(file, framework="numpy") as stored:
            for name in stored.keys():  # noqa: SIM118 - no mapping: it has `keys` alone
                entry = stored.get_slice(name)
                tensors[name] = (str(entry.get_dtype()), tuple(entry.get_shape()))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: truncated, damaged or no safetensors file ({error}); copy it again") from None
    return tensors


def _check_tensors(folder: Path, config: Qwen3Config, files: list[Path]) -> None:
    """Raise one ModelError that lists every missing, unexpected, mis-shaped or non-float tensor."""
    wanted = expected_shapes(config)
    faults: list[str] = []
    found: set[str] = set()
    for file in files:
        for name, (dtype, shape) in _stored_tensors(file).items():
            if name in found:
                faults.append(f"{name}: stored twice")
            found.add(name)
            if name not in wanted:
                if name != HEAD and not name.endswith("rotary_emb.inv_freq"):
                    faults.append(f"{name}: unexpected in {file.name}")
            elif shape != wanted[name]:
                faults.append(f"{name}: shape {list(shape)} in {file.name}, config.json asks for {list(wanted[name])}")
            elif dtype not in ("F32", "BF16", "F16"):
                faults.append(f"{name}: dtype {dtype} in {file.name}, only F32, BF16 and F16 can be trained")
    faults += [f"{name}: missing" for name in wanted.keys() - found]
    if faults:
        raise ModelError(
            f"{folder}: {len(faults)} bad tensor(s) for its config.json:\n  " + "\n  ".join(sorted(faults))
        )


def save_model_folder(
    path: str | Path, config: Qwen3Config, weights: Weights, source: str | Path | None = None
) -> None:
    """Write a folder that transformers and mlx-lm load: config.json, model.safetensors, and the files beside them.

    config.json, the tokenizer's files and generation_config.json are byte copies of those in the folder `source`;
    without one config.json is made from `config`. Not atomic: `checkpoint` gives a folder its name when it is whole.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / WEIGHTS_FILE), dict(weights), metadata={"format": "pt"})
    origin = None if source is None else Path(source)
    if origin is None or not (origin / CONFIG_FILE).is_file():
        text = msgspec.json.format(msgspec.json.encode(config.to_dict()), indent=2)
        (folder / CONFIG_FILE).write_bytes(text + b"\n")
    if origin is not None:
        for name in (CONFIG_FILE, *COMPANION_FILES):
            original, copy = origin / name, folder / name
            if original.is_file() and original.resolve() != copy.resolve():
                shutil.copyfile(original, copy)


class Policy:
    """A language model in memory: `config`, `weights`, and the folder `path` it came from (None: made at random)."""

    def __init__(self, config: Qwen3Config, weights: Weights, path: Path | None = None) -> None:
        self.config = config
        self.weights = weights
        self.path = path
        self._tokenizer: Tokenizer | None = None

    @property
    def dtype(self) -> str:
        """The name, as in `DTYPES`, of the type that the weights are held in."""
        held = self.weights[EMBEDDING].dtype
        return next(name for name, dtype in DTYPES.items() if dtype == held)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the folder, loaded at the first call. Raises ModelError where there is none."""
        if self._tokenizer is None:
            from troupe.policy.tokenizer import Tokenizer  # a folder without tokenizer still serves ids

            if self.path is None:
                raise ModelError("tokenizer: this policy was made at random and has no folder to read a tokenizer from")
            self._tokenizer = Tokenizer.from_pretrained(self.path)
        return self._tokenizer

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a text: generation_config.json's eos_token_id (one or a list), else config.json's."""
        file = None if self.path is None else self.path / GENERATION_CONFIG_FILE
        eos = _read_json(file).get("eos_token_id") if file is not None and file.is_file() else None
        if eos is None:
            return frozenset(self.config.eos_token_id)
        ids = eos if isinstance(eos, list) else [eos]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise ModelError(f"{file}: eos_token_id: {eos!r} is refused; it must be an id or a list of ids")
        return frozenset(ids)

    def model(self, ids: mx.array) -> mx.array:
        """Integer ids (B, T), no padding → logits (B, T, V)."""
        return project(self.config, self.weights, hidden_states(self.config, self.weights, ids))

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
        rows_at_once = max(1, LOGITS_BYTES // (T * self.config.vocab_size * 4))
        parts = []
        for start in range(0, len(prompts), rows_at_once):
            stop = start + rows_at_once
            parts.append(self._log_probs(prompts[start:stop], completions[start:stop], T))
            mx.eval(parts[-1])
        return mx.concatenate(parts)

    def _log_probs(self, prompts: list[list[int]], completions: list[list[int]], T: int) -> mx.array:
        """`compute_log_probs` for a few rows at once: each is laid out whole and padded on the right."""
        rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
        width = max(map(len, rows))
        ids = mx.array([row + [0] * (width - len(row)) for row in rows])
        hidden = hidden_states(self.config, self.weights, ids)
        t = mx.arange(T)
        before = mx.array([len(prompt) - 1 for prompt in prompts])[:, None] + t  # whose logits foretell token t
        before = mx.minimum(before, width - 1)
        hidden = mx.take_along_axis(hidden, before[..., None], axis=1)
        logits = project(self.config, self.weights, hidden).astype(mx.float32)
        targets = mx.array([row + [0] * (T - len(row)) for row in completions])
        chosen = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - mx.logsumexp(logits, axis=-1)
        return mx.where(t < mx.array([len(row) for row in completions])[:, None], chosen, 0.0)

    def generate_text(
        self,
        prompt: str,
        max_new_tokens: int = 100,
        temperature: float = 0.8,
        top_p: float = 0.95,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> str:
        """Continue `prompt` until a stop token or `max_new_tokens`; the text without prompt and special tokens.

        `seed` None draws a fresh one, so that each call differs.
        """
        generation = GenerationConfig(
            num_generations=1,
            max_completion_length=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k or 0,
        )
        batch = generate_batch(self, [prompt], 1, generation, seed=secrets.randbits(32) if seed is None else seed)
        return batch.texts[0]

    def save(self, path: str | Path) -> None:
        """Write the policy as a model folder; see `save_model_folder`."""
        save_model_folder(path, self.config, self.weights, self.path)


def _id_rows(ids: mx.array | Sequence[Sequence[int]]) -> list[list[int]]:
    if isinstance(ids, mx.array):
        return cast("list[list[int]]", ids.tolist())
    return [list(row) for row in ids]


def load_policy(path: str | Path, dtype: str | None = None) -> Policy:
    """Read a model folder → `Policy`. See `read_model_folder` for `dtype` and errors."""
    config, weights = read_model_folder(path, dtype)
    return Policy(config, weights, Path(path))


def random_policy(config: Qwen3Config, seed: int = 0, dtype: str = "float32") -> Policy:
    """A policy with random weights and no folder, for tests and benchmarks."""
    weights = init_weights(config, mx.random.key(seed), DTYPES[dtype])
    mx.eval(weights)
    return Policy(config, weights)
