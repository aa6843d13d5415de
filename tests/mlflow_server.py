"""A real `mlflow server` on loopback: start it, kill it, start it again."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import psutil
import pytest

from rllib_arpo.serving.front import free_ports
from tests.serving.served import PATIENCE_S, is_up, until

# Marks for tests that use MLflow in their process: its own use of its libraries warns.
MLFLOWS_WARNINGS = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


# Of the runs and of the models.
FIRST_USES = [
    f"/api/2.0/mlflow/{kind}/search" for kind in ("experiments", "registered-models")
]


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
        log = self.folder / "server.log"
        with log.open("a") as written:
            self._process = process = subprocess.Popen(
                words,
                cwd=self.folder,
                stdout=written,
                stderr=written,
                start_new_session=True,
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )
        with httpx2.Client(base_url=self.uri, timeout=PATIENCE_S) as client:
            try:
                until(lambda: process.poll() is not None or is_up(client))
                assert process.poll() is None, log.read_text()
                # It opens its stores at their first use, which takes longer than those
                # who are tested wait.
                for path in FIRST_USES:
                    client.get(path, params={"max_results": 1}).raise_for_status()
            except BaseException:
                self.kill()
                raise

    def kill(self) -> None:
        """As a power cut does, with its workers: none of them is left."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        workers = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        until(lambda: not any(map(runs, workers)))


def runs(process: psutil.Process) -> bool:
    """Whether it has not ended; nobody may have waited for it yet."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
