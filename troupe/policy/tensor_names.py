"""Names that other tools give to tensors: ours for them, and what names that do not fit tell of a folder."""

import re
from collections.abc import Collection, Sequence

from troupe.policy.model_files import some
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.quantization import EXPERTS, STACKED_BY_MLX_LM
from troupe.policy.network.tensors import EMBEDDING, HEAD, ROUTER

_FRONT = frozenset({"module", "base_model", "model", "language_model"})
"""Names of parts around a network, in any order and number: `model.language_model.layers.0…` is `model.layers.0…`. A
base model as it is published has none at all."""
_ANYWHERE = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What `torch.compile` and its like put into a name where they wrap a part."""

_ADAPTER = re.compile(r"\.(lora_\w+|base_layer|modules_to_save|original_module)(\.|$)|^lora_")
_PACKED = re.compile(r"\.(scales|biases)$")
"""What MLX puts beside a matrix that it has packed."""
_FOREIGN = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_scale(_inv|_2)?|weight_packed|weight_shape|weight_zero_point|"
    r"input_scale|SCB|absmax|quant_map|nested_absmax|quant_state\S*)$"
)
_HEAD = HEAD.removesuffix("weight")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_ANCHOR = "embed_tokens.weight"


def canonical_name(stored: str) -> str:
    """The name of this tensor without what tools put around it, as in `expected_shapes`: "layers.0.mlp.up_proj.weight"
    and "_orig_mod.model.layers.0.mlp.up_proj.weight" → "model.layers.0.mlp.up_proj.weight".
    """
    parts = [part for part in stored.split(".") if part not in _ANYWHERE]
    while parts and parts[0] in _FRONT:
        parts.pop(0)
    bare = ".".join(parts).replace(STACKED_BY_MLX_LM, EXPERTS)
    return bare if bare.startswith(_HEAD) or not bare else f"model.{bare}"


def is_passed_over(stored: str, config: NetworkConfig) -> bool:
    """Whether this tensor is of another part than that for text, or computed from the configuration, and stored by old
    tools for no use."""
    part = canonical_name(stored).split(".")[1:2]
    return stored.endswith("rotary_emb.inv_freq") or not config.family.other_parts.isdisjoint(part)


def what_the_names_tell(missing: Collection[str], unexpected: Sequence[str], config: NetworkConfig) -> str:
    """Why these names do not fit, with the remedy, where there is a known cause; else "".

    `missing`: canonical names that no file has; `unexpected`: names as stored.
    """
    layers = config.num_hidden_layers
    if adapters := [name for name in unexpected if _ADAPTER.search(name)]:
        return f"it holds adapters beside the weights ({some(adapters)}); fuse or merge first, then give the result"
    if foreign := [name for name in unexpected if _FOREIGN.search(name)]:
        return (
            f"its weights are quantized ({some(foreign)}) in a format that is not read; take the unquantized folder of "
            "this model, and quantize it with mlx_lm.convert -q where it must be small"
        )
    if packed := [name for name in unexpected if _PACKED.search(name) and _layer_of(name) < layers]:
        how = "does not say so" if config.quantization is None else "says otherwise"
        return (
            f"its weights are quantized ({some(packed)}), and config.json's quantization {how}; copy the config.json "
            "that came with them"
        )
    if experts := [name for name in unexpected if EXPERTS in canonical_name(name)]:
        return _of_experts(experts, config)
    if config.sparse_layers and all(f"model.layers.{i}.{ROUTER}.weight" in missing for i in config.sparse_layers):
        return _is_another("it holds no experts", config)
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
    if other := _another_family(missing, unexpected, config):
        return _is_another(other, config)
    last = max(map(_layer_of, unexpected), default=-1)
    if last >= layers:
        return f"it holds layers up to {last}, but config.json's num_hidden_layers is {layers}"
    lacking = {int(match[1]) for name in missing if (match := _LAYER.match(name))}
    if lacking and min(lacking) > 0 and lacking == set(range(min(lacking), layers)):
        return f"it holds no layer from {min(lacking)} on, but config.json's num_hidden_layers is {layers}"
    return ""


def _of_experts(unexpected: Sequence[str], config: NetworkConfig) -> str:
    """Why there are tensors of experts that the network does not have."""
    if not config.sparse_layers:
        return _is_another(f"it holds a mixture of experts ({some(unexpected)})", config)
    if dense := [name for name in unexpected if _layer_of(name) not in config.sparse_layers]:
        return (
            f"it holds experts in layers ({some(dense)}) that have none by config.json's decoder_sparse_step "
            f"{config.decoder_sparse_step}, mlp_only_layers {list(config.mlp_only_layers)} and num_hidden_layers "
            f"{config.num_hidden_layers}"
        )
    return f"it holds other experts ({some(unexpected)}) than config.json says (num_experts {config.num_experts})"


def _is_another(found: str, config: NetworkConfig) -> str:
    return f"{found}; it is another kind of network than config.json says (model_type {config.model_type!r})"


def _another_family(missing: Collection[str], unexpected: Sequence[str], config: NetworkConfig) -> str:
    """What parts there are, or not, that tell of another family than that of the config; "" where none does."""
    if biases := [name for name in unexpected if name.endswith("_proj.bias")]:
        return f"its projections have biases ({some(biases)}) that such a network has not"
    if any("mlp" in name for name in missing):
        return ""
    if without := [name for name in missing if name.endswith("_proj.bias")]:
        return f"its projections have no biases ({some(without)})"
    if any(name.endswith("q_norm.weight") for name in missing):
        return "it has no norms of queries and keys (q_norm, k_norm)"
    if norms := [name for name in unexpected if "norm" in name and _layer_of(name) < config.num_hidden_layers]:
        return f"it has norms that such a network has not ({some(norms)})"
    if norms := [name for name in missing if "norm" in name]:
        return f"it lacks norms of such a network ({some(norms)})"
    return ""


def _layer_of(stored: str) -> int:
    """The number of the layer that a tensor belongs to; −1 for what is outside of all."""
    match = _LAYER.match(canonical_name(stored))
    return -1 if match is None else int(match[1])
