"""Model folders as Hugging Face lays them out: config.json, safetensors whole or in shards, tokenizer files.

Tensors are known by the names that other tools give them, too, and where they are not, their names tell why.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import msgspec

from troupe.errors import InputError, ModelError
from troupe.policy.model_files import (
    CONFIG_FILE,
    DTYPES,
    INDEX_FILE,
    WEIGHTS_FILE,
    WEIGHTS_NAME,
    Companions,
    check_folder,
    dtype_name,
    read_json,
    some,
    weight_files,
)
from troupe.policy.network.architecture import Qwen3Config
from troupe.policy.network.elementwise import is_on_cpu
from troupe.policy.network.qwen3 import EMBEDDING, HEAD, Weights, expected_shapes
from troupe.policy.safetensors import read_header

MAX_SHARD_BYTES = 5_000_000_000
"""Where Hugging Face's tools split a model by default."""
_SHOWN = 6
"""Faults that a message lists; where each of many tensors has one, the first tell enough."""
_INTEGERS = {2: (mx.uint16, mx.int16), 4: (mx.uint32, mx.int32)}
_INFINITY = {mx.float32: 0x7F800000, mx.bfloat16: 0x7F80, mx.float16: 0x7C00}
"""By its bits, as an integer; numbers that are not finite begin with it, whatever their sign."""
_ROOM = {mx.float16: 5, mx.bfloat16: 8, mx.float32: 9}
"""Orders the types by the largest number that each has room for; float32 has a little more than bfloat16."""
_AT_ONCE = 16
"""Tensors that are read, cast and looked at together."""

_FRONT = frozenset({"module", "base_model", "model", "language_model"})
"""Names of parts around a network, in any order and number: `model.language_model.layers.0…` is `model.layers.0…`. A
base model as it is published has none at all."""
_ANYWHERE = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What `torch.compile` and its like put into a name where they wrap a part."""

_ADAPTER = re.compile(r"\.(lora_\w+|base_layer|modules_to_save|original_module)(\.|$)|^lora_")
_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|scales|biases|g_idx|weight_scale(_inv|_2)?|weight_packed|weight_shape|weight_zero_point|"
    r"input_scale|SCB|absmax|quant_map|nested_absmax|quant_state\S*)$"
)
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_ANCHOR = "embed_tokens.weight"


class _Stored(NamedTuple):
    """Where a tensor is."""

    file: Path
    name: str


def read_model_folder(path: str | Path, dtype: str | None = None) -> tuple[Qwen3Config, Weights]:
    """Read config.json and the safetensors of a folder → (config, evaluated weights).

    `dtype`: a name of `DTYPES`; None keeps what is stored, or where that is several types, the one of the embedding for
    all; except that on a CPU everything becomes float32, the only type with fast matrix products there. Tensors may
    have other prefixes than Hugging Face's (`canonical_name`). Where an own `lm_head.weight` lies beside
    tie_word_embeddings: true and is not the embedding, it is kept, and the config says that they are not tied. Raises
    ModelError, which names the folder, the file and bad tensors: those that hold NaN or infinity in that type, too.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"dtype: {dtype!r} is refused; it must be one of {', '.join(DTYPES)}")
    folder = Path(path)
    check_folder(folder)
    try:
        config = Qwen3Config.from_dict(read_json(folder / CONFIG_FILE))
    except ModelError as error:
        message = str(error)
        raise ModelError(message if message.startswith(str(folder)) else f"{folder / CONFIG_FILE}: {message}") from None
    places = _check_tensors(folder, config, weight_files(folder))
    stored = _load(places)
    if config.tie_word_embeddings and HEAD in stored:
        if _are_equal(stored[HEAD], stored[EMBEDDING]):
            del stored[HEAD]
        else:
            config = msgspec.structs.replace(config, tie_word_embeddings=False)
    kept = DTYPES[dtype] if dtype else mx.float32 if is_on_cpu() else stored[EMBEDDING].dtype
    weights = _finite(folder, places, stored, kept)
    return config, {name: weights[name] for name in expected_shapes(config)}


def _load(places: Mapping[str, _Stored]) -> dict[str, mx.array]:
    """The tensors under our names, not evaluated."""
    weights: dict[str, mx.array] = {}
    for file in sorted({place.file for place in places.values()}):
        tensors = mx.load(str(file))
        assert isinstance(tensors, dict)
        weights |= {name: tensors[place.name] for name, place in places.items() if place.file == file}
    return weights


def _are_equal(a: mx.array, b: mx.array) -> bool:
    if a.dtype != b.dtype:
        a, b = a.astype(mx.float32), b.astype(mx.float32)
    return bool(mx.array_equal(a, b).item())


