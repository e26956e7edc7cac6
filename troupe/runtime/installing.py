"""How somebody installs what is missing: in a clone by its extras, elsewhere by the packages that an extra stands for.

Imports nothing of ours, and no package that may be missing.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

_PARENT = Path(__file__).resolve().parents[2]
_REQUIREMENT = re.compile(r"(?P<package>[^;]+?)\s*;.*\bextra\s*==\s*['\"](?P<extra>[^'\"]+)['\"]")


_BACKENDS = "on Linux it needs a backend beside it;"


def in_clone() -> bool:
    """Whether this is a clone of the repository, and not an installed wheel."""
    return (_PARENT / "setup.sh").is_file() and (_PARENT / "pyproject.toml").is_file()


def packages_of(extra: str) -> list[str]:
    """What an extra of Troupe's stands for, as pip reads it; empty where the installation does not say."""
    try:
        found = map(_REQUIREMENT.fullmatch, requires("troupe") or [])
    except PackageNotFoundError:
        return []
    return [match["package"].replace(" ", "") for match in found if match and match["extra"] == extra]


def remedy(extra: str) -> str:
    """What to do where a package of an extra is missing; a clause for a message."""
    packages = packages_of(extra)
    if in_clone() or not packages:
        return f"install Troupe's extra in its clone: pip install -e '.[{extra}]'"
    return f"install it: {pip(packages)}"


def pip(packages: list[str]) -> str:
    """The command that installs packages where Troupe is, whatever `pip` means in the shell."""
    return shlex.join([sys.executable, "-m", "pip", "install", *packages])


def backend_remedy() -> str:
    """What to do where MLX cannot be imported; a clause for a message."""
    if sys.platform != "linux":
        return (
            "MLX needs macOS 14 or newer and a native Python of Apple's chips (python3 -c 'import platform; "
            f"print(platform.machine())' says arm64); install it anew: {pip(['--force-reinstall', 'mlx'])}"
        )
    if in_clone():
        return f"{_BACKENDS} in the clone: ./setup.sh, or for an NVIDIA card: BACKEND=cuda ./setup.sh"
    cpu, cuda = (packages_of(extra) or [f"mlx[{name}]"] for extra, name in (("cpu", "cpu"), ("cuda", "cuda13")))
    return f"{_BACKENDS} install it: {pip(cpu)}, or for an NVIDIA card: {pip(cuda)}"


def unusable_backend() -> str | None:
    """What to tell where MLX cannot be imported, found out in a process of its own; None where it can."""
    tried = subprocess.run(
        [sys.executable, "-c", "import mlx.core"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if not tried.returncode:
        return None
    last = (tried.stderr.strip().splitlines() or [f"it ended with {tried.returncode}"])[-1]
    return f"MLX cannot be imported ({last}); {backend_remedy()}"


def missing_backend(error: ImportError) -> str | None:
    """What to tell where this import failed because MLX is not there, or not whole; None where it is about others."""
    is_mlx = (error.name or "").partition(".")[0] == "mlx" or "mlx" in str(error).lower()
    return f"MLX cannot be imported ({error}); {backend_remedy()}" if is_mlx else None
