"""What lies beside the weights in a model folder and travels with them: configuration, tokenizer, chat template.

Kept as bytes from the moment a model is loaded, so that what becomes of its folder afterwards touches nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import msgspec

from troupe.errors import ModelError
from troupe.policy.model_files import CONFIG_FILE, parse_json
from troupe.policy.network.architecture import ARCHITECTURE, Qwen3Config
from troupe.policy.network.qwen3 import EMBEDDING, Weights

GENERATION_CONFIG_FILE = "generation_config.json"
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
RANK_FILE = ".tiktoken"
"""How the name of another such file ends."""

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def dtype_name(dtype: mx.Dtype) -> str:
    """The name, as in `DTYPES`, of a type that weights are held in."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def companion_files(folder: Path) -> list[Path]:
    """What lies beside the weights of a model folder."""
    named = [folder / name for name in (CONFIG_FILE, *COMPANION_FILES)]
    return [file for file in (*named, *sorted(folder.glob(f"*{RANK_FILE}"))) if file.is_file()]


class Companions(msgspec.Struct, frozen=True):
    """Files by name. Links are followed, as everybody does who reads a model (the hub's cache is made of them): what is
    kept, and written, is what they lead to."""

    files: Mapping[str, bytes] = {}

    @classmethod
    def of(cls, folder: Path) -> Companions:
        """Those of a model folder, read now. ModelError where one cannot be read."""
        files = {}
        for file in companion_files(folder):
            try:
                files[file.name] = file.read_bytes()
            except OSError as error:
                raise ModelError(f"{file}: cannot be read: {error}") from None
        return cls(files)

    @property
    def total_bytes(self) -> int:
        """Of all of them."""
        return sum(map(len, self.files.values()))

    @property
    def have_tokenizer(self) -> bool:
        """Whether a vocabulary is among them."""
        return any(name in ("tokenizer.json", "vocab.json") or name.endswith(RANK_FILE) for name in self.files)

    def write_unchanged(self, folder: Path) -> None:
        """Write all of them into a folder that is there."""
        for name, content in self.files.items():
            _write(folder / name, content)

    def write(self, folder: Path, config: Qwen3Config, weights: Weights) -> None:
        """Write them beside these weights: as they are, but for what config.json says of the weights that is not so;
        where there is none, it is made from `config`."""
        self.write_unchanged(folder)
        content = self.files.get(CONFIG_FILE)
        if content is None:
            _write(folder / CONFIG_FILE, _formatted(config.to_dict()))
        elif (settings := parse_json(folder / CONFIG_FILE, content)) != (true := _corrected(settings, config, weights)):
            _write(folder / CONFIG_FILE, _formatted(true))


def _corrected(settings: dict[str, object], config: Qwen3Config, weights: Weights) -> dict[str, object]:
    """With the type that the weights are held in, in which transformers would load them, the head that they have, and
    the class of network that their names are those of."""
    held = dtype_name(weights[EMBEDDING].dtype)
    true: dict[str, object] = {key: held for key in ("dtype", "torch_dtype") if settings.get(key) not in (None, held)}
    if bool(settings.get("tie_word_embeddings")) != config.tie_word_embeddings:
        true["tie_word_embeddings"] = config.tie_word_embeddings
    if settings.get("architectures") not in (None, [ARCHITECTURE]):
        true["architectures"] = [ARCHITECTURE]
    return settings | true


def _formatted(settings: Mapping[str, object]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(settings), indent=2) + b"\n"


def _write(file: Path, content: bytes) -> None:
    if file.is_symlink():
        file.unlink()  # else what it leads to, elsewhere, would be overwritten
    file.write_bytes(content)
