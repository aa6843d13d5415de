"""A real `mlflow server` on loopback: start it, kill it, start it again."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from rllib_arpo.serving.front import free_ports

LIMIT_S = 120
# Marks for tests that use MLflow in their process: its own use of its libraries warns.
MLFLOWS_WARNINGS = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
DOUBTS = "the server did not start"


class MLflowServer:
    """Its store is a sqlite file in `folder`, which outlasts it.

    Args:
        folder: of the store and the log.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (self.port,) = free_ports(1)
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        words = [
            *(sys.executable, "-m", "mlflow", "server"),
            *("--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"),
            *("--artifacts-destination", str(self.folder / "artifacts")),
        ]
        with (self.folder / "server.log").open("a") as log:
            self._process = subprocess.Popen(
                words,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )
        # Connections that are refused are tried again by the transport, with backoff.
        transport = httpx2.HTTPTransport(retries=12)
        with httpx2.Client(transport=transport, timeout=LIMIT_S) as client:
            assert client.get(f"{self.uri}/health").status_code == 200, DOUBTS

    def kill(self) -> None:
        """As a power cut does, with its workers."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
