"""Files of user code as modules: under which names they are imported, and how they are found under them.

A process that `multiprocessing` spawns gets functions by the names of their modules, and this process's `sys.path`, in
which the folder of every such file is. It imports `troupe` on its way, and so finds them. Quick to import.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

PREFIX = "troupe_reward_"


class _UncachedLoader(SourceFileLoader):
    """Compiles the file anew: leaves no cache beside it and never runs an older one."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def module_name(path: Path) -> str:
    """Of a file, resolved: another one for other contents. OSError where it cannot be read."""
    import hashlib  # only who loads such code needs it

    identity = hashlib.sha256(str(path).encode() + b"\0" + path.read_bytes()).hexdigest()[:16]
    return f"{PREFIX}{path.stem}_{identity}"


def spec_of(name: str, path: Path) -> ModuleSpec:
    """How to import a file under a name."""
    spec = importlib.util.spec_from_loader(name, _UncachedLoader(name, str(path)))
    assert spec is not None
    return spec


def name_of(found: object) -> str:
    """By which another process finds a function or class: "FILE.py:NAME" or "MODULE:NAME".

    Raises:
        ValueError: where it cannot; with a clause that says why.
    """
    module, qualname = getattr(found, "__module__", None), getattr(found, "__qualname__", None)
    if module is None or qualname is None or "<" in qualname:
        raise ValueError(
            "cannot be loaded by name in another process, for it is a lambda, a local function or an object"
        )
    loaded = sys.modules.get(module)
    there: object = loaded
    for part in qualname.split("."):
        there = getattr(there, part, None)
    if there is not found or loaded is None or module == "__main__" or "." in qualname:
        raise ValueError(f"cannot be loaded by name in another process: {module}.{qualname} is not to be found there")
    return f"{loaded.__file__ if module.startswith(PREFIX) else module}:{qualname}"


class RewardFileFinder:
    """The last of `sys.meta_path`."""

    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The file of that name in `sys.path`, where it has still the contents that the name tells of."""
        if not fullname.startswith(PREFIX):
            return None
        stem = fullname.removeprefix(PREFIX).rpartition("_")[0]
        for folder in sys.path:
            file = Path(folder, f"{stem}.py")
            if file.is_file() and module_name(file.resolve()) == fullname:
                return spec_of(fullname, file.resolve())
        return None


sys.meta_path.append(RewardFileFinder)
