"""Write docs/configuration.md: every key of a run's configuration, read off the structs that define it.

Meanings are the docstrings under the fields, so they are read from the source; types, bounds and defaults come from
the structs themselves. `python -m scripts.config_reference` writes the file, `--check` only compares it.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from scripts.pages import DOCS, write_or_check
from troupe.run.config import RunConfig
from troupe.run.resume.changes import rule_of

PAGE = DOCS / "configuration.md"

_HEAD = """\
# Every key of the configuration

<!-- written by scripts/config_reference.py; change the docstrings of the config structs, not this file -->

A run is described by one TOML file. `troupe train RUN.toml --dry-run` prints it with every key resolved, and the
resolved file stands in the run folder as `run.toml`. Unknown keys are refused with the nearest known one. On the
command line, `--set section.key=value` sets any key; the value is read as TOML and, where that fails, as text. TOML has
no null: where a default is "–", or a meaning says None, leave the key out. Relative paths of inputs count from the
folder of the file that names them, `output` from the working directory.

*Resume* says what `--resume` does with another value than the run was made with: **free**, it changes nothing that is
computed; **by name**, it has to be allowed by `--allow-change section.key`; **never**, it would be another run. See
[resuming](resuming.md).
"""

_SECTIONS = {
    "": "The run as a whole; these keys stand above all sections.",
    "model": "The policy that the run begins with.",
    "adapter": "What is trained beside the model, where not all of it is. See [adapters](adapters.md).",
    "data": "The prompts. See [prompts](datasets.md).",
    "sft": "What of the rows of supervised steps is learned. See [supervised steps](sft.md).",
    "warm_start": "Supervised steps before the first one that is sampled. See [supervised steps](sft.md#a-warm-start).",
    "curriculum": "Which prompts come how often. See [curriculum](curriculum.md).",
    "generation": "How completions are sampled. See [sampling](sampling.md) for the order in which filters act.",
    "rewards": "What is scored, and how reward code is run. See [rewards](rewards.md).",
    "environment": "What the policy acts with, over several turns. See [environments](environments.md).",
    "learner": "The loss and the optimizer. See [training](training.md).",
    "teacher": "Who is learned from beside the rewards. See [distillation](distillation.md).",
    "schedule": "How old the weights may be. See [schedules](schedules.md).",
    "evaluation": "Rows that are not trained on, answered while training goes on. See [evaluation](evaluation.md).",
    "checkpoint": "What is kept. See [resuming](resuming.md).",
    "metrics": "Where metrics go. See [metrics](metrics.md).",
    "daemon": "How `troupe daemon` keeps a run alive. See [daemon](daemon.md).",
    "cluster": "How workers on other machines do a part of the work.",
}


def meanings(struct: type) -> dict[str, str]:
    """Field → the docstring under it, on one line; inherited fields included."""
    found: dict[str, str] = {}
    for owner in reversed(struct.__mro__):
        if issubclass(owner, msgspec.Struct) and owner is not msgspec.Struct:
            [body] = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
            assert isinstance(body, ast.ClassDef)
            found |= _under_fields(body)
    return found


def _under_fields(body: ast.ClassDef) -> dict[str, str]:
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(meaning))):
                found[name] = " ".join(meaning.split())
    return found


def kind(hint: Any) -> str:
    """A type in the words of somebody who writes TOML."""
    origin = get_origin(hint)
    if origin is Annotated:
        base, *notes = get_args(hint)
        return kind(base) + "".join(_bounds(note) for note in notes if isinstance(note, msgspec.Meta))
    if origin is Literal:
        return " or ".join(f'`"{value}"`' for value in get_args(hint))
    if origin in (Union, types.UnionType):
        return " or ".join(kind(part) for part in get_args(hint) if part is not type(None))
    if origin is tuple:
        item = get_args(hint)[0]
        return "list of tables" if _is_struct(item) else f"list of {kind(item)}"
    if origin is dict:
        return "table"
    return {int: "whole number", float: "number", str: "text", bool: "true or false"}[hint]


def _is_struct(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, msgspec.Struct)


def _bounds(meta: msgspec.Meta) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    told = [f"{sign} {bound:g}" for name, sign in signs.items() if (bound := getattr(meta, name)) is not None]
    return f" {', '.join(told)}" if told else ""


def _default(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        escaped = value.replace("\n", "\\n")
        return f'`"{escaped}"`'
    if isinstance(value, tuple):
        return "`[" + ", ".join(f'"{item}"' for item in value) + "]`"
    return f"`{value if value != {} else '{}'}`"


def _default_of(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    return f"default {_default(default)}"


def _tables(struct: type[msgspec.Struct], prefix: str) -> list[str]:
    """Tables that stand several times within a section, each under a heading."""
    lines = []
    for name, hint in get_type_hints(struct).items():
        if get_origin(hint) is tuple and _is_struct(item := get_args(hint)[0]):
            lines += ["", f"### [[{prefix}{name}]]", "", *_table(item, f"{prefix}{name}.", rule=f"{prefix}{name}")]
    return lines


def _table(struct: type[msgspec.Struct], prefix: str, rule: str | None = None) -> list[str]:
    """`rule`: the key whose rule holds for all of them; None: each has its own."""
    hints, texts = get_type_hints(struct, include_extras=True), meanings(struct)
    lines = ["| key | meaning |", "|---|---|"]
    for field in msgspec.structs.fields(struct):
        if _is_struct(field.type):
            continue
        key = f"{prefix}{field.name}"
        told = [kind(hints[field.name]), _default_of(field), f"resume: {rule_of(rule or key)}"]
        cells = ["<br>".join([f"`{key}`", *told]), texts.get(field.name, "")]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def reference() -> str:
    """The whole page."""
    lines = [_HEAD, _SECTIONS[""], "", *_table(RunConfig, "")]
    for field in msgspec.structs.fields(RunConfig):
        if _is_struct(field.type):
            lines += ["", f"## [{field.name}]", "", _SECTIONS[field.name], "", *_table(field.type, f"{field.name}.")]
            lines += _tables(field.type, f"{field.name}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    write_or_check(PAGE, reference(), "config_reference")
