"""Which device a worker computes on, and what its bits depend on there.

Asked in a process of its own, so that the worker itself holds nothing of a card.
"""

import os
import sys

import anyio
import msgspec

from troupe.cluster.wire import Facts
from troupe.errors import ConfigError, InputError
from troupe.run.worker.setup import Here

_VISIBLE = "CUDA_VISIBLE_DEVICES"


def chosen_device(device: str | None) -> Here:
    """What `--device` means: `cpu`, `gpu`, or the number of an NVIDIA card; None: MLX's own choice, which is yet to be
    asked for. ConfigError for anything else."""
    if device is None or device == "gpu":
        return Here(on_cpu=False)
    if device == "cpu":
        return Here(on_cpu=True)
    if not (device.isascii() and device.isdigit()):
        raise ConfigError(f"--device {device}: a device is cpu, gpu, or the number of an NVIDIA card")
    visible = [name for name in os.environ.get(_VISIBLE, "").split(",") if name]
    if visible and int(device) >= len(visible):
        raise ConfigError(f"--device {device}: {_VISIBLE} leaves {len(visible)} cards here, counted from 0")
    return Here(on_cpu=False, env={_VISIBLE: visible[int(device)] if visible else device})


async def asked_machine(device: str | None) -> tuple[Here, Facts]:
    """The device, and what is to be told of it. InputError where it is not there."""
    here = chosen_device(device)
    asked = await anyio.run_process(
        [sys.executable, "-P", "-m", "troupe.cluster.facts", *(["cpu"] if here.on_cpu else [])],
        env={**os.environ, **here.env, "PYTHONPATH": _import_path()},
        check=False,
    )
    try:
        facts = msgspec.json.decode(asked.stdout, type=Facts)
    except msgspec.MsgspecError:
        last = (asked.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        raise InputError(f"MLX cannot be used here: {last}; what is wrong: troupe doctor") from None
    is_cpu = facts.device == "cpu"
    if device not in (None, "cpu") and is_cpu:
        raise InputError(f"--device {device}: MLX finds no such device here, only the processor")
    return msgspec.structs.replace(here, on_cpu=is_cpu), facts


def _import_path() -> str:
    return os.pathsep.join(os.path.abspath(entry) for entry in sys.path)  # noqa: PTH100 - "" is the working directory
