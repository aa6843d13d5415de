"""How a run ends in MLflow when its script does not end it."""

import subprocess
import sys

import pytest
from mlflow import MlflowClient

from tests.mlflow_server import MLFLOWS_WARNINGS

pytestmark = [pytest.mark.slow, *MLFLOWS_WARNINGS]
# Each of the ways to end, in a process of its own.
SCRIPT = """
import os, sys
from pathlib import Path
from rllib_arpo.tracking.mlflow import MLflowCallback
from rllib_arpo.tracking.mlflow_store import import_mlflow

import_mlflow()
folder, uri, *ends = sys.argv[1:]
for end in ends:
    if os.fork() == 0:
        callback = MLflowCallback(uri=uri, name=end, system_metrics=False)
        callback.open(Path(folder, end), {}, stage="ARPO")
        assert callback.buffer.flush(120)
        exec(end)
    os.wait()
"""
STATUS_OF = {
    "raise RuntimeError('training failed')": "FAILED",
    "raise KeyboardInterrupt": "KILLED",
    "sys.exit(0)": "FINISHED",
}


def test_a_script_that_crashes_leaves_a_failed_run(tmp_path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlruns.db'}"
    client = MlflowClient(uri)
    client.search_experiments()  # makes the database, once for all
    words = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path), uri]
    subprocess.run([*words, *STATUS_OF], check=True, timeout=300)
    runs = client.search_runs(["1"])
    assert {run.info.run_name: run.info.status for run in runs} == STATUS_OF
