"""What `troupe daemon` is asked to run, and the little of it that the daemon itself has to know."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from troupe.errors import ConfigError
from troupe.records.layout import RUN_TOML
from troupe.run.daemon_settings import DaemonConfig
from troupe.run.folder_names import run_folder_named
from troupe.run.tables import lay_over, table_of
from troupe.runtime.files import read_toml


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """One run to be kept alive. All paths are absolute."""

    run_toml: Path
    output: Path
    settings: tuple[str, ...] = ()
    allow_changes: tuple[str, ...] = ()
    table: dict[str, Any] = {}
    """The configuration as it was when the order was given."""

    @classmethod
    def given(
        cls, run_toml: Path, output: str | None, settings: Sequence[str] = (), allow_changes: Sequence[str] = ()
    ) -> Order:
        """The order that the command line means. InputError where it names no run folder, or its file is not readable.

        A run folder in place of the file is the run that stands there, by its own `run.toml`. Whether the rest of the
        configuration can be used is for the trainer to say.
        """
        if (run_toml / RUN_TOML).is_file():
            output = str(run_toml) if output is None else output
            run_toml = run_toml / RUN_TOML
        order = cls(
            run_toml=run_toml.absolute(),
            output=Path(),
            settings=tuple(settings),
            allow_changes=tuple(allow_changes),
        )
        table = order.read()
        named = table.get("output") if output is None else output
        if not isinstance(named, str):
            raise ConfigError(
                f"{run_toml}: a daemon has to know its run folder before the run begins; name it with -o OUT_DIR, or "
                "as output in the file"
            )
        return msgspec.structs.replace(order, output=run_folder_named(named), table=table)

    def read(self) -> dict[str, Any]:
        """The configuration as it is now, settings included, types unchecked. ConfigError where it cannot be read."""
        table = read_toml(self.run_toml)
        for setting in self.settings:
            lay_over(table, table_of(setting))
        return table

    @property
    def daemon(self) -> DaemonConfig:
        """The daemon's own section; its defaults where that is no such section, which the trainer will refuse."""
        try:
            return msgspec.convert(self.table.get("daemon", {}), DaemonConfig)
        except msgspec.ValidationError:
            return DaemonConfig()
