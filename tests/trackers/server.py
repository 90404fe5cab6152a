"""A real MLflow server, in an environment of its own: `make test-all` makes it in .venv/mlflow-server."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest

from tests.waiting import becomes_true

_MLFLOW = Path(sys.prefix) / "mlflow-server" / "bin" / "mlflow"


class Server:
    """It can be stopped and started again, with the same address and store."""

    def __init__(self, folder: Path):
        if not _MLFLOW.is_file():
            pytest.skip("no MLflow server (make test-all installs one)")
        self._folder = folder
        with closing(socket.create_server(("127.0.0.1", 0))) as taken:
            self._port = taken.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return when it answers."""
        store = f"sqlite:///{self._folder}/server.db"
        with open(self._folder / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                [_MLFLOW, "server", "--backend-store-uri", store, "--port", str(self._port), "--workers", "1"],
                cwd=self._folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
            )
        becomes_true(self._answers)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        """At once, as a machine that is switched off."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
