"""Agents in MLflow's registry."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient, pyfunc, set_tracking_uri
from mlflow.models import Model

from rllib_arpo.agents import find_agent, load_agent, save_agent
from rllib_arpo.errors import ConfigError
from rllib_arpo.tracking.mlflow_model import INPUT_EXAMPLE, save_model
from rllib_arpo.tracking.mlflow_store import EXPERIMENT, uploading
from rllib_arpo.tracking.registry import (
    AGENT_FOLDER,
    fetch_model,
    model_version,
    register_model,
)
from tests.http_server import HttpServer, Reply, Request, _Handler
from tests.mlflow_server import MLFLOWS_WARNINGS, MLflowServer
from tests.models import save_tiny_model

TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
pytestmark = MLFLOWS_WARNINGS


def test_a_registered_agent_comes_back_and_answers(
    almanac_model, tmp_path, monkeypatch
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlruns.db'}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings = find_agent(almanac_model).settings
    save_agent(settings, almanac_model)
    assert register_model(almanac_model, "tiny") == "1"
    assert register_model(almanac_model, "tiny", alias=None) == "2"
    assert model_version("models:/tiny@champion") == "1"
    fetched = fetch_model("models:/tiny/2")
    assert fetched.version == "2"
    assert load_agent(fetched.folder).sampling == settings.sampling
    set_tracking_uri(uri)
    try:
        model = pyfunc.load_model("models:/tiny@champion")
        (answer,) = model.predict({**INPUT_EXAMPLE, "max_tokens": 8, "seed": 1})
    finally:
        set_tracking_uri("")
    assert set(answer) == {"content", "reasoning_content", "finish_reason"}


@pytest.mark.slow
def test_a_servers_model_is_fetched_once_and_needs_the_store_no_more(
    almanac_model, tmp_path, monkeypatch
) -> None:
    folder = shutil.copytree(almanac_model, tmp_path / "agent")
    settings = find_agent(str(folder)).settings
    save_agent(settings, folder)
    server = MLflowServer(tmp_path)
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    try:
        register_model(folder, "tiny")
        fetched = fetch_model("models:/tiny@champion")
        shutil.rmtree(tmp_path / "artifacts")
        assert fetch_model("models:/tiny/1") == fetched
    finally:
        server.kill()
    assert fetched.version == "1"
    assert load_agent(fetched.folder) == settings
    assert fetched.folder.is_relative_to(tmp_path / "cache")


@pytest.mark.parametrize("uri", ["models:/x", "models:/x/latest", "runs:/x/1", "x@y"])
def test_what_names_no_model_is_refused(uri) -> None:
    with pytest.raises(ConfigError, match="names no registered model"):
        model_version(uri)


def test_the_weights_are_linked_and_copied_only_where_they_cannot_be(
    tmp_path, monkeypatch
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.EXDEV, "another file system")

    model = Path(save_tiny_model(tmp_path / "model"))
    weights = "model.safetensors"
    linked = save_model(model, tmp_path / "linked") / AGENT_FOLDER / weights
    assert linked.samefile(model / weights)
    monkeypatch.setattr(os, "link", refuse)
    copied = save_model(model, tmp_path / "copied") / AGENT_FOLDER / weights
    assert not copied.samefile(model / weights)
    assert copied.read_bytes() == (model / weights).read_bytes()
    size = Model.load(str(tmp_path / "linked")).model_size_bytes
    assert size is not None and size > (model / weights).stat().st_size


class _PutHandler(_Handler):
    do_PUT = _Handler.do_GET


@contextmanager
def artifact_server(status: int) -> Iterator[tuple[str, list[int]]]:
    """One that takes files, or refuses them; and the timeouts of its clients."""
    timeouts: list[int] = []

    def answer(request: Request) -> Reply:
        timeouts.append(int(os.environ[TIMEOUT]))
        return Reply(status=status, json={})

    server = HttpServer(answer)
    server.RequestHandlerClass = _PutHandler
    with server:
        yield server.url("/api/2.0/mlflow-artifacts/artifacts/x"), timeouts


@pytest.mark.parametrize(("set_to", "waits"), [("10", 600), ("1000", 1000)])
def test_an_upload_is_given_minutes(set_to, waits, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(TIMEOUT, set_to)
    uri = f"sqlite:///{tmp_path / 'mlruns.db'}"
    model = save_tiny_model(tmp_path / "model")
    with artifact_server(200) as (place, timeouts):
        MlflowClient(uri).create_experiment(EXPERIMENT, place)
        assert register_model(model, "tiny", uri=uri) == "1"
    assert len(timeouts) > 3
    assert set(timeouts) == {waits}
    assert os.environ[TIMEOUT] == set_to


def test_an_upload_that_fails_leaves_no_model(tmp_path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlruns.db'}"
    client = MlflowClient(uri)
    model = save_tiny_model(tmp_path / "model")
    with artifact_server(507) as (place, timeouts):
        experiment = client.create_experiment(EXPERIMENT, place)
        with pytest.raises(ConfigError, match="507"):
            register_model(model, "tiny", uri=uri)
    assert timeouts
    assert client.search_logged_models([experiment]) == []
    assert client.search_registered_models() == []


def test_the_time_for_files_ends_with_the_last_of_several_uploads(monkeypatch) -> None:
    monkeypatch.delenv(TIMEOUT, raising=False)
    first, second = uploading(), uploading()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert os.environ[TIMEOUT] == "600"
    second.__exit__(None, None, None)
    assert TIMEOUT not in os.environ
