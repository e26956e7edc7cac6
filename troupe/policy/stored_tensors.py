"""The tensors of a model folder where they are stored: which there are, whether they are those that its config.json
asks for, and reading them.

Tensors are known by the names that other tools give them, too, and where they are not, their names tell why.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import mlx.core as mx
import msgspec

from troupe.errors import ModelError
from troupe.policy.model_files import CONFIG_FILE
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.tensors import (
    CONVOLUTION,
    HEAD,
    dtype_in,
    expected_shapes,
    is_packable,
    is_stack,
    network_shapes,
    stored_names,
)
from troupe.policy.safetensors import StoredTensor, read_header
from troupe.policy.tensor_names import canonical_name, is_passed_over, what_the_names_tell

_SHOWN = 6
"""Faults that a message lists; where each of many tensors has one, the first tell enough."""
_FLOATS = ("F32", "BF16", "F16")
"""Types that float numbers may be stored in, as headers name them."""


class Stored(NamedTuple):
    """Where a tensor is."""

    file: Path
    name: str


Headers: TypeAlias = list[tuple[Path, str, StoredTensor]]
"""Of each tensor the file, the name there, and what the header says."""


def read_headers(files: Sequence[Path]) -> Headers:
    """The tensors of all files, with the file of each."""
    headers: Headers = []
    for file in files:
        try:
            headers += [(file, name, tensor) for name, tensor in read_header(file)]
        except OSError as error:
            raise ModelError(f"{file}: cannot be read: {error}") from None
    return headers


def config_as_stored(folder: Path, config: NetworkConfig, headers: Headers) -> NetworkConfig:
    """The config with our names of modules and what the tensors tell: whether there is a head of its own, and which
    matrices are not packed. mlx-lm leaves out those whose rows its groups do not divide, and does not write it down.
    ModelError where none is packed."""
    stored = {canonical_name(name): tensor.dtype for _, name, tensor in headers}
    if config.tie_word_embeddings and HEAD in stored:
        config = msgspec.structs.replace(config, tie_word_embeddings=False)
    if config.quantization is None:
        return config
    named = {canonical_name(f"{name}.weight"): packing for name, packing in config.quantization.modules.items()}
    modules = {name.removesuffix(".weight"): packing for name, packing in named.items()}
    names = stored_names(msgspec.structs.replace(config, quantization=None))
    shapes = network_shapes(config)
    matrices = {name.removesuffix(".weight"): names[name] for name, shape in shapes.items() if is_packable(name, shape)}
    dense = [
        name
        for name, (first, *_) in matrices.items()
        if f"{name}.scales" not in stored and stored.get(f"{name}.weight", stored.get(first)) in _FLOATS
    ]
    if len(dense) == len(matrices):
        raise ModelError(
            f"{folder / CONFIG_FILE}: quantization: no tensor is quantized as it says; remove the key, and "
            "quantization_config, or copy the weights that belong to it"
        )
    quantization = config.quantization.having(modules | dict.fromkeys(dense))
    return msgspec.structs.replace(config, quantization=quantization)


def find_tensors(folder: Path, config: NetworkConfig, headers: Headers) -> dict[str, Stored]:
    """Where each tensor of the network is, those of experts one by one where they are stored so (`stacked` puts them
    together). Raises one ModelError that tells of missing, unexpected, mis-shaped and mis-typed tensors, and why,
    where that is known."""
    try:
        wanted = expected_shapes(config)
    except ModelError as error:
        raise ModelError(f"{folder / CONFIG_FILE}: {error}") from None
    stacks = {name: names for name, names in _one_by_one(config).items() if name in wanted}
    whole_of = {part: name for name, parts in stacks.items() for part in parts}
    asked = wanted | {part: wanted[name][1:] for part, name in whole_of.items()}
    places: dict[str, Stored] = {}
    faults: list[str] = []
    unexpected: list[str] = []
    for file, name, tensor in headers:
        known = canonical_name(name)
        if known not in asked:
            if not is_passed_over(name, config):
                unexpected.append(name)
                faults.append(f"{name}: unexpected in {file.name}")
            continue
        same = [known, whole_of.get(known, ""), *stacks.get(known, ())]
        other = next((places[one] for one in same if one in places), None)
        if other is not None:
            names = "" if other.name == name else f", as {other.name} and as {name},"
            faults.append(f"{known}: stored twice{names} in {file.name}")
        elif tensor.shape not in ((shape := asked[known]), _as_mlx_lm_lays_it_out(known, shape)):
            faults.append(f"{name}: shape {list(tensor.shape)} in {file.name}, config.json asks for {list(shape)}")
        elif tensor.dtype not in (dtypes := _stored_dtypes(config, whole_of.get(known, known))):
            faults.append(f"{name}: dtype {tensor.dtype} in {file.name}, it must be {' or '.join(dtypes)}")
        places[known] = Stored(file, name)
    missing = set[str]()
    for name in wanted.keys() - places.keys():
        parts = stacks.get(name, [name])
        lacking = [part for part in parts if part not in places]
        is_whole_elsewhere = config.quantization is not None and len(lacking) == len(parts)
        missing |= {name} if is_whole_elsewhere else set(lacking)
    faults += [f"{name}: missing" for name in missing]
    if faults:
        cause = what_the_names_tell(missing, unexpected, config)
        why = f" {cause}" if cause else ""
        raise ModelError(f"{folder}: {len(faults)} bad tensor(s) for its config.json:{why}{listed(faults)}")
    return places


def _as_mlx_lm_lays_it_out(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a convolution (C, 1, taps) has in folders of mlx-lm; any other as it is."""
    return (shape[0], *shape[:0:-1]) if name.endswith(CONVOLUTION) else shape


def as_ours(config: NetworkConfig, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Tensors as stored → as Hugging Face lays them out: where mlx-lm has turned convolutions, it has added to norms
    what they multiply by beside their weight, too."""
    wanted = expected_shapes(config)
    turned = {name for name, x in weights.items() if name.endswith(CONVOLUTION) and x.shape != wanted[name]}
    if not turned:
        return weights
    offset = config.family.norm_offset
    laid = {name: tensor.swapaxes(1, 2) if name in turned else tensor for name, tensor in weights.items()}
    norms = [name for name in laid if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight")]
    return laid | {name: (laid[name].astype(mx.float32) - offset).astype(laid[name].dtype) for name in norms}


def _one_by_one(config: NetworkConfig) -> Mapping[str, Sequence[str]]:
    """Stack of all experts → the tensors of each."""
    if not config.sparse_layers:
        return {}
    names = stored_names(msgspec.structs.replace(config, quantization=None))
    return {name: parts for name, parts in names.items() if is_stack(name)}


def _stored_dtypes(config: NetworkConfig, name: str) -> Sequence[str]:
    """The types that a tensor may be stored in."""
    packed = {mx.uint32: ["U32"], mx.uint8: ["U8"]}
    return packed.get(dtype_in(config, name, mx.float32), _FLOATS)


def load_tensors(places: Mapping[str, Stored]) -> dict[str, mx.array]:
    """The tensors under our names, not evaluated."""
    weights: dict[str, mx.array] = {}
    for file in sorted({place.file for place in places.values()}):
        tensors = mx.load(str(file))
        assert isinstance(tensors, dict)
        weights |= {name: tensors[place.name] for name, place in places.items() if place.file == file}
    return weights


def listed(faults: list[str]) -> str:
    """One a line, but no more than are read."""
    shown = sorted(faults)[:_SHOWN]
    more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
    return "".join(f"\n  {line}" for line in (*shown, *more))
