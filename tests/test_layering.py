"""The import rules of the house: who may know whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import troupe

PACKAGE = Path(troupe.__file__).parent
EVERYWHERE = {"errors", "escapes", "home", "installing"}
ROOMS = {"messages", "grpo", "policy", "runtime", "rewards", "dataset", "sinks", "checkpoint"}
ROOMS |= {"schedule", "statistics", "learning", "gathering", "open_groups", "restoring", "weights_files", "wire"}
ROOMS |= {"run_store", "machine", "training"}

# room or root module → what it may import of ours, besides itself and errors
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "escapes": set(),
    "home": set(),
    "installing": set(),
    "outlets": set(),
    "process_wide": set(),
    "linux_cpu": {"process_wide"},
    "reward_files": set(),
    "machine": set(),
    "wiring": {"process_wide"},
    "web": set(),
    "report": {
        "daemon",
        "folder_names",
        "inspecting",
        "messages",
        "run_lock",
        "run_store",
        "stored_run",
        "tables",
        "terminal",
        "web",
        "__init__",
    },
    "demo": set(),
    "messages": set(),
    "grpo": set(),
    "policy": set(),
    "runtime": {"messages", "outlets"},
    "dataset": {"messages"},
    "run_store": {"messages"},
    "stored_run": {"messages", "run_store"},
    "inspecting": {"run_store", "stored_run", "terminal"},
    "sinks": {"held_folder", "messages", "outlets", "run_store"},
    "rewards": {"messages", "reward_files", "runtime"},
    "checkpoint": {"messages", "policy"},
    "schedule": {"dataset", "messages", "policy"},
    "statistics": {"messages", "grpo"},
    "learning": {"messages", "policy", "grpo", "statistics"},
    "gathering": {"learning", "messages", "schedule"},
    "open_groups": {"messages"},
    "restoring": {"messages", "schedule"},
    "weights_files": {"checkpoint", "policy"},
    "wire": {"messages", "policy"},
    "tables": set(),
    "aliases": set(),
    "naming": {"aliases"},
    "flags": {"aliases", "config", "naming"},
    "looking": {"doctor", "inspecting", "messages", "stored_run", "terminal", "__init__"},
    "given": {"config", "folder_names"},
    "plan_words": {"budget", "policy", "prepare"},
    "terminal": set(),
    "config": {
        "checkpoint",
        "daemon",
        "dataset",
        "folder_names",
        "grpo",
        "naming",
        "policy",
        "rewards",
        "schedule",
        "sinks",
        "tables",
    },
    "daemon": {
        "config",
        "flags",
        "folder_names",
        "held_folder",
        "messages",
        "run_lock",
        "runtime",
        "sinks",
        "supervisor",
        "tables",
        "terminal",
        "web",
    },
    "budget": {"config", "grpo", "policy", "process_wide"},
    "actors": ROOMS,
    "training": {"gathering", "grpo", "learning", "linux_cpu", "messages", "policy", "statistics"},
    "changes": {"config", "naming", "tables"},
    "arithmetic": {"linux_cpu"},
    "sealed_config": {"tables"},
    "lost_steps": {"run_store", "sinks"},
    "resuming": {"changes", "checkpoint", "config", "messages", "policy", "rewards", "sealed_config"},
    "metric_names": {"rewards"},
    "prepare": ROOMS
    | {
        "arithmetic",
        "budget",
        "changes",
        "config",
        "linux_cpu",
        "lost_steps",
        "metric_names",
        "resuming",
        "run_folder",
        "wiring",
    },
    "rollouts": ROOMS,
    "generator_process": ROOMS | {"actors", "budget", "linux_cpu", "__init__"},
    "pipeline": ROOMS | {"actors", "changes", "config", "prepare", "__init__"},
    "performance": ROOMS
    | {
        "activity",
        "budget",
        "changes",
        "config",
        "linux_cpu",
        "pipeline",
        "prepare",
        "rollouts",
        "run_folder",
        "status",
        "summary",
        "wiring",
    },
    "summary": set(),
    "supervisor": ROOMS
    | {
        "activity",
        "changes",
        "config",
        "performance",
        "pipeline",
        "prepare",
        "run_folder",
        "status",
        "summary",
        "tables",
    },
    "playing": {"config", "daemon", "folder_names", "outlets", "runtime", "summary", "supervisor", "terminal"},
    "status": {"messages", "runtime"},
    "activity": {"messages", "runtime"},
    "run_lock": set(),
    "held_folder": set(),
    "folder_names": set(),
    "run_folder": {
        "config",
        "dataset",
        "folder_names",
        "held_folder",
        "run_lock",
        "sealed_config",
        "weights_files",
    },
    "doctor": {"budget", "linux_cpu", "machine"},
    "cli": ROOMS
    | {
        "activity",
        "config",
        "daemon",
        "flags",
        "folder_names",
        "given",
        "looking",
        "naming",
        "outlets",
        "plan_words",
        "playing",
        "prepare",
        "report",
        "rollouts",
        "summary",
        "terminal",
        "__init__",
    },
    "__main__": {"cli", "daemon", "looking", "report", "terminal", "__init__"},
    "__init__": {"config", "linux_cpu", "reward_files", "rewards", "rollouts", "summary", "supervisor"},
}


def room_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports_of(file: Path) -> set[str]:
    """Dotted names of ours that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide who knows whom"
            module = node.module or ""
            if module == "troupe":
                submodules = {path.stem for path in PACKAGE.iterdir()}
                found |= {f"troupe.{a.name}" if a.name in submodules else "troupe.__init__" for a in node.names}
            else:
                found.add(module)
    return {name for name in found if name == "troupe" or name.startswith("troupe.")}


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_module_imports_only_whom_it_may_know(file: Path) -> None:
    room = room_of(file)
    known = {name.split(".")[1] for name in imports_of(file)}
    assert known <= ALLOWED[room] | EVERYWHERE | {room}


def test_no_actor_imports_another() -> None:
    for file in (PACKAGE / "actors").glob("*.py"):
        others = {name for name in imports_of(file) if name.startswith("troupe.actors")}
        assert not others, file.name


def test_few_import_actors_and_fewer_the_pipeline() -> None:
    importers = {
        target: {room_of(file) for file in FILES if any(n.startswith(f"troupe.{target}") for n in imports_of(file))}
        for target in ("actors", "pipeline")
    }
    assert importers == {"actors": {"pipeline", "generator_process"}, "pipeline": {"performance", "supervisor"}}


def test_numpy_and_pickle_are_nowhere_in_the_product() -> None:
    for file in FILES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {name.split(".")[0] for name in names} & {"numpy", "pickle", "torch", "transformers"}, file
        calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        assert not calls & {"eval", "exec"}, file