def _check_tensors(folder: Path, config: Qwen3Config, files: list[Path]) -> dict[str, _Stored]:
    """Where each tensor of the network is, with the head of its own that a tied one may have. Raises one ModelError
    that tells of missing, unexpected, mis-shaped and non-float tensors, and why, where that is known."""
    wanted = expected_shapes(config)
    shapes = wanted | {HEAD: wanted[EMBEDDING]}
    places: dict[str, _Stored] = {}
    faults: list[str] = []
    unexpected: list[str] = []
    for file in files:
        try:
            header = read_header(file)
        except OSError as error:
            raise ModelError(f"{file}: cannot be read: {error}") from None
        for name, tensor in header:
            known = canonical_name(name)
            if known not in shapes:
                if not is_harmless(name):
                    unexpected.append(name)
                    faults.append(f"{name}: unexpected in {file.name}")
                continue
            if known in places:
                other = places[known].name
                names = "" if other == name else f", as {other} and as {name},"
                faults.append(f"{known}: stored twice{names} in {file.name}")
            elif tensor.shape != (asked := shapes[known]):
                faults.append(f"{name}: shape {list(tensor.shape)} in {file.name}, config.json asks for {list(asked)}")
            elif tensor.dtype not in ("F32", "BF16", "F16"):
                faults.append(f"{name}: dtype {tensor.dtype} in {file.name}, only F32, BF16 and F16 can be trained")
            places[known] = _Stored(file, name)
    missing = wanted.keys() - places.keys()
    faults += [f"{name}: missing" for name in missing]
    if faults:
        cause = what_the_names_tell(missing, unexpected, config.num_hidden_layers)
        why = f" {cause}" if cause else ""
        raise ModelError(f"{folder}: {len(faults)} bad tensor(s) for its config.json:{why}{_listed(faults)}")
    return places


def _finite(
    folder: Path, places: Mapping[str, _Stored], stored: dict[str, mx.array], kept: mx.Dtype
) -> dict[str, mx.array]:
    """Take all of `stored` and give it evaluated, in the type `kept`. Raises ModelError where a number is not finite.

    As integers numbers of one sign are ordered by size, so that the largest of each sign tells: two reductions a
    tensor, which copy nothing. What a type cannot lose is looked at in the fewer bytes that are stored.
    """
    weights: dict[str, mx.array] = {}
    bad: list[str] = []
    names = list(stored)
    for start in range(0, len(names), _AT_ONCE):
        extremes = []
        for name in names[start : start + _AT_ONCE]:
            tensor = stored.pop(name)  # or its memory would stay beside that of the other type
            weights[name] = tensor.astype(kept)  # no copy where that is its type
            seen = weights[name] if _ROOM[kept] < _ROOM[tensor.dtype] else tensor
            unsigned, signed = _INTEGERS[seen.dtype.size]
            extremes.append((name, seen.dtype, mx.max(mx.view(seen, signed)), mx.max(mx.view(seen, unsigned))))
            del tensor, seen
        mx.eval([weights[name] for name, *_ in extremes], [extreme[2:] for extreme in extremes])
        for name, dtype, above, below in extremes:
            infinity, sign = _INFINITY[dtype], 1 << (8 * dtype.size - 1)
            if int(above.item()) >= infinity or int(below.item()) >= sign + infinity:  # type: ignore[arg-type]
                bad.append(name)
    if bad:
        raise ModelError(_what_is_not_finite(folder, places, kept, bad))
    return weights


def _what_is_not_finite(folder: Path, places: Mapping[str, _Stored], kept: mx.Dtype, bad: list[str]) -> str:
    faults, is_room = [], True
    for name in bad:
        file, stored = places[name]
        was_finite = bool(mx.all(mx.isfinite(_load({name: places[name]})[name])).item())
        is_room &= was_finite
        reason = f"not finite in {dtype_name(kept)}, which has no room for its numbers" if was_finite else "not finite"
        faults.append(f"{stored}: {reason} (in {file.name})")
    remedy = (
        "hold the weights in another type (model.dtype, --dtype)"
        if is_room
        else "such weights cannot be used; copy the model again, or take one from before it diverged"
    )
    return f"{folder}: NaN or infinity in {len(faults)} tensor(s); {remedy}:{_listed(faults)}"


def _listed(faults: list[str]) -> str:
    """One a line, but no more than are read."""
    shown = sorted(faults)[:_SHOWN]
    more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
    return "".join(f"\n  {line}" for line in (*shown, *more))


def save_model_folder(
    path: str | Path,
    config: Qwen3Config,
    weights: Weights,
    source: str | Path | Companions | None = None,
    max_shard_bytes: int | None = None,
) -> None:
    """Write a folder that transformers and mlx-lm load: config.json, the weights, and the files beside them.

    The weights go into model.safetensors or, where they are more than `max_shard_bytes`, into shards of at most so many
    bytes with an index (a tensor that is larger has a shard of its own). config.json, the tokenizer's files and
    generation_config.json are byte copies of those of `source`, a model folder or what was kept of one, but for what
    config.json says of type and head where these weights are otherwise; without one config.json is made from `config`.
    Older weights in the folder are removed. Not atomic: `checkpoint` gives a folder its name when it is whole. Raises
    InputError for a limit below 1.
    """
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise InputError(f"max_shard_bytes: {max_shard_bytes} is refused; give at least 1, or None for one file")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    in_order = {name: weights[name] for name in expected_shapes(config)}  # equal weights make equal files
    written = set(_save_weights(folder, in_order, max_shard_bytes))
    for file in folder.iterdir():
        if WEIGHTS_NAME.fullmatch(file.name) and file.name not in written:
            file.unlink()  # else a reader might take it for these weights
    companions_of(source).write(folder, config, weights)


