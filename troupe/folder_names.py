"""What a user calls a folder, as a path. Quick to import; knows nothing of what is in the folder."""

from __future__ import annotations

import stat
from pathlib import Path

from troupe.errors import OutputError


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
