"""What kernels of our own for NVIDIA cards share: the vocabulary that they are written in (`units.cuh`)."""

from pathlib import Path

_UNITS = Path(__file__).with_name("units.cuh")


def cuda_header(*more: Path) -> str:
    """The `header` of a kernel for `mx.fast.cuda_kernel`: the vocabulary, and files behind it."""
    return "\n".join(path.read_text(encoding="utf-8") for path in (_UNITS, *more))