def companions_of(source: str | Path | Companions | None) -> Companions:
    """Those that were kept, or that a model folder has now."""
    if isinstance(source, Companions):
        return source
    return Companions() if source is None else Companions.of(Path(source))


def _save_weights(folder: Path, weights: Weights, max_shard_bytes: int | None) -> Iterator[str]:
    """Write the tensors → the names of the files."""
    total = sum(tensor.nbytes for tensor in weights.values())
    if max_shard_bytes is None or total <= max_shard_bytes:
        mx.save_safetensors(str(folder / WEIGHTS_FILE), dict(weights), metadata={"format": "pt"})
        yield WEIGHTS_FILE
        return
    shards = _split(weights, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        mx.save_safetensors(str(folder / name), dict(shard), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
        yield name
    metadata = {"total_parameters": sum(tensor.size for tensor in weights.values()), "total_size": total}
    index = msgspec.json.encode({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
    (folder / INDEX_FILE).write_bytes(msgspec.json.format(index, indent=2) + b"\n")
    yield INDEX_FILE


def _split(weights: Mapping[str, mx.array], max_bytes: int) -> list[dict[str, mx.array]]:
    """Runs of tensors, in order, of at most `max_bytes` each, or of a single one."""
    shards: list[dict[str, mx.array]] = []
    room = 0
    for name, tensor in weights.items():
        if tensor.nbytes > room:
            shards.append({})
            room = max_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return shards


def canonical_name(stored: str) -> str:
    """The name of this tensor without what tools put around it, as in `expected_shapes`: "layers.0.mlp.up_proj.weight"
    and "_orig_mod.model.layers.0.mlp.up_proj.weight" → "model.layers.0.mlp.up_proj.weight".
    """
    parts = [part for part in stored.split(".") if part not in _ANYWHERE]
    while parts and parts[0] in _FRONT:
        parts.pop(0)
    bare = ".".join(parts)
    return bare if bare == HEAD or not bare else f"model.{bare}"


def is_harmless(stored: str) -> bool:
    """Whether this tensor is computed from the configuration, and stored by old tools for no use."""
    return stored.endswith("rotary_emb.inv_freq")


def what_the_names_tell(missing: Collection[str], unexpected: Sequence[str], layers: int) -> str:
    """Why these names do not fit, with the remedy, where there is a known cause; else "".

    `missing`: canonical names that no file has; `unexpected`: names as stored. `layers`: num_hidden_layers.
    """
    if adapters := [name for name in unexpected if _ADAPTER.search(name)]:
        return f"it holds adapters beside the weights ({some(adapters)}); fuse or merge first, then give the result"
    if quantized := [name for name in unexpected if _QUANTIZED.search(name)]:
        return (
            f"its weights are quantized ({some(quantized)}), and such weights cannot be trained; use the unquantized "
            "folder of this model"
        )
    if experts := [name for name in unexpected if ".experts." in name]:
        return f"it holds a mixture of experts ({some(experts)}); Troupe trains the dense Qwen3 models"
    if EMBEDDING in missing and (strange := [name for name in unexpected if name.endswith(_ANCHOR)]):
        prefix = strange[0].removesuffix(_ANCHOR)
        return (
            f"the names of its tensors begin with {prefix!r}, which is not known; rename them to begin with 'model.', "
            f"as in {EMBEDDING}"
        )
    if missing == {HEAD}:
        return (
            f"config.json does not say tie_word_embeddings: true, so there must be an {HEAD}; add it, or set that key "
            "where the embedding serves as the head"
        )
    if biases := [name for name in unexpected if name.endswith("_proj.bias")]:
        return f"its projections have biases ({some(biases)}), which Qwen3's do not; it is another kind of network"
    if any(name.endswith("q_norm.weight") for name in missing) and not any("mlp" in name for name in missing):
        return "it has no norms of queries and keys (q_norm, k_norm), as Qwen3 does; it is another kind of network"
    stored = [int(match[1]) for name in unexpected if (match := _LAYER.match(canonical_name(name)))]
    if stored and max(stored) >= layers:
        return f"it holds layers up to {max(stored)}, but config.json's num_hidden_layers is {layers}"
    lacking = {int(match[1]) for name in missing if (match := _LAYER.match(name))}
    if lacking and min(lacking) > 0 and lacking == set(range(min(lacking), layers)):
        return f"it holds no layer from {min(lacking)} on, but config.json's num_hidden_layers is {layers}"
    return ""
