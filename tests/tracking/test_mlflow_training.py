"""A training whose MLflow server is away, hangs, dies or comes back meanwhile."""

import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from rllib_arpo.alarms import AlarmSettings
from rllib_arpo.tracking.attach import end_tracking
from rllib_arpo.tracking.mlflow import BUFFER_FOLDER, MLflowCallback
from rllib_arpo.tracking.mlflow_buffer import send_later
from tests.mlflow_server import MLFLOWS_WARNINGS, MLflowServer
from tests.tiny_runs import arpo_config, running

LIMIT_S = 120
pytestmark = [
    *MLFLOWS_WARNINGS,
    pytest.mark.usefixtures("ray_session"),
]


def tracked(model: str, folder: Path, uri: str) -> Any:
    callback: Any = partial(
        MLflowCallback, folder=folder, uri=uri, registered_model=None
    )
    return arpo_config(model).callbacks(callback)


def callback_of(algorithm: Any) -> MLflowCallback:
    (callback,) = algorithm.callbacks
    return callback


def steps(uri: str) -> list[int]:
    """Iterations of the only run, as MLflow has them."""
    client = MlflowClient(uri)
    (run,) = client.search_runs(["1"])
    return [m.step for m in client.get_metric_history(run.info.run_id, "reward_mean")]


def test_a_server_that_never_answers_holds_up_no_iteration(
    almanac_model, tmp_path
) -> None:
    server = MLflowServer(tmp_path / "server")
    server.folder.mkdir()
    folder = tmp_path / "run"
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", server.port))
        silent.listen()
        silent.settimeout(LIMIT_S)
        with running(tracked(almanac_model, folder, server.uri)) as algorithm:
            algorithm.train()
            asked, _ = silent.accept()
            with asked:
                # A request is under way, and stays so.
                assert asked.recv(1)
                algorithm.train()
                assert not callback_of(algorithm).close(0.0)
    server.start()
    try:
        assert send_later(folder / BUFFER_FOLDER, timeout_s=LIMIT_S)
        assert steps(server.uri) == [1, 2]
    finally:
        server.kill()


def test_a_server_that_comes_goes_and_comes_back_has_every_iteration_once(
    almanac_model, tmp_path
) -> None:
    server = MLflowServer(tmp_path / "server")
    server.folder.mkdir()
    try:
        config = tracked(almanac_model, tmp_path / "run", server.uri)
        with running(config) as algorithm:
            algorithm.train()
            server.start()
            algorithm.train()
            buffer = callback_of(algorithm).buffer
            assert buffer is not None and buffer.flush(LIMIT_S)
            assert steps(server.uri) == [1, 2]
            server.kill()
            algorithm.train()
            server.start()
            algorithm.train()
            end_tracking(algorithm)
        assert steps(server.uri) == [1, 2, 3, 4]
    finally:
        server.kill()


def test_an_alarm_becomes_a_tag_that_says_what_to_try(almanac_model, tmp_path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlruns.db'}"
    config = tracked(almanac_model, tmp_path / "run", uri).reporting(
        alarms=AlarmSettings(iterations=1)
    )
    with running(config) as algorithm:
        algorithm.train()
        end_tracking(algorithm)
    (run,) = MlflowClient(uri).search_runs(["1"])
    tag = run.data.tags["alarm.no_tool_calls"]
    assert tag.startswith("iteration 1: No trajectory called a tool")
    assert " Try: " in tag
