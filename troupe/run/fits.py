"""Which published model fits which memory, all of it trained or an adapter, by the formula of `memory.py`.

In words: docs/memory.md.
"""

import textwrap
from collections.abc import Sequence
from typing import Literal

import mlx.core as mx
import msgspec

from troupe.checkpoint import CheckpointConfig
from troupe.grpo import LearnerConfig
from troupe.policy import PRESETS, AdapterConfig, GenerationConfig, parameter_count
from troupe.policy.adapter.modules import resolve_adapter
from troupe.policy.network.quantization import Quantization, Quantized
from troupe.run.config import RunConfig
from troupe.run.memory import least_bytes
from troupe.run.workload import Workload
from troupe.runtime.memory import CUDA_SHARE, GB, RESERVE

Way = Literal["all weights", "LoRA", "QLoRA"]

WAYS: Sequence[Way] = ("all weights", "LoRA", "QLoRA")
RANK, PROMPTS, COMPLETIONS, PROMPT_TOKENS, COMPLETION_TOKENS = 16, 4, 8, 256, 512
PACKING = Quantized(group_size=64, bits=4)
"""Of QLoRA's base, as `mlx_lm.convert -q` packs where it is told nothing else."""
MACHINES_GB = (16, 24, 32, 64, 128)
APPLE_SHARE = 0.7
"""Of a Mac's memory: about the least that Metal recommends for arrays."""
_WIDTH = 100


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """What training one model in one way takes."""

    model: str
    way: Way
    peak_gb: float
    """10⁹ bytes of arrays at the most, with all chosen that saves memory."""
    machine_gb: int | None
    """The smallest of `MACHINES_GB` that leaves a run so much; None: none does."""


class Fits(msgspec.Struct, frozen=True, kw_only=True):
    """What training each published model in each way takes on a GPU."""

    device: str
    workload: str
    share: float
    """Of a machine's memory that counts as a run's limit."""
    rows: tuple[Fit, ...]


def predict_fits() -> Fits:
    """The table for an NVIDIA card where MLX is built for one, else for Apple's GPU; takes about a second."""
    has_cuda = mx.cuda.is_available()
    share = CUDA_SHARE if has_cuda else APPLE_SHARE
    return Fits(
        device="an NVIDIA card" if has_cuda else "Apple's GPU",
        workload=f"{PROMPTS} prompts of {PROMPT_TOKENS} tokens × {COMPLETIONS} completions of {COMPLETION_TOKENS}, "
        f"max_staleness 0; adapters of rank {RANK} on all matrices, QLoRA's base in {PACKING.bits} bits, all else in "
        "bfloat16",
        share=share,
        rows=tuple(_fit(model, way, share) for model in PRESETS for way in WAYS),
    )


def largest_fitting(fits: Fits, limit_gb: float) -> dict[str, str | None]:
    """Way of training → the largest model whose peak leaves a run's reserve of so many 10⁹ bytes; None: none does."""
    size = {name: parameter_count(policy) for name, policy in PRESETS.items()}
    found: dict[str, str | None] = {}
    for way in WAYS:
        fitting = [each.model for each in fits.rows if each.way == way and each.peak_gb <= (1.0 - RESERVE) * limit_gb]
        found[way] = max(fitting, key=lambda name: size[name], default=None)
    return found


def table(fits: Fits) -> str:
    """As Markdown: the peak, and in brackets the smallest machine."""
    lines = [f"| GB | {' | '.join(WAYS)} |", f"|---|{'---:|' * len(WAYS)}"]
    for model in dict.fromkeys(fit.model for fit in fits.rows):
        cells = [_cell(fit) for fit in fits.rows if fit.model == model]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def describe(fits: Fits) -> str:
    """The same as lines for a person, with what the figures mean."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(fits).splitlines()]
    rows.pop(1)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sizes = f"{', '.join(map(str, MACHINES_GB[:-1]))} and {MACHINES_GB[-1]} GB"
    return "\n".join(
        [
            *textwrap.wrap(f"predicted by formula for {fits.device}: {fits.workload}", _WIDTH),
            "",
            *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows),
            "",
            *textwrap.wrap(
                "peak of a run's arrays, with all chosen that saves memory; in brackets the smallest machine of "
                f"{sizes}, of whose memory {fits.share:.0%} count as a run's limit",
                _WIDTH,
            ),
        ]
    )


def _cell(fit: Fit) -> str:
    machine = f"above {MACHINES_GB[-1]}" if fit.machine_gb is None else str(fit.machine_gb)
    return f"{fit.peak_gb:.1f} ({machine})"


def _fit(model: str, way: Way, share: float) -> Fit:
    policy = PRESETS[model]
    if way == "QLoRA":
        policy = msgspec.structs.replace(policy, quantization=Quantization(PACKING))
    adapter = None if way == "all weights" else resolve_adapter(AdapterConfig(kind="lora", rank=RANK), policy)
    config = RunConfig(
        generation=GenerationConfig(num_generations=COMPLETIONS, max_completion_length=COMPLETION_TOKENS),
        learner=LearnerConfig(batch_size=PROMPTS, gradient_checkpointing=True),
        checkpoint=CheckpointConfig(overlap=False),
    )
    work = Workload(policy=policy, dtype=mx.bfloat16, longest_prompt=PROMPT_TOKENS, on_cpu=False, adapter=adapter)
    peak = least_bytes(config, work)
    wide = [size for size in MACHINES_GB if peak <= (1.0 - RESERVE) * share * size * GB]
    return Fit(model=model, way=way, peak_gb=round(peak / GB, 1), machine_gb=wide[0] if wide else None)
