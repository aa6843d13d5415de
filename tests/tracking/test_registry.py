"""Agents in MLflow's registry."""

import shutil

import pytest
from mlflow import pyfunc, set_tracking_uri

from rllib_arpo.agents import find_agent, load_agent, save_agent
from rllib_arpo.errors import ConfigError
from rllib_arpo.tracking.mlflow_model import INPUT_EXAMPLE
from rllib_arpo.tracking.registry import fetch_model, model_version, register_model
from tests.mlflow_server import MLFLOWS_WARNINGS, MLflowServer

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
