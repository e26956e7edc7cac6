"""`troupe doctor`: what this machine gives to MLX, what is slow about it, and how to mend it."""

from __future__ import annotations

import os
import platform
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import anyio
import click
import msgspec

from troupe.cli.commands import fail, report_errors
from troupe.run.measure.figures import LONGEST_S, check_writable, machine_file, read_measurement, write_measurement
from troupe.runtime import linux_cpu
from troupe.runtime.files import expanded
from troupe.runtime.machine import device_name, memory_gb, missing_backend, processors
from troupe.runtime.roles import together
from troupe.runtime.terminal import EXIT_BAD_INPUT, tell, tell_json, tell_rows

if TYPE_CHECKING:
    from troupe.run.measure.work import Size

T = TypeVar("T")

_SLOW_GFLOPS = 20.0
_SIZE, _REPEATS = 768, 5
_CUDA = Path("/usr/local/cuda")
_NO_TOOLKIT = "no CUDA toolkit found: MLX compiles some kernels with it; install it or set CUDA_HOME"


@click.command(name="doctor", short_help="Tell what this machine gives, and lacks.")
@click.option("--fits", is_flag=True, help="Tell which model fits which memory instead, by formula.")
@click.option(
    "--measure",
    metavar="[FILE]",
    is_flag=False,
    flag_value="",
    help="Measure it within three minutes, into a JSON file; without FILE into the one in the user's folder.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@report_errors
def doctor(*, fits: bool, measure: str | None, as_json: bool) -> None:
    """Tell what this machine gives, what is slow, and how to mend it."""
    if fits and measure is not None:
        raise click.UsageError("--fits and --measure are two questions; ask one")
    if fits:
        tell_fits(as_json=as_json)
        return
    if measure is not None:
        tell_measured(expanded(measure) if measure else machine_file(), as_json=as_json)
        return
    report = examine()
    if as_json:
        tell_json(msgspec.json.encode(report).decode())
    else:
        tell_rows(describe(report))


def tell_fits(*, as_json: bool) -> None:
    """Print what training each published model takes, all of it or an adapter."""
    try:
        from troupe.run.fits import describe as describe_fits  # here, since it needs MLX
        from troupe.run.fits import predict_fits
    except ImportError as error:
        if (reason := missing_backend(error)) is None:
            raise
        fail(reason, EXIT_BAD_INPUT)
    fits = predict_fits()
    if as_json:
        tell_json(msgspec.json.encode(fits).decode())
        return
    tell(describe_fits(fits))


def tell_measured(path: Path, *, as_json: bool, size: Size | None = None, longest_s: float = LONGEST_S) -> None:
    """Measure this machine, write the file, and print a table. `size`: what to measure with; None chooses. InputError
    where the file cannot be written, before anything is measured."""
    check_writable(path)
    try:
        from troupe.run.measure.machine import measure_machine  # here, since it needs MLX
        from troupe.run.measure.table import describe as describe_figures
    except ImportError as error:
        if (reason := missing_backend(error)) is None:
            raise
        fail(reason, EXIT_BAD_INPUT)

    def say(what: str) -> None:
        tell(f"measuring {what}", error=True)

    tell(f"this takes {longest_s / 60:.0f} minutes at the most; let nothing else run meanwhile", error=True)
    measurement = anyio.run(_uninterrupted, partial(measure_machine, say, size=size, longest_s=longest_s))
    write_measurement(path, measurement)
    if as_json:
        tell_json(msgspec.json.encode(measurement).decode())
    else:
        tell(describe_figures(measurement))
    tell(f"written to {path}", error=True)


async def _uninterrupted(work: Callable[[], Awaitable[T]]) -> T:
    """What it comes to; KeyboardInterrupt where a signal ends it before."""
    working, listening, results = anyio.CancelScope(), anyio.CancelScope(), list[T]()

    async def do_work() -> None:
        with working:
            results.append(await work())
        listening.cancel()

    async def listen() -> None:
        with listening, anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                working.cancel()

    await together([do_work, listen])
    if not results:
        raise KeyboardInterrupt
    return results[0]


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """One machine as MLX sees it."""

    python: str
    platform: str
    mlx: str
    device: str
    """`gpu` or `cpu`, and its name where MLX knows it."""
    blas: str
    """Where matrix products run on the CPU."""
    threads: int
    """Processors that this process may use."""
    memory_gb: float | None
    """Memory of the machine; None where the system does not tell."""
    memory_limit_gb: float | None
    """What a run's arrays may take where `memory_limit_gb` names nothing else; None is no limit."""
    matmul_gflops: float | None
    """Measured: float32 products of 768 × 768 matrices on the default device; None where MLX cannot be imported."""
    measurement: str
    """What the file of `--measure` in the user's folder is, in words."""
    advice: tuple[str, ...]
    """What to mend, one line each; empty where nothing is amiss."""


def examine() -> Machine:
    """Look at the machine; takes well under a second."""
    device, gflops, limit_gb = "unknown", None, None
    try:
        import mlx.core as mx  # here, and all that needs it: a machine without it is one to tell of

        from troupe.runtime.memory import device_limit_gb
    except ImportError as error:
        if (reason := missing_backend(error)) is None:
            raise
        advice = [reason, *linux_cpu.advice()]
    else:
        device, gflops, limit_gb = device_name(), measure_matmul(), device_limit_gb()
        advice = advise(gflops, on_cpu=mx.default_device() == mx.Device(mx.cpu))
    return Machine(
        python=f"{platform.python_version()} ({sys.executable})",
        platform=platform.platform(),
        mlx=_mlx_version(),
        device=device,
        blas={
            "loaded": "OpenBLAS",
            "missing": "the reference BLAS of the mlx wheel",
            "too late": "the reference BLAS of the mlx wheel, loaded before OpenBLAS",
            "not needed": "Accelerate",
        }[linux_cpu.load_openblas()],
        threads=processors(),
        memory_gb=memory_gb(),
        memory_limit_gb=limit_gb,
        matmul_gflops=None if gflops is None else round(gflops, 1),
        measurement=_of_file(machine_file(), with_mlx=gflops is not None),
        advice=tuple(advice),
    )


def _of_file(path: Path, *, with_mlx: bool) -> str:
    measurement = read_measurement(path)
    if measurement is None:
        return f"none (troupe doctor --measure writes {path})"
    if with_mlx and measurement.is_of_this_machine:
        return f"{path}, of {measurement.made}"
    return f"{path}, which is of another machine or MLX and does not count; measure again: troupe doctor --measure"


def advise(gflops: float, *, on_cpu: bool, known: Callable[[], list[str]] = linux_cpu.advice) -> list[str]:
    """What to mend where MLX works. `known`: reasons why a CPU is slow."""
    if not on_cpu:
        lacking = sys.platform == "linux" and "CUDA_HOME" not in os.environ and not _CUDA.is_dir()
        return [_NO_TOOLKIT] if lacking else []
    if (advice := known()) or gflops >= _SLOW_GFLOPS:
        return advice
    return [f"matrix products reach only {gflops:.0f} GFLOP/s: is another program busy, or mlx imported first?"]


def _mlx_version() -> str:
    try:
        return version("mlx")
    except PackageNotFoundError:
        return "not installed"


def describe(machine: Machine) -> str:
    """The machine as lines for a person."""
    memory = "unknown" if machine.memory_gb is None else f"{machine.memory_gb:.1f} GB"
    limit = "none" if machine.memory_limit_gb is None else f"{machine.memory_limit_gb:.1f} GB (memory_limit_gb)"
    measured = "nothing: MLX cannot be imported"
    if machine.matmul_gflops is not None:
        measured = f"{machine.matmul_gflops:,.0f} GFLOP/s, float32, on the default device"
    rows = [
        ("Python", machine.python),
        ("platform", machine.platform),
        ("mlx", machine.mlx),
        ("device", machine.device),
        ("CPU matrix products", machine.blas),
        ("processors", str(machine.threads)),
        ("memory", memory),
        ("limit of a run", limit),
        ("measured", measured),
        ("file of figures", machine.measurement),
    ]
    lines = [f"{label:<20} {value}" for label, value in rows]
    lines += [f"to mend: {line}" for line in machine.advice] or ["nothing to mend"]
    return "\n".join(lines)


def measure_matmul(clock: Callable[[], float] = time.perf_counter) -> float:
    """GFLOP/s of the fastest of several products."""
    import mlx.core as mx

    a = mx.random.normal((_SIZE, _SIZE), key=mx.random.key(0))
    mx.eval(a @ a)
    best_s = float("inf")
    for _ in range(_REPEATS):
        start_s = clock()
        mx.eval(a @ a)
        best_s = min(best_s, clock() - start_s)
    return 2 * _SIZE**3 / best_s / 1e9
