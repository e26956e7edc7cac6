"""What a user calls a folder or a file, as a path. Quick to import; of what is in a folder it knows where a run has its
policies."""

import shlex
import stat
from pathlib import Path

from troupe.errors import ModelError, OutputError

_OF_A_RUN = ("final", "checkpoints", "metrics.jsonl", "run.sqlite", "run.lock", "summary.json")
"""One of these lies beside `run.toml` where a run has begun, and not where somebody keeps a file of that name."""


def run_folder_named(name: str) -> Path:
    """The absolute path of a run folder, which need not exist.

    OutputError where nothing can be called so, or where a file is. The name goes into run.toml, so it has to be text.
    """
    try:
        name.encode()
        folder = Path(name).expanduser().absolute()
        is_file = not stat.S_ISDIR(folder.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        is_file = False
    except (OSError, RuntimeError, ValueError) as error:
        raise OutputError(f"{name!r}: this cannot be a run folder: {error}; give another one") from None
    if not name:
        raise OutputError("the name of the output folder is empty; give one (-o OUT_DIR)")
    if is_file:
        raise OutputError(f"{folder}: this is a file; give a folder that does not exist yet, or that of a run")
    return folder


def policy_folder(path: Path) -> Path:
    """The model folder that a path means: of the folder of a run, the policy that it ended with; else itself.

    ModelError where that run has none yet, which names its newest checkpoint.
    """
    began = (path / "run.toml").is_file() and any((path / name).exists() for name in _OF_A_RUN)
    if not began or (path / "config.json").exists():
        return path
    if any((path / "final" / name).is_file() for name in ("config.json", "adapter_config.json")):
        return path / "final"
    checkpoints = [folder for folder in path.glob("checkpoints/step-*") if (folder / "MANIFEST.json").is_file()]
    if checkpoints:
        newest = max(checkpoints, key=lambda folder: folder.name)
        remedy = f"its newest checkpoint is a model folder, too: {newest}"
    else:
        remedy = f"nor a checkpoint; what it does: troupe status {shlex.quote(str(path))}"
    raise ModelError(f"{path}: the run in this folder has no final policy yet; {remedy}")


DEMO = Path(__file__).parent.parent / "cli" / "demo"


def moved_demo_file(path: str) -> str:
    """The shipped file where a path led into the demo of a Troupe that kept it in `troupe/demo`, and leads nowhere now;
    else the path as it is."""
    _, found, rest = path.rpartition("/troupe/demo/")
    shipped = DEMO / rest
    return str(shipped) if found and not Path(path).exists() and shipped.exists() else path
