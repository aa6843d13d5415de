"""A model that is served by an alias of MLflow's registry."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from rllib_arpo.agents import find_agent, save_agent
from rllib_arpo.tracking.registry import register_model
from tests.mlflow_server import MLFLOWS_WARNINGS
from tests.serving.file_server import serving_file
from tests.serving.served import ADMIN_KEY, KEY, Crowd, Served, serving, until

pytestmark = [
    pytest.mark.slow,
    *MLFLOWS_WARNINGS,
]
NAME, CLOCK = "almanac", "clock"
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


def version_of(served: Served, model: str = NAME) -> str:
    reply = served.post(model=model, seed=1).raise_for_status().json()
    (choice,) = reply["choices"]
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


def test_a_manager_that_starts_anew_goes_on_following_and_keeps_the_last_act(
    agent_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`CLOCK` moves twice: so the new manager has looked at the other model, too."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    names = (NAME, CLOCK)
    for name in names:
        register_model(agent_folder, name)
    args = {
        "models": [
            {"name": name, "checkpoint": f"models:/{name}@champion"} for name in names
        ],
        "poll_s": 0.5,
        "trace_share": 0.0,
    }
    no_cpus = {"ray_actor_options": {"num_cpus": 0}}
    deployments = [
        {"name": name, **no_cpus} for name in ("agent", "engine-0", "engine-1")
    ]
    with serving_file(tmp_path, args=args, deployments=deployments) as served:
        register_model(agent_folder, NAME)
        until(lambda: version_of(served) == f"{NAME}/2")
        served.reload(model=NAME, checkpoint=f"models:/{NAME}/1").raise_for_status()
        before = served.replicas("manager")
        served.kill("manager")
        until(lambda: bool(served.replicas("manager") - before))
        for version in ("2", "3"):
            assert register_model(agent_folder, CLOCK) == version
            until(lambda: version_of(served, CLOCK) == f"{CLOCK}/{version}")  # noqa: B023
            assert version_of(served) == f"{NAME}/1"
        register_model(agent_folder, NAME)
        until(lambda: version_of(served) == f"{NAME}/3")
