"""What a machine's log-prob bits may depend on, in words: `python -m troupe.cluster.facts [cpu]` prints it as JSON.

In a process of its own nothing of a card is held by who asks.
"""

import platform
import sys

import mlx.core as mx
import msgspec

from troupe.cluster.wire import Facts
from troupe.runtime.machine import VERSION, arithmetic, processors


def facts_here() -> Facts:
    """Of this process, with MLX's default device."""
    found = arithmetic()
    tf32 = ", TF32 off" if found.get("tf32") == "0" else ""
    return Facts(
        troupe=VERSION,
        mlx=found["mlx"],
        device=found["device"] + tf32,
        blas=found.get("blas", ""),
        machine=f"{platform.node()}, {found['system']}, {processors()} processors",
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["cpu"]:
        mx.set_default_device(mx.cpu)
    sys.stdout.write(msgspec.json.encode(facts_here()).decode())
