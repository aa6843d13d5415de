"""A model that is served by an alias of MLflow's registry."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from rllib_arpo.agents import find_agent, save_agent
from rllib_arpo.tracking.registry import register_model
from tests.mlflow_server import MLFLOWS_WARNINGS
from tests.serving.served import ADMIN_KEY, KEY, Crowd, Served, serving, until

pytestmark = [
    pytest.mark.slow,
    *MLFLOWS_WARNINGS,
]
NAME = "almanac"
NUM_CLIENTS = 8


@pytest.fixture
def agent_folder(almanac_model: str, tmp_path: Path) -> str:
    """A copy of the model, with what makes it an agent."""
    folder = shutil.copytree(almanac_model, tmp_path / "agent")
    save_agent(find_agent(almanac_model).settings, folder)
    return str(folder)


@pytest.fixture
def followed(
    agent_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Served]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    assert register_model(agent_folder, NAME) == "1"
    words = [
        f"{NAME}=models:/{NAME}@champion",
        "--api-key",
        KEY,
        "--admin-key",
        ADMIN_KEY,
    ]
    with serving(*words) as running:
        yield running


def version_of(served: Served) -> str:
    (choice,) = served.post(seed=1).raise_for_status().json()["choices"]
    return choice["message"]["agent"]["version"]


def test_answers_follow_the_alias_and_the_last_act_wins(
    followed: Served, agent_folder: str
) -> None:
    with Crowd(followed, NUM_CLIENTS) as crowd:
        until(lambda: crowd.has(NUM_CLIENTS, version=f"{NAME}/1"))
        register_model(agent_folder, NAME)
        until(lambda: crowd.has(NUM_CLIENTS, version=f"{NAME}/2"))
    assert {(one.status, one.error) for one in crowd.replies} == {(200, None)}

    first = f"models:/{NAME}/1"
    reloaded = followed.reload(model=NAME, checkpoint=first)
    assert reloaded.json() == {"models": {NAME: f"{NAME}/1"}}
    assert version_of(followed) == f"{NAME}/1"

    register_model(agent_folder, NAME)
    until(lambda: version_of(followed) == f"{NAME}/3")
