"""The files of a model folder: those of its weights, with true words where none can be read; those beside the weights,
which travel with them (configuration, tokenizer, chat template); and what tells one folder from another.

What travels is kept as bytes from the moment a model is loaded, so that what becomes of its folder afterwards touches
nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import mlx.core as mx
import msgspec

from troupe.errors import ModelError
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.config_keys import text_settings
from troupe.policy.network.quantization import QUANTIZATION_KEYS, quantization_table
from troupe.policy.network.tensors import Weights, weights_dtype
from troupe.policy.safetensors import read_start

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
"""What files of weights, and the index of shards, are called."""

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
SAMPLES, SAMPLE_BYTES = 64, 16_384
"""Pieces of each file of weights that are looked at, evenly spaced, and how long each is."""
_SHOWN = 3
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapters.safetensors", "adapter_model.bin", "adapters.npz")
_OTHER_FORMATS = (
    ("*.gguf", "which is llama.cpp's format; take the model's folder of safetensors"),
    ("*.bin", "a pickle, which is not read; save it anew with transformers, whose save_pretrained writes safetensors"),
    ("*.pt", "a pickle, which is not read; save it anew with transformers, whose save_pretrained writes safetensors"),
    ("*.pth", "a pickle, which is not read; save it anew with transformers, whose save_pretrained writes safetensors"),
    ("*.npz", "weights of an old MLX program; convert the model again with a newer one, which writes safetensors"),
    ("*.h5", "TensorFlow's format; save it anew with transformers, whose save_pretrained writes safetensors"),
    ("*.msgpack", "Flax's format; save it anew with transformers, whose save_pretrained writes safetensors"),
    ("*.onnx", "a graph that cannot be trained; take the model's folder of safetensors"),
)


def some(names: Collection[str]) -> str:
    """The first of them, and how many more there are."""
    shown = sorted(names)[:_SHOWN]
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def check_folder(folder: Path) -> None:
    """Raise ModelError, saying what it is, where this is no folder of a whole model."""
    if folder.is_file():
        raise ModelError(f"{folder}: is a file; give the model folder that it lies in")
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder; give one that holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    adapters = [name for name in _ADAPTER_WEIGHTS if (folder / name).is_file()]
    is_whole = any(_SHARD.fullmatch(name) or name in (WEIGHTS_FILE, INDEX_FILE) for name in _names(folder))
    if (adapters or (folder / ADAPTER_CONFIG).is_file()) and not is_whole:
        raise ModelError(
            f"{folder}: holds an adapter ({', '.join(adapters or [ADAPTER_CONFIG])}) and no whole model; fuse or "
            f"merge first with {_base_model(folder)}, and give the folder that comes of it"
        )
    if not (folder / CONFIG_FILE).is_file():
        inner = sorted(file.parent.name for name in (CONFIG_FILE, ADAPTER_CONFIG) for file in folder.glob(f"*/{name}"))
        hint = f"; give {folder / inner[0]}" if inner else ""
        if is_whole:
            hint = f"; copy {CONFIG_FILE} beside the weights"
        raise ModelError(f"{folder}: holds no {CONFIG_FILE}, so it is no model folder{hint}")
    if adapters:
        raise ModelError(
            f"{folder}: holds a whole model and an adapter ({', '.join(adapters)}), and does not say whether the one "
            f"is in the other already; fuse or merge first, or move {', '.join(adapters)} elsewhere to train without it"
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: the whole one, else the shards that the index names, else those that are
    numbered as shards where none is missing. ModelError says what there is instead."""
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if (folder / INDEX_FILE).is_file():
        return _indexed_shards(folder, folder / INDEX_FILE)
    if shards := _numbered_shards(folder):
        return shards
    raise ModelError(f"{folder}: holds neither {WEIGHTS_FILE} nor {INDEX_FILE}{_instead(folder)}")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError, naming the file, where there is none."""
    try:
        return parse_json(file, file.read_bytes())
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error}") from None


def parse_json(file: Path, content: bytes) -> dict[str, Any]:
    """The object in the content of a JSON file. Raises ModelError, naming the file, where there is none."""
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{file}: not a JSON object: {error}") from None


def _indexed_shards(folder: Path, index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
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


def _numbered_shards(folder: Path) -> list[Path]:
    """Shards without an index, whose names say how many there are."""
    found = {name: match for name in _names(folder) if (match := _SHARD.fullmatch(name))}
    counts = sorted({match[2] for match in found.values()})
    if len(counts) > 1:
        raise ModelError(
            f"{folder}: {INDEX_FILE} is missing, and shards of several models lie here (of {', of '.join(counts)}); "
            "copy the index too, or keep the shards of one model"
        )
    for count in counts:
        wanted = (f"model-{number:05d}-of-{count}.safetensors" for number in range(1, int(count) + 1))
        missing = next((name for name in wanted if name not in found), None)
        if missing is not None:
            raise ModelError(
                f"{folder}: the shard {missing} is missing, and {INDEX_FILE}, which would name it, too; copy them here"
            )
    return [folder / name for name in sorted(found)]


def _instead(folder: Path) -> str:
    """What else there is, and what can be done with it."""
    names = _names(folder)
    if broken := [file.name for file in sorted(folder.iterdir()) if not file.exists()]:
        return f", but links that lead nowhere ({some(broken)}); copy, or fetch, what they stand for"
    if others := [name for name in names if name.endswith(".safetensors")]:
        rename = WEIGHTS_FILE if len(others) == 1 else "model-00001-of-0000N.safetensors and so on"
        return (
            f", but safetensors under other names ({some(others)}); if they are this model's weights, rename to "
            f"{rename}"
        )
    for pattern, meaning in _OTHER_FORMATS:
        if others := [name for name in names if PurePosixPath(name).match(pattern)]:
            return f", but {some(others)}, {meaning}"
    return f"; copy the model's weights beside {CONFIG_FILE}"


def _names(folder: Path) -> list[str]:
    try:
        return sorted(file.name for file in folder.iterdir() if file.is_file())
    except OSError as error:
        raise ModelError(f"{folder}: cannot be read: {error}") from None


def _base_model(folder: Path) -> str:
    """The model that an adapter belongs to, as far as it says."""
    try:
        settings = read_json(folder / ADAPTER_CONFIG)
    except ModelError:
        settings = {}
    named = [settings.get(key) for key in ("base_model_name_or_path", "model")]  # PEFT's and mlx-lm's
    base = next((name for name in named if isinstance(name, str) and name), None)
    return "its base model" if base is None else f"its base model {base}"


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

    def write(self, folder: Path, config: NetworkConfig, weights: Weights) -> None:
        """Write them beside these weights: as they are, but for what config.json says of the weights that is not so;
        where there is none, it is made from `config`."""
        self.write_unchanged(folder)
        content = self.files.get(CONFIG_FILE)
        if content is None:
            _write(folder / CONFIG_FILE, _formatted(config.to_dict()))
        elif (settings := parse_json(folder / CONFIG_FILE, content)) != (true := _corrected(settings, config, weights)):
            _write(folder / CONFIG_FILE, _formatted(true))


def _corrected(settings: dict[str, object], config: NetworkConfig, weights: Weights) -> dict[str, object]:
    """With the type that the weights are held in, in which transformers would load them, the head that they have, and
    the class of network that their names are those of."""
    held, whole = dtype_name(weights_dtype(weights)), settings
    settings = dict(text_settings(settings))
    true: dict[str, object] = {key: held for key in ("dtype", "torch_dtype") if settings.get(key) not in (None, held)}
    if config.quantization is None:
        settings = {key: value for key, value in settings.items() if key not in QUANTIZATION_KEYS}
    elif not any(settings.get(key) for key in QUANTIZATION_KEYS):
        true |= dict.fromkeys(QUANTIZATION_KEYS, quantization_table(config.quantization))
    said = settings.get("tie_word_embeddings")
    tied = config.family.defaults.get("tie_word_embeddings", False) if said is None else bool(said)
    if tied != config.tie_word_embeddings:
        true["tie_word_embeddings"] = config.tie_word_embeddings
    is_part = settings.keys() != whole.keys()
    if is_part or settings.get("architectures") not in (None, [config.family.architecture]):
        true["architectures"] = [config.family.architecture]
    return settings | true


def _formatted(settings: Mapping[str, object]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(settings), indent=2) + b"\n"


def _write(file: Path, content: bytes) -> None:
    if file.is_symlink():
        file.unlink()  # else what it leads to, elsewhere, would be overwritten
    file.write_bytes(content)


def model_fingerprint(folder: Path) -> str:
    """64 hexadecimal digits that are the same for the same model, wherever it lies.

    All of the configuration and the tokenizer's files counts; of the weights the names, sizes, headers (names, types
    and shapes of all tensors) and `SAMPLES` pieces of each file, about 1 MB. A folder in which single numbers were
    changed may therefore pass; one that was trained on does not. OSError where a file cannot be read.
    """
    return _fingerprint([*companion_files(folder), *_weight_files(folder)])


def network_fingerprint(folder: Path) -> str:
    """The same of config.json and the weights alone: what an adapter stands beside, whichever tokenizer's files, chat
    template and settings of generation lie there."""
    return _fingerprint([file for file in (folder / CONFIG_FILE, *_weight_files(folder)) if file.is_file()])


def _fingerprint(files: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for file in sorted(files):
        size = file.stat().st_size
        total.update(f"{file.name}\0{size}\0".encode())
        for piece in _pieces(file, size):
            total.update(piece)
    return total.hexdigest()


def _weight_files(folder: Path) -> Iterator[Path]:
    return (file for file in (folder / INDEX_FILE, *folder.glob("*.safetensors")) if file.is_file())


def _pieces(file: Path, size: int) -> Iterator[bytes]:
    if file.suffix != ".safetensors":
        yield file.read_bytes()
        return
    with file.open("rb") as stream:
        yield read_start(stream)
        begin = stream.tell()
        step = max((size - begin) // SAMPLES, SAMPLE_BYTES)
        for start in range(begin, size, step):
            stream.seek(start)
            yield stream.read(SAMPLE_BYTES)
        if size - SAMPLE_BYTES > begin:
            stream.seek(size - SAMPLE_BYTES)
            yield stream.read(SAMPLE_BYTES)
