"""`--mlflow` as a user gives it: what the store and the registry hold afterwards."""

import io
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from rich.console import Console as RichConsole

from rllib_arpo.agents import find_agent
from rllib_arpo.progress import Console
from rllib_arpo.quickstart import Settings, quickstart
from tests.commands import run
from tests.mlflow_server import MLFLOWS_WARNINGS, MLflowServer
from tests.models import save_tiny_model
from tests.tokenizers import qwen_like

pytestmark = [
    pytest.mark.slow,
    *MLFLOWS_WARNINGS,
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, questions and traces; a git repository, as users have."""
    folder = tmp_path_factory.mktemp("cli_mlflow")
    tokenizer = qwen_like()
    tokenizer.save_pretrained(folder / "model")
    save_tiny_model(folder / "model", vocab_size=len(tokenizer))
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(4)]
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "<answer> \\boxed{2} </answer>"},
    ]
    (folder / "traces.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    git = ["git", "-c", "user.name=T", "-c", "user.email=t@example.com"]
    subprocess.run([*git, "init", "-q"], cwd=folder, check=True)
    subprocess.run(
        [*git, "commit", "-q", "--allow-empty", "-m", "start"], cwd=folder, check=True
    )
    return folder


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MLflowServer]:
    server = MLflowServer(tmp_path)
    server.start()
    yield server
    server.kill()


def runs_of(client: MlflowClient) -> dict[str | None, Run]:
    experiment = client.get_experiment_by_name("rllib-arpo")
    runs = client.search_runs([experiment.experiment_id])
    return {found.info.run_name: found for found in runs}


@pytest.mark.timeout(900)
def test_train_is_tracked_on_a_server_with_its_best_model_as_champion(
    place, server, monkeypatch
):
    words = (
        "train --data train.jsonl --eval-data test.jsonl --eval-interval 1 "
        "--model model --iterations 2 --batch-size 2 --group-size 2 --lr 0.001 "
        "--max-response-tokens 16 --out tracked --mlflow"
    )
    run(*words.split(), server.uri, folder=place)
    client = MlflowClient(server.uri)
    (tracked,) = runs_of(client).values()
    assert tracked.info.run_name == "tracked"
    assert tracked.info.status == "FINISHED"
    params = tracked.data.params
    assert params["lr"] == "0.001"
    assert params["env_config.max_response_tokens"] == "16"
    assert params["model_config.model"] == str(place / "model")
    assert len(params) < 40
    tags = tracked.data.tags
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=place, text=True)
    assert tags["mlflow.source.git.commit"] == head.strip()
    assert {name for name in tags if name.startswith("data.")} == {
        *("data.train.jsonl", "data.test.jsonl")
    }
    assert tags["checkpoints"] == (place / "tracked" / "checkpoints").as_uri()
    for name in ("reward_mean", "eval_accuracy", "time_learn_s"):
        history = client.get_metric_history(tracked.info.run_id, name)
        assert [metric.step for metric in history] == [1, 2]
    champion = client.get_model_version_by_alias("arpo-agent", "champion")
    assert champion.run_id == tracked.info.run_id
    # Nothing of the run's folder is copied; the model lies in the registry.
    assert client.list_artifacts(tracked.info.run_id) == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    agent = find_agent("models:/arpo-agent@champion")
    assert agent.settings.env_config["max_response_tokens"] == 16


def test_sft_is_tracked_in_the_usual_store_of_the_folder(place, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    words = "sft model --data traces.jsonl --iterations 2 --batch-size 2 --out cold"
    run(*words.split(), "--mlflow", "default", folder=place)
    client = MlflowClient(f"sqlite:///{place / 'mlruns.db'}")
    tracked = runs_of(client)["cold"]
    assert tracked.data.tags["algorithm"] == "SFT"
    assert "data.traces.jsonl" in tracked.data.tags
    history = client.get_metric_history(tracked.info.run_id, "negative_log_likelihood")
    assert [metric.step for metric in history] == [1, 2]


@pytest.mark.timeout(900)
def test_the_quick_start_is_two_runs_and_registers_the_trained_agent(
    ray_session, tmp_path
):
    uri = f"sqlite:///{tmp_path / 'mlruns.db'}"
    folder = tmp_path / "quick"
    settings = Settings(
        folder=folder, sft_iterations=1, rl_iterations=1, num_test_tasks=8, mlflow=uri
    )
    console = Console(RichConsole(file=io.StringIO()))
    quickstart(settings, console)
    quickstart(settings, console)
    client = MlflowClient(uri)
    # The second one replaces the files of the first, not its runs.
    runs = client.search_runs(["1"])
    assert sorted(str(found.info.run_name) for found in runs) == [
        *("quick", "quick", "quick/sft", "quick/sft")
    ]
    assert all(found.info.status == "FINISHED" for found in runs)
    assert all("eval_accuracy" in found.data.metrics for found in runs)
    versions = client.search_model_versions("name='arpo-agent'")
    of_arpo = {found.info.run_id for found in runs if found.info.run_name == "quick"}
    assert {version.run_id for version in versions} == of_arpo
