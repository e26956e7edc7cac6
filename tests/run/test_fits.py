"""The table of which model fits which memory: what it says, a plan says too."""

import mlx.core as mx
import msgspec
import pytest

from troupe.errors import ConfigError
from troupe.grpo import LearnerConfig
from troupe.policy import PRESETS, AdapterConfig, GenerationConfig, parameter_count
from troupe.policy.adapter.modules import resolve_adapter
from troupe.policy.network.quantization import Quantization, Quantized
from troupe.run.config import RunConfig
from troupe.run.fits import MACHINES_GB, WAYS, Fit, Fits, Way, describe, predict_fits, table
from troupe.run.memory import plan_memory
from troupe.run.workload import Workload
from troupe.runtime.memory import RESERVE


@pytest.fixture(scope="module")
def fits() -> Fits:
    return predict_fits()


def found(fits: Fits, model: str, way: Way) -> Fit:
    [fit] = [fit for fit in fits.rows if (fit.model, fit.way) == (model, way)]
    return fit


@pytest.mark.parametrize("model", ["Qwen3-0.6B", "Qwen3-8B"])
@pytest.mark.parametrize("way", WAYS)
def test_a_run_fits_the_peak_that_is_told_and_no_less(model: str, way: Way, fits: Fits) -> None:
    policy = PRESETS[model]
    if way == "QLoRA":
        policy = msgspec.structs.replace(policy, quantization=Quantization(Quantized(64, 4)))
    adapter = None if way == "all weights" else resolve_adapter(AdapterConfig(kind="lora", rank=16), policy)
    work = Workload(policy=policy, dtype=mx.bfloat16, longest_prompt=256, on_cpu=False, adapter=adapter)
    peak_gb = found(fits, model, way).peak_gb

    def plan(usable_gb: float) -> None:
        config = RunConfig(
            memory_limit_gb=usable_gb / (1.0 - RESERVE),
            generation=GenerationConfig(num_generations=8, max_completion_length=512),
            learner=LearnerConfig(batch_size=4),
        )
        plan_memory(config, work)

    plan(peak_gb + 0.051)
    with pytest.raises(ConfigError, match="the run takes"):
        plan(peak_gb - 0.051)


def test_an_adapter_takes_less_than_all_weights_and_a_packed_base_less_than_its_floats(fits: Fits) -> None:
    assert [fit.model for fit in fits.rows[::3]] == list(PRESETS)
    for model, policy in PRESETS.items():
        whole, lora, qlora = (found(fits, model, way).peak_gb for way in WAYS)
        numbers = parameter_count(policy) / 1e9
        assert whole > 14 * numbers, "weights, optimizer state and gradients"
        assert 2 * numbers < lora < 0.3 * whole
        assert 0.56 * numbers < qlora < lora - 1.3 * numbers


@pytest.mark.parametrize(("has_cuda", "device", "share"), [(True, "an NVIDIA card", 0.9), (False, "Apple's GPU", 0.7)])
def test_a_machine_leaves_a_run_a_share_of_its_memory(
    has_cuda: bool, device: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx.cuda, "is_available", lambda: has_cuda)
    fits = predict_fits()
    assert (fits.device, fits.share) == (device, share)
    for fit in fits.rows:
        wide = [size for size in MACHINES_GB if fit.peak_gb <= 0.95 * share * size]
        assert fit.machine_gb == (wide[0] if wide else None)
    assert {fit.machine_gb for fit in fits.rows} > {16, 128, None}


SMALL = [("all weights", 11.84, 24), ("LoRA", 2.0, 16), ("QLoRA", 1.0, 16)]
LARGE = [("all weights", 489.7, None), ("LoRA", 71.0, 128), ("QLoRA", 24.0, 64)]
FITS = Fits(
    device="a GPU",
    workload="a run",
    share=0.7,
    rows=tuple(
        msgspec.convert({"model": model, "way": way, "peak_gb": peak_gb, "machine_gb": machine_gb}, Fit)
        for model, rows in (("Small", SMALL), ("Large", LARGE))
        for way, peak_gb, machine_gb in rows
    ),
)


def test_the_table_as_markdown() -> None:
    assert table(FITS).splitlines() == [
        "| GB | all weights | LoRA | QLoRA |",
        "|---|---:|---:|---:|",
        "| Small | 11.8 (24) | 2.0 (16) | 1.0 (16) |",
        "| Large | 489.7 (above 128) | 71.0 (128) | 24.0 (64) |",
    ]


def test_the_table_for_a_person() -> None:
    assert describe(FITS).splitlines() == [
        "predicted by formula for a GPU: a run",
        "",
        "GB     all weights        LoRA        QLoRA",
        "Small  11.8 (24)          2.0 (16)    1.0 (16)",
        "Large  489.7 (above 128)  71.0 (128)  24.0 (64)",
        "",
        "peak of a run's arrays, with all chosen that saves memory; in brackets the smallest machine of 16,",
        "24, 32, 64 and 128 GB, of whose memory 70% count as a run's limit",
    ]
