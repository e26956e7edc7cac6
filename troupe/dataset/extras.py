"""Packages that some sources need and Troupe does not bring."""

from __future__ import annotations

import importlib
from types import ModuleType

from troupe.errors import DatasetError, remedy


def optional(module: str, extra: str, source: object) -> ModuleType:
    """The module of an extra. DatasetError, which says how to install it, where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DatasetError(
            f"{source}: reading this needs the package {package}, which cannot be imported ({error}); {remedy(extra)}"
        ) from None
