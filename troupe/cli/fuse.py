"""`troupe fuse`: a model folder with an adapter in it."""

from contextlib import suppress
from pathlib import Path
from typing import cast

import click
import mlx.core as mx

from troupe.checkpoint import save_final_policy
from troupe.cli.commands import Command, report_errors
from troupe.cli.config import find_policy
from troupe.errors import ModelError, OutputError
from troupe.policy import Policy, load_policy
from troupe.policy.adapter.fuse import fuse as fuse_network
from troupe.policy.folders import read_model_folder, stored_dtype
from troupe.policy.load import adapter_beside, resolve_base
from troupe.policy.model_files import Companions
from troupe.runtime.terminal import tell

_TEXTS = ("The capital of France is", "12 + 30 =", "def add(a, b):\n    return", "Once upon a time")
_IDS = 12
"""Of a text without a tokenizer."""


@click.command(
    cls=Command,
    keys={"model": "model.path", "adapter": "adapter.resume_from"},
    short_help="Put an adapter into its base.",
)
@click.option("-m", "--model", metavar="MODEL_DIR", help="The base; default: the one that the adapter names.")
@click.option("--adapter", metavar="ADAPTER_DIR", required=True, help="Adapter of a run, of PEFT or of mlx-lm.")
@click.option("-o", "--output", metavar="OUT_DIR", required=True, help="Where the model folder goes.")
@click.option("--dequantize", is_flag=True, help="Of a quantized base write float numbers, which keeps the adapter.")
@report_errors
def fuse(model: str | None, adapter: str, output: str, *, dequantize: bool) -> None:
    """Write a model folder that is the base with the adapter in it, and tell what rounding costs."""
    out = Path(output).expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out}: is there already and not empty; give another folder (-o OUT_DIR)")
    folder, beside, _ = resolve_base(*find_policy(model, adapter))
    assert beside is not None
    config, weights = read_model_folder(folder, stored_dtype(folder), expand=False)
    stored = adapter_beside(beside, config, folder)
    was_packed = config.quantization is not None
    fused_config, fused = fuse_network(config, dict(weights), stored.adapter, stored.weights, dequantize=dequantize)
    del weights
    save_final_policy(out, fused_config, fused, Companions.of(folder))
    del fused
    apart = _apart(load_policy(folder, adapter=beside), load_policy(out))
    tell(f"fused {len(stored.adapter.modules)} matrices into {out}")
    rounded = "packing them again" if was_packed and not dequantize else "rounding them"
    tell(f"largest difference of a logit, by {rounded}: {apart:.3g} (over {len(_TEXTS)} short texts)")
    if was_packed and not dequantize:
        tell("note: the adapter beside its base is exact, and so is --dequantize")


def _apart(exact: Policy, fused: Policy) -> float:
    """The largest difference of a logit, over a few texts."""
    largest = 0.0
    for number, text in enumerate(_TEXTS):
        row = mx.array([_ids(exact, text, number)])
        apart = mx.max(mx.abs(exact.model(row).astype(mx.float32) - fused.model(row).astype(mx.float32)))
        largest = max(largest, float(apart))
    return largest


def _ids(policy: Policy, text: str, number: int) -> list[int]:
    """A text as ids; any ids where the base has no tokenizer that can be read."""
    with suppress(ModelError):
        if policy.companions.have_tokenizer:
            return policy.tokenizer.encode(text)
    drawn = mx.random.randint(0, policy.config.vocab_size, (_IDS,), key=mx.random.key(number))
    return cast("list[int]", drawn.tolist())
