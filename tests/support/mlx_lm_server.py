"""A real `mlx_lm.server`, as a process that is killed and started again."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_STARTS_S = 60.0


class MlxLmServer:
    """Serves one model folder at a port of its own."""

    def __init__(self, model: Path, log: Path) -> None:
        self._model, self._log = model, log
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Returns at once; it answers some seconds later."""
        command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(self._model), "--port", str(self.port)]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"}
            )

    def wait(self) -> None:
        """Until it answers."""
        end_s = time.monotonic() + _STARTS_S
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=1.0).close()
            except OSError:
                assert self.process is not None
                assert self.process.poll() is None, self._log.read_text()
                assert time.monotonic() < end_s, self._log.read_text()
                time.sleep(0.1)
            else:
                return

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@contextmanager
def mlx_lm_server(model: Path, folder: Path) -> Iterator[MlxLmServer]:
    """One that answers; the test is skipped where mlx-lm is missing, unless TROUPE_REQUIRE_ORACLES is set."""
    if importlib.util.find_spec("mlx_lm") is None and not os.environ.get("TROUPE_REQUIRE_ORACLES"):
        pytest.skip("mlx-lm is not installed")
    server = MlxLmServer(model, folder / "server.log")
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()
