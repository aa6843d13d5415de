"""A registered agent behind the real `mlflow models serve`."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from mlflow import pyfunc, set_tracking_uri

from rllib_arpo.agents import find_agent, save_agent
from rllib_arpo.serving.front import free_ports
from rllib_arpo.tracking.mlflow_model import INPUT_EXAMPLE
from rllib_arpo.tracking.registry import register_model
from tests.mlflow_server import MLFLOWS_WARNINGS
from tests.serving.served import PATIENCE_S, is_up, until

pytestmark = [
    pytest.mark.slow,
    *MLFLOWS_WARNINGS,
]


@contextmanager
def model_server(model: str, uri: str, folder: Path) -> Iterator[httpx2.Client]:
    """A client of `mlflow models serve`, which ends with the block."""
    (port,) = free_ports(1)
    words = [
        *(sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", model),
        *("--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)),
        *("--workers", "1"),
    ]
    log = folder / "models_serve.log"
    with log.open("w") as written:
        process = subprocess.Popen(
            words,
            cwd=folder,
            stdout=written,
            stderr=written,
            start_new_session=True,
            env=os.environ
            | {
                "MLFLOW_TRACKING_URI": uri,
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
                # MLflow starts the server by the name of its program.
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            },
        )
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx2.Client(base_url=url, timeout=PATIENCE_S) as client:
            until(lambda: process.poll() is not None or is_up(client))
            assert process.poll() is None, log.read_text()
            yield client
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_mlflow_models_serve_answers_as_the_loaded_model_does(
    almanac_model, tmp_path, monkeypatch
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlruns.db'}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    agent = shutil.copytree(almanac_model, tmp_path / "agent")
    save_agent(find_agent(almanac_model).settings, agent)
    register_model(str(agent), "tiny")
    asked: dict[str, Any] = {**INPUT_EXAMPLE, "max_tokens": 8, "seed": 1}
    set_tracking_uri(uri)
    try:
        loaded = pyfunc.load_model("models:/tiny@champion").predict(asked)
    finally:
        set_tracking_uri("")
    assert loaded[0]["finish_reason"] == "length"

    with model_server("models:/tiny@champion", uri, tmp_path) as client:
        served = client.post("/invocations", json={"inputs": asked})
        assert served.status_code == 200, served.text
        assert served.json()["predictions"] == loaded

        example = client.post("/invocations", json={"inputs": INPUT_EXAMPLE})
        assert example.status_code == 200, example.text
        (answer,) = example.json()["predictions"]
        assert set(answer) == {"content", "reasoning_content", "finish_reason"}

        refused = client.post("/invocations", json={"inputs": {"question": "?"}})
        assert refused.status_code == 400
        assert "messages" in json.dumps(refused.json())
